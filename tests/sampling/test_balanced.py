"""The uniform offset is integrated exactly: nothing changes between the fractional parts of interval ends."""

import pytest
import torch

from ats_stream.kernels.sample_cpu import compiled_path
from ats_stream.sampling import balanced as balanced_module
from ats_stream.sampling import draw, estimator_weights, expectation
from ats_stream.sampling import race as race_module
from ats_stream.sampling.balanced import (
    curve_places,
    equidistant_points,
    hilbert_index,
    inclusion_units,
    intervals_of,
)
from ats_stream.sampling.philox import PURPOSE_OFFSET, Noise, unit_from_words


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inclusion_probabilities(logits_BM: torch.Tensor, num_samples: int) -> torch.Tensor:
    units_BM, bits = inclusion_units(logits_BM, num_samples)
    return units_BM.double() * 2.0**-bits


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("num_draws", [1, 2, 3, 5, 8])
def test_unbiased_over_the_offset(num_draws, spread, stale):
    num_positions, num_features = 12, 3
    logits_M = vector(1, num_positions).requires_grad_()
    f_MF = vector(2, num_positions, num_features).requires_grad_()
    upstream_F = vector(3, num_features)
    a_M = (spread * logits_M).softmax(dim=0)
    q_M = (spread * vector(4, num_positions)).softmax(dim=0) if stale else a_M.detach()

    units_1M, bits = inclusion_units(q_M.log()[None], num_draws)
    order_M = torch.randperm(num_positions, generator=torch.Generator().manual_seed(5))
    length_1M = units_1M[:, order_M]
    pi_1M = units_1M.double() * 2.0**-bits
    ends = length_1M[0].double().cumsum(0) * 2.0**-bits
    cuts = torch.cat([torch.zeros(1), ends - ends.floor(), torch.ones(1)]).double().sort().values
    length_S, offset_S = cuts.diff(), (cuts[1:] + cuts[:-1]) / 2
    length_S, offset_S = length_S[length_S > 1e-13], offset_S[length_S > 1e-13]

    num_offsets = len(offset_S)
    pi_SM, length_SM = pi_1M.expand(num_offsets, -1), length_1M.expand(num_offsets, -1)
    index_SN = order_M[intervals_of(length_SM, equidistant_points(offset_S, num_draws, bits))]
    weight_SN = estimator_weights(q_M[index_SN], "balanced", inclusion_BN=pi_SM.gather(1, index_SN))
    mean_F = length_S @ expectation(f_MF[index_SN], a_M[index_SN], weight_SN)
    exact_F = a_M @ f_MF
    assert torch.allclose(mean_F, exact_F, atol=1e-10)
    assert all(len(set(row)) == num_draws for row in index_SN.tolist())
    if not stale:
        total_S = (q_M[index_SN] * weight_SN).sum(dim=1)
        assert torch.allclose(total_S, torch.ones_like(total_S), atol=1e-10)
    gradients = torch.autograd.grad(mean_F @ upstream_F, [logits_M, f_MF], retain_graph=True)
    exact_gradients = torch.autograd.grad(exact_F @ upstream_F, [logits_M, f_MF])
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert torch.allclose(gradient, exact, atol=1e-10)


@pytest.mark.parametrize("num_draws", [1, 3, 7, 20])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 40.0])
def test_inclusion_probabilities(num_draws, spread):
    log_q_BM = (spread * vector(6, 4, 20)).log_softmax(dim=1)
    pi_BM = inclusion_probabilities(log_q_BM, num_draws)
    assert torch.allclose(pi_BM.sum(dim=1), torch.full((4,), float(num_draws)).double(), atol=1e-9)
    assert bool((pi_BM <= 1).all())
    # proportional to q wherever not capped
    # what is below 1e-3 is rounded to 2^-53, which shows in a ratio
    scale_BM = (pi_BM.log() - log_q_BM).masked_fill((pi_BM == 1) | (pi_BM < 1e-3), float("nan"))
    for scale_M in scale_BM:
        free_M = scale_M[~scale_M.isnan()]
        assert len(free_M) == 0 or float(free_M.max() - free_M.min()) < 1e-9


def test_inclusion_of_few_drawable_positions_is_certain():
    log_q_BM = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).double().log()
    assert inclusion_probabilities(log_q_BM, 3).tolist() == [[1, 0, 1, 0]]
    assert inclusion_probabilities(log_q_BM, 2).tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize(("num_axes", "num_bits"), [(1, 6), (2, 1), (2, 5), (3, 1), (3, 3)])
def test_hilbert_curve_visits_every_cell_by_single_steps(num_axes, num_bits):
    side = torch.arange(1 << num_bits)
    cells = torch.cartesian_prod(*[side] * num_axes).view(-1, num_axes)
    place = hilbert_index(cells, num_bits)
    assert torch.equal(place.sort().values, torch.arange(len(cells)))
    path = cells[place.argsort()]
    assert bool((path.diff(dim=0).abs().sum(dim=1) == 1).all())


