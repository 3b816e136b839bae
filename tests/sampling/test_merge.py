from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.sampling import draw, merge_draws

M = 6000
SCHEMES = ("with_replacement", "des_raj", "murthy", "top")


def logits_of(seed: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(2, M, generator=torch.Generator().manual_seed(seed))


def assert_equal_draws(merged, whole):
    for name in ("index", "keys", "threshold", "num_drawn", "log_prob", "weight", "log_normaliser"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    assert torch.equal(merged.race.log_rest, whole.race.log_rest)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiles_of_any_size_merge_into_the_whole(scheme):
    logits_BM = logits_of(0)
    logits_BM[0, 1000:1500] = float("-inf")
    whole = draw(logits_BM, 10, scheme=scheme, seed=4, stream_ids=[7, 8])
    everywhere = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    # scattered tiles, small ones (ranked in full) and large ones (ranked among candidates)
    tiles = [
        draw(logits_BM[:, part], 10, scheme=scheme, seed=4, stream_ids=[7, 8], global_index=part)
        for part in everywhere.split([1, 30, 969, 2000, 3000])
    ]
    assert_equal_draws(merge_draws(tiles, 10), whole)
    half = merge_draws(tiles[:2], 10)
    assert_equal_draws(merge_draws([half, *tiles[2:]], 10), whole)
    assert_equal_draws(merge_draws(tiles, 6), draw(logits_BM, 6, scheme=scheme, seed=4, stream_ids=[7, 8]))


@given(
    spread=st.sampled_from([0.0, 1.0, 8.0, 300.0]),
    cuts=st.lists(st.integers(1, 699), min_size=1, max_size=4, unique=True),
    num_samples=st.integers(1, 12),
    seed=st.integers(0, 1 << 40),
)
@settings(max_examples=25, deadline=None)
def test_merging_is_exact_for_any_cut(spread, cuts, num_samples, seed):
    logits_BM = spread * torch.randn(1, 700, generator=torch.Generator().manual_seed(seed % 1000))
    whole = draw(logits_BM, num_samples, seed=seed)
    bounds = [0, *sorted(cuts), 700]
    tiles = []
    for start, stop in pairwise(bounds):
        part = torch.arange(start, stop)
        tiles.append(draw(logits_BM[:, start:stop], num_samples, seed=seed, global_index=part[None]))
    assert_equal_draws(merge_draws(tiles, num_samples), whole)


def test_indices_beyond_32_bits():
    part = torch.arange(5) + (1 << 33)
    drawn = draw(torch.zeros(1, 5), 2, global_index=part)
    assert bool((drawn.index >= 1 << 33).all())
    assert torch.equal(merge_draws([drawn], 2).index, drawn.index)


def test_bad_input():
    tile = draw(torch.zeros(1, 4), 2)
    other = draw(torch.zeros(1, 4), 2, global_index=torch.arange(4, 8))
    with pytest.raises(InputError, match="at least one"):
        merge_draws([], 2)
    with pytest.raises(InputError, match="2 samples; 3"):
        merge_draws([tile, other], 3)
    with pytest.raises(InputError, match="overlap"):
        merge_draws([tile, tile], 2)
    with pytest.raises(InputError, match="share"):
        merge_draws([tile, draw(torch.zeros(1, 4), 2, seed=1, global_index=torch.arange(4, 8))], 2)
    with pytest.raises(InputError, match="share"):
        merge_draws([tile, draw(torch.zeros(1, 4), 2, scheme="top", global_index=torch.arange(4, 8))], 2)
    with pytest.raises(InputError, match="balanced"):
        merge_draws([draw(torch.zeros(1, 4), 2, scheme="balanced", map_shape=(4,))], 2)
