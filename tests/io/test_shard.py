from __future__ import annotations

import struct

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from ats_stream.io.shard import (
    ABSENT,
    check_index,
    encode_shard,
    encode_shard_parts,
    index_nbytes,
    parse_index,
)


@st.composite
def shards(draw):
    grid = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    places = list(np.ndindex(*grid))
    chosen = draw(st.lists(st.sampled_from(places), unique=True))
    return grid, {place: draw(st.binary(min_size=1, max_size=40)) for place in chosen}


@given(shards())
def test_every_chunk_is_found_where_the_index_says(shard):
    grid, chunks = shard
    data = encode_shard(chunks, grid)
    index = parse_index(data, grid)
    found = {}
    for place in np.ndindex(*grid):
        offset, size = (int(v) for v in index[place])
        if offset == ABSENT:
            assert size == ABSENT
        else:
            found[place] = data[offset : offset + size]
    assert found == chunks
    assert len(data) == sum(map(len, chunks.values())) + index_nbytes(grid)
    assert b"".join(encode_shard_parts(chunks, grid)) == data
    check_index(index, len(data) - index_nbytes(grid))


def test_the_same_bytes_as_zarr_python():
    chunks = {(0, 1): bytes(range(16)), (1, 0): bytes(range(100, 116)), (1, 2): bytes(range(50, 66))}
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(8, 12), shards=(8, 12), chunks=(4, 4), dtype="uint8", compressors=None, fill_value=0
    )
    whole = np.zeros((8, 12), np.uint8)
    for (row, column), data in chunks.items():
        whole[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = np.frombuffer(data, np.uint8).reshape(
            4, 4
        )
    array[:] = whole
    # the order of chunks inside a shard is free, so compare what the indices lead to
    theirs = next(v.to_bytes() for k, v in store._store_dict.items() if k.endswith("c/0/0"))
    index = parse_index(theirs, (2, 3))
    assert {
        place: theirs[int(index[place][0]) : int(index[place][0] + index[place][1])]
        for place in np.ndindex(2, 3)
        if index[place][0] != ABSENT
    } == chunks


def test_a_place_outside_of_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 0\) lies outside"):
        encode_shard({(2, 0): b"x"}, (2, 2))


@given(shards(), st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_of_the_index_is_noticed(shard, where, change):
    grid, chunks = shard
    data = bytearray(encode_shard(chunks, grid))
    data[len(data) - 1 - where % index_nbytes(grid)] ^= change
    with pytest.raises(ValueError, match="damaged"):
        parse_index(bytes(data), grid)


def test_too_few_bytes_are_noticed():
    data = encode_shard({(0,): b"abc"}, (4,))
    with pytest.raises(ValueError, match="truncated shard: 67 bytes, its index alone has 68"):
        parse_index(data[-67:], (4,))


@pytest.mark.parametrize(
    "entry",
    [(0, 11), (11, 0), (4, 7), (2**64 - 2, 4), (2**63, 2**63)],
    ids=["size", "offset", "sum", "wrap", "wrap2"],
)
def test_an_index_that_points_outside_is_refused(entry):
    index = np.frombuffer(struct.pack("<4Q", 0, 10, *entry), "<u8").reshape(2, 2)
    with pytest.raises(ValueError, match="points past its 10 bytes"):
        check_index(index.astype(np.uint64), 10)
