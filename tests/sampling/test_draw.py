import itertools

import pytest
import torch

from ats_stream.errors import InputError
from ats_stream.sampling import SCHEMES, draw, estimator_weights

NEVER = float("-inf")
MAP = (48, 64)
M = 48 * 64


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other, row=slice(None)):
    return all(
        torch.equal(getattr(one, name)[row], getattr(other, name))
        for name in ("index", "log_prob", "weight", "num_drawn")
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_row_does_not_depend_on_its_batch(scheme):
    logits_BM = logits(0, 5, M)
    together = draw(logits_BM, 12, scheme=scheme, seed=3, stream_ids=[10, 11, 12, 13, 14], map_shape=MAP)
    alone = draw(logits_BM[3:4], 12, scheme=scheme, seed=3, stream_ids=[13], map_shape=MAP)
    assert same(together, alone, slice(3, 4))
    order = [4, 3, 0]
    shuffled = draw(logits_BM[order], 12, scheme=scheme, seed=3, stream_ids=[14, 13, 10], map_shape=MAP)
    assert same(together, shuffled, order)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "top"])
def test_seed_and_stream_change_the_draw(scheme):
    logits_BM = logits(0, 1, M).expand(3, -1)
    first = draw(logits_BM, 12, scheme=scheme, map_shape=MAP)
    other = draw(logits_BM, 12, scheme=scheme, map_shape=MAP, seed=1)
    rows = [*first.index.tolist(), *other.index.tolist()]
    assert len({tuple(row) for row in rows}) == 6


def test_default_streams_are_the_row_numbers():
    logits_BM = logits(0, 3, M)
    assert same(draw(logits_BM, 5), draw(logits_BM, 5, stream_ids=torch.arange(3)))