@pytest.mark.parametrize("map_shape", [(7,), (1, 1), (5, 9), (16, 3), (3, 4, 5)])
def test_cells_of_any_box_have_places_of_their_own_anew_for_each_stream(map_shape):
    num_positions = int(torch.tensor(map_shape).prod())
    index_BM = torch.arange(num_positions).expand(20, -1)
    place_BM = curve_places(index_BM, map_shape, Noise(seed=3, stream_ids=torch.arange(20)))
    assert all(len(set(row)) == num_positions for row in place_BM.tolist())
    if num_positions > 7:
        assert len({tuple(row) for row in place_BM.argsort(dim=1).tolist()}) > 5


def test_masked_map_is_sampled_like_its_drawable_part():
    # the same row among full rows is handled unpacked: nothing may change
    logits_BM = vector(8, 3, 400)
    logits_BM[0, 30:] = float("-inf")
    together = draw(logits_BM, 6, scheme="balanced", map_shape=(20, 20))
    alone = draw(logits_BM[:1], 6, scheme="balanced", map_shape=(20, 20))
    assert torch.equal(together.index[:1], alone.index)
    assert torch.equal(together.weight[:1], alone.weight)


@pytest.mark.parametrize("map_shape", [(30,), (5, 6), (2, 3, 5)])
def test_frequencies_follow_the_inclusion_probabilities(map_shape):
    num_draws, logits_1M = 4000, vector(7, 1, 30)
    drawn = draw(logits_1M.expand(num_draws, -1), 6, scheme="balanced", map_shape=map_shape)
    pi_M = inclusion_probabilities(logits_1M.log_softmax(dim=1), 6)[0]
    frequency_M = torch.bincount(drawn.index.flatten(), minlength=30) / num_draws
    error_M = (pi_M * (1 - pi_M) / num_draws).sqrt()
    assert bool(((frequency_M - pi_M).abs() <= 5 * error_M + 1e-12).all())
    assert torch.allclose(drawn.inclusion, pi_M[drawn.index])


def test_samples_keep_their_distance():
    def mean_distance_to_the_nearest(scheme):
        index_BN = draw(torch.zeros(200, 1024), 16, scheme=scheme, map_shape=(32, 32)).index
        cell_BND = torch.stack([index_BN // 32, index_BN % 32], dim=-1).double()
        distance_BNN = torch.cdist(cell_BND, cell_BND) + 100 * torch.eye(16)
        return float(distance_BNN.amin(dim=2).mean())

    assert mean_distance_to_the_nearest("balanced") > 1.2 * mean_distance_to_the_nearest("murthy")


def plain_balanced(logits_BM, num_samples, map_shape):
    """The definition: sort the whole map along the curve and lay all lengths end to end."""
    num_rows, num_positions = logits_BM.shape
    noise = Noise(seed=0, stream_ids=torch.arange(num_rows))
    place_BM = curve_places(torch.arange(num_positions).expand(num_rows, -1), map_shape, noise)
    order_BM = place_BM.argsort(dim=1)
    units_BM, bits = inclusion_units(logits_BM, num_samples)
    purposes = torch.tensor([PURPOSE_OFFSET, PURPOSE_OFFSET + 1])
    high_B, low_B = noise.words(torch.zeros(2, dtype=torch.int64), purposes).unbind(dim=1)
    point_BN = equidistant_points(unit_from_words(high_B, low_B), num_samples, bits)
    return order_BM.gather(1, intervals_of(units_BM.gather(1, order_BM), point_BN))


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("map_shape", "num_samples"), [((9000,), 7), ((90, 100), 64), ((3, 3000), 20), ((20, 15, 30), 5)]
)
def test_pieces_and_blocks_do_not_show(monkeypatch, map_shape, num_samples, block):
    monkeypatch.setattr(race_module, "_BLOCK_VALUES", block)
    for spread, share in ((1.0, 1.0), (6.0, 1.0), (1.0, 0.1), (0.0, 1.0)):
        logits_BM = (spread * vector(9, 2, 9000)).double()
        logits_BM[torch.rand(2, 9000, generator=torch.Generator().manual_seed(1)) >= share] = float("-inf")
        for pieces in (1, 64):
            monkeypatch.setattr(balanced_module, "_PIECES_PER_DRAW", pieces)
            drawn = draw(logits_BM, num_samples, scheme="balanced", map_shape=map_shape)
            assert torch.equal(drawn.index, plain_balanced(logits_BM, num_samples, map_shape))


def test_compiled_code_and_torch_draw_alike():
    logits_BM = vector(9, 3, 20_000).float()
    logits_BM[1, 3:] = float("-inf")
    draws = []
    for is_compiled in (True, False):
        with compiled_path(is_compiled):
            draws.append(draw(logits_BM, 30, scheme="balanced", map_shape=(100, 200)))
    for name in ("index", "log_prob", "weight", "num_drawn", "log_normaliser", "inclusion"):
        assert torch.equal(getattr(draws[0], name), getattr(draws[1], name)), name
