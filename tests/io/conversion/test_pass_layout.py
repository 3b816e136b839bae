from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.io.conversion.pass_layout import ShardSize, tiles_per_shard


@given(rows=st.integers(1, 400), columns=st.integers(1, 400), wanted=st.integers(1, 10**5))
def test_shards_have_as_many_tiles_as_asked_for(rows, columns, wanted):
    down, across = tiles_per_shard((rows, columns), wanted)
    assert 1 <= down <= rows
    assert 1 <= across <= columns
    assert down * across <= wanted
    # no fewer than must be, but for cutting the level into equal parts
    assert down * across == rows * columns or 8 * down * across >= wanted
    # the last ones are not much smaller than the others
    for n, k in ((rows, down), (columns, across)):
        assert n % k == 0 or n % k > k - -(-n // k)


@pytest.mark.parametrize(
    ("size", "depth", "expected"),
    [
        ({"nbytes": 100_000}, 1, (10, 10)),
        ({"nbytes": 100_000}, 4, (5, 5)),
        ({"nbytes": 1}, 1, (1, 1)),
        ({"nbytes": 1 << 40}, 1, (20, 20)),
        ({"nbytes": 1 << 40, "max_px": 64 * 64 * 25}, 1, (5, 5)),
        ({"nbytes": 1 << 40, "max_px": 1}, 1, (1, 1)),
        ({"nbytes": 1, "side_px": 300}, 1, (4, 4)),
        ({"nbytes": 1, "side_px": 10}, 1, (1, 1)),
        ({"nbytes": 1, "side_px": 1 << 20}, 1, (20, 20)),
        ({"nbytes": 1, "side_px": 300, "max_px": 64 * 64 * 8}, 1, (2, 4)),
        ({"nbytes": 1 << 40}, 1 << 20, (2, 2)),
        ({"nbytes": 1 << 40}, 1 << 30, (1, 1)),
    ],
)
def test_sizes_in_bytes_and_pixels(size, depth, expected):
    assert ShardSize(**size).tiles((20, 20), (64, 64), depth=depth, tile_bytes=1000.0) == expected


@given(
    grid=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    nbytes=st.integers(1, 1000),
    side=st.none() | st.integers(1, 100),
)
def test_sides_of_several_shards_are_even(grid, tile, nbytes, side):
    counts = ShardSize(nbytes=nbytes, side_px=side).tiles(grid, tile, depth=1, tile_bytes=10)
    for count, num, px in zip(counts, grid, tile, strict=True):
        assert 1 <= count <= num
        assert count == num or count * px % 2 == 0