def test_stream_ids_have_64_bits():
    logits_BM = logits(0, 1, M)
    unsigned = draw(logits_BM, 5, stream_ids=[(1 << 64) - 1], seed=(1 << 64) - 2)
    assert same(unsigned, draw(logits_BM, 5, stream_ids=[-1], seed=-2))
    assert not torch.equal(unsigned.index, draw(logits_BM, 5, stream_ids=[(1 << 32) - 1], seed=-2).index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_equal_logits_does_not_matter(dtype):
    rounded_BM = logits(0, 2, M).to(dtype).float()
    assert torch.equal(draw(rounded_BM, 9).index, draw(rounded_BM.to(dtype), 9).index)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fields(scheme):
    logits_BM = logits(1, 3, M).requires_grad_()
    drawn = draw(logits_BM, 7, scheme=scheme, map_shape=MAP)
    log_softmax_BM = logits_BM.detach().double().log_softmax(dim=1)
    assert drawn.scheme == scheme
    assert drawn.index.dtype == torch.int64
    assert drawn.index.shape == (3, 7)
    assert torch.allclose(drawn.log_prob, log_softmax_BM.gather(1, drawn.index).float(), atol=1e-6)
    assert torch.equal(drawn.num_drawn, torch.full((3,), 7))
    assert drawn.weight.dtype == torch.float32
    assert not drawn.weight.requires_grad
    q_BN = log_softmax_BM.gather(1, drawn.index).exp()
    expected_BN = estimator_weights(q_BN, scheme, inclusion_BN=drawn.inclusion)
    assert torch.allclose(drawn.weight, expected_BN.float(), rtol=1e-5)
    if scheme != "with_replacement":
        assert all(len(set(row)) == 7 for row in drawn.index.tolist())


def test_race_keys_ascend_and_end_below_the_threshold():
    drawn = draw(logits(1, 2, M), 7)
    keys_BK = torch.cat([drawn.keys, drawn.threshold[:, None]], dim=1)
    assert bool((keys_BK.diff(dim=1) > 0).all())
    all_kept = draw(logits(1, 2, 7), 7)
    assert torch.equal(all_kept.threshold, torch.full((2,), float("inf"), dtype=torch.float64))
    assert draw(logits(1, 1, M), 7, scheme="balanced", map_shape=MAP).keys is None


def test_murthy_and_des_raj_draw_alike_and_longer_draws_begin_with_shorter_ones():
    logits_BM = logits(2, 2, M)
    five = draw(logits_BM, 5, scheme="murthy")
    nine = draw(logits_BM, 9, scheme="des_raj")
    assert torch.equal(nine.index[:, :5], five.index)


def test_distinct_draws_with_replacement_come_in_the_order_without():
    logits_BM = 3 * logits(2, 4, 40)
    with_repeats = draw(logits_BM, 30, replace=True).index.tolist()
    without = draw(logits_BM, 30).index.tolist()
    for repeated, distinct in zip(with_repeats, without, strict=True):
        firsts = list(dict.fromkeys(repeated))
        assert firsts == distinct[: len(firsts)]
        assert len(firsts) < 30


def test_top_takes_the_most_probable_ties_to_the_lower_index():
    logits_BM = torch.zeros(1, 5000)
    logits_BM[0, [4000, 17, 2500]] = torch.tensor([1.0, 2.0, 1.0])
    assert draw(logits_BM, 5, scheme="top").index.tolist() == [[17, 2500, 4000, 0, 1]]


def pairs_expected(q: list[float], replace: bool) -> dict[tuple[int, int], float]:
    pairs = (
        itertools.product(range(len(q)), repeat=2) if replace else itertools.permutations(range(len(q)), 2)
    )
    return {(i, j): q[i] * (q[j] if replace else q[j] / (1 - q[i])) for i, j in pairs}


@pytest.mark.parametrize(("replace", "bound"), [(False, 55.0), (True, 62.0)])
def test_draws_follow_the_plackett_luce_law(replace, bound):
    num_draws, q = 20_000, [0.4, 0.25, 0.2, 0.1, 0.05]
    logits_BM = torch.tensor(q).log().expand(num_draws, -1)
    index = draw(logits_BM, 2, replace=replace, seed=5).index
    counts = torch.bincount(index[:, 0] * 5 + index[:, 1], minlength=25)
    expected = pairs_expected(q, replace)
    assert sum(expected.values()) == pytest.approx(1)
    chi2 = sum(
        (int(counts[5 * i + j]) - num_draws * p) ** 2 / (num_draws * p) for (i, j), p in expected.items()
    )
    # 19 and 24 degrees of freedom: the bounds are passed with probability 3e-5
    assert chi2 < bound
    assert int(sum(counts[5 * i + j] for i, j in expected)) == num_draws


def test_large_maps_follow_the_law_too():
    # the candidate path: first draw from 5000 positions, folded into 8 groups of equal mass
    logits_BM = torch.zeros(1, 5000).expand(2000, -1)
    first_B = draw(logits_BM, 1, seed=9).index[:, 0]
    counts = torch.bincount(first_B // 625, minlength=8).double()
    assert float(((counts - 250) ** 2 / 250).sum()) < 35  # 7 degrees of freedom: p = 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_impossible_positions_are_never_drawn(scheme):
    for share in (0.5, 0.02):  # masked in place, and packed
        logits_BM = logits(4, 3, M)
        drawable_BM = torch.rand(3, M, generator=torch.Generator().manual_seed(5)) < share
        logits_BM[~drawable_BM] = NEVER
        index_BN = draw(logits_BM, 20, scheme=scheme, map_shape=MAP).index
        assert bool(drawable_BM.gather(1, index_BN).all())


def test_masked_positions_do_not_change_the_noise_of_others():
    logits_BM = logits(4, 1, M)
    whole = draw(logits_BM, 20)
    winners = whole.index[0]
    for num_others in (2000, 100):
        others = torch.randperm(M, generator=torch.Generator().manual_seed(1))[:num_others]
        kept = torch.cat([winners, others]).unique()
        masked_BM = torch.full_like(logits_BM, NEVER)
        masked_BM[0, kept] = logits_BM[0, kept]
        assert torch.equal(draw(masked_BM, 20).index, whole.index)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_drawable_positions_are_all_drawn_and_padded(scheme):
    logits_BM = torch.full((3, 12), NEVER)
    logits_BM[0, 7] = 0.5
    logits_BM[1, [2, 3, 11]] = torch.tensor([-400.0, 0.0, 30.0])
    logits_BM[2] = logits(0, 12)
    drawn = draw(logits_BM, 4, scheme=scheme, map_shape=(3, 4))
    if scheme == "with_replacement":
        assert drawn.num_drawn.tolist() == [4, 4, 4]
        assert drawn.index[0].tolist() == [7, 7, 7, 7]
        return
    assert drawn.num_drawn.tolist() == [1, 3, 4]
    assert drawn.index[0].tolist() == [7, 0, 0, 0]
    assert sorted(drawn.index[1, :3].tolist()) == [2, 3, 11]
    assert drawn.index[1, 3] == 0
    assert drawn.weight[0].tolist() == [1, 0, 0, 0]
    assert drawn.log_prob[0].tolist() == [0, NEVER, NEVER, NEVER]
    if scheme in ("murthy", "balanced", "top"):
        assert drawn.weight[1].tolist() == pytest.approx([1, 1, 1, 0])
    assert float((drawn.weight * drawn.log_prob.exp())[1].sum()) == pytest.approx(1, abs=1e-6)


def test_more_samples_than_positions():
    drawn = draw(torch.zeros(1, 2), 5)
    assert drawn.index.shape == (1, 5)
    assert drawn.num_drawn.tolist() == [2]


def test_positions_far_below_the_top_stay_ordered():
    # weights beyond float64's range: exp(-2000), exp(-3000)
    logits_BM = torch.tensor([[-3000.0, 0.0, -2000.0]])
    drawn = draw(logits_BM, 3)
    assert drawn.index.tolist() == [[1, 2, 0]]
    assert drawn.weight.tolist() == [[1, 1, 1]]


ROW = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("logits_BM", "num_samples", "options", "message"),
    [
        (torch.zeros(4), 1, {}, r"\(4,\)"),
        (torch.zeros(1, 2, 2), 1, {}, r"\(1, 2, 2\)"),
        (torch.zeros(0, 4), 1, {}, r"\(0, 4\)"),
        (torch.zeros(1, 4, dtype=torch.int64), 1, {}, "int64"),
        (torch.tensor([[0.0], [float("nan")]]), 1, {}, "row 1 contains nan"),
        (torch.tensor([[float("inf"), 0.0]]), 1, {}, "row 0 contains inf"),
        (torch.tensor([[0.0], [NEVER]]), 1, {}, "row 1 has no drawable position"),
        (ROW, 0, {}, "num_samples"),
        (ROW, 2.0, {}, "num_samples"),
        (ROW, True, {}, "num_samples"),
        (ROW, 1, {"scheme": "gumbel"}, "gumbel"),
        (ROW, 1, {"seed": 1 << 64}, "seed"),
        (ROW, 1, {"seed": 0.5}, "seed"),
        (ROW, 1, {"stream_ids": [1, 2]}, "stream_ids"),
        (ROW, 1, {"stream_ids": torch.zeros(1)}, "stream_ids"),
        (ROW, 1, {"global_index": torch.arange(3)}, "global_index"),
        (ROW, 1, {"global_index": torch.arange(4) - 1}, "global_index"),
        (ROW, 1, {"global_index": torch.zeros(4)}, "global_index"),
        (ROW, 1, {"scheme": "balanced"}, "map_shape"),
        (ROW, 1, {"scheme": "balanced", "map_shape": (3, 2)}, r"\(3, 2\)"),
        (ROW, 1, {"scheme": "balanced", "map_shape": (1, 1, 1, 4)}, "1 to 3 axes"),
        (ROW, 1, {"scheme": "balanced", "map_shape": (4,), "global_index": torch.arange(4)}, "whole maps"),
    ],
)
def test_bad_input(logits_BM, num_samples, options, message):
    with pytest.raises(InputError, match=message):
        draw(logits_BM, num_samples, **options)
