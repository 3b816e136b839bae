from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.io import plan_patches


@st.composite
def requests(draw):
    ndim = draw(st.integers(1, 3))
    sizes = st.integers(1, 9)
    chunk = [draw(sizes) for _ in range(ndim)]
    shard = [c * draw(st.integers(1, 3)) for c in chunk]
    shape = [draw(st.integers(1, 30)) for _ in range(ndim)]
    size = [draw(st.integers(1, 14)) for _ in range(ndim)]
    offsets = draw(st.lists(st.tuples(*[st.integers(-20, 40)] * ndim), max_size=6))
    return shape, chunk, shard, np.array(offsets, np.int64).reshape(-1, ndim), size


@given(requests())
def test_pieces_cover_exactly_what_is_inside_and_every_chunk_comes_once(request_):
    shape, chunk, shard, offsets, size = request_
    plan = plan_patches(shape, chunk, shard, offsets, size)
    level = np.arange(np.prod(shape)).reshape(shape)
    pad = [60] * len(shape)
    padded = np.pad(level, [(p, p) for p in pad], constant_values=-1)
    expected = np.full((len(offsets), *size), -1)
    for n, offset in enumerate(offsets):
        expected[n] = padded[tuple(slice(o + 60, o + 60 + s) for o, s in zip(offset, size, strict=True))]
    got = np.full_like(expected, -1)
    count = np.zeros_like(expected)
    for k in range(plan.num_chunks):
        start = plan.chunks[k] * chunk
        for p in range(plan.first_piece[k], plan.first_piece[k + 1]):
            source = start + plan.piece_source[p]
            what = tuple(slice(a, a + b) for a, b in zip(source, plan.piece_size[p], strict=True))
            where = tuple(
                slice(a, a + b) for a, b in zip(plan.piece_target[p], plan.piece_size[p], strict=True)
            )
            assert (plan.piece_source[p] + plan.piece_size[p] <= chunk).all()
            got[(plan.piece_patch[p], *where)] = level[what]
            count[(plan.piece_patch[p], *where)] += 1
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(count, expected >= 0)
    np.testing.assert_array_equal(plan.outside, (expected < 0).any(axis=tuple(range(1, expected.ndim))))
    assert len({tuple(c) for c in plan.chunks}) == plan.num_chunks


@given(requests())
def test_chunks_are_grouped_by_shard(request_):
    shape, chunk, shard, offsets, size = request_
    plan = plan_patches(shape, chunk, shard, offsets, size)
    per_shard = np.array(shard) // chunk
    assert plan.first_chunk[0] == 0
    assert plan.first_chunk[-1] == plan.num_chunks
    for s, place in enumerate(plan.shards):
        members = plan.chunks[plan.first_chunk[s] : plan.first_chunk[s + 1]]
        assert len(members) > 0
        assert (members // per_shard == place).all()
    assert len({tuple(s) for s in plan.shards}) == len(plan.shards)


def test_offsets_far_outside_need_nothing():
    far = np.iinfo(np.int64).max
    plan = plan_patches((100, 100), (10, 10), (50, 50), [[far, 0], [-far, 5]], (7, 7))
    assert plan.num_chunks == 0
    assert plan.outside.tolist() == [True, True]
