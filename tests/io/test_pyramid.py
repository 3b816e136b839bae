from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.io import PyramidWriter, open_pyramid, read_batch
from ats_stream.io.reduce import halve, shrink
from ats_stream.io.shard import parse_index

SHAPE = (3, 201, 330)


@pytest.fixture(scope="module")
def store(tmp_path_factory, picture):
    """Three levels with absent chunks, chunks of 16 px in shards of 64 px."""
    levels = [picture(SHAPE)]
    levels[0][:, 64:128, 100:200] = 0
    levels += [halve(levels[0])]
    levels += [halve(levels[1])]
    target = tmp_path_factory.mktemp("pyramid") / "slide.zarr"
    with PyramidWriter(
        target,
        level_shapes=[v.shape for v in levels],
        downsamples=[1, 2, 4],
        dtype="uint8",
        pixel_size_um=0.25,
        chunk_px=16,
        shard_px=64,
    ) as writer:
        for number, level in enumerate(levels):
            for row, column in np.ndindex(4, 6):
                block = level[:, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
                if block.size:
                    writer.write_shard(number, (row, column), block)
    return target, levels


@pytest.fixture(scope="module")
def opened(store):
    return open_pyramid(store[0])


def padded_patches(level, offsets, size, fill):
    pad = 600  # more than any offset and size reach outside
    padded = np.pad(level, ((0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return np.stack([padded[:, y + pad : y + pad + size[0], x + pad : x + pad + size[1]] for y, x in offsets])


@given(
    level=st.integers(0, 2),
    offsets=st.lists(st.tuples(st.integers(-150, 300), st.integers(-150, 400)), min_size=1, max_size=12),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    fill=st.integers(0, 255),
)
def test_patches_equal_numpy_on_the_whole_level(store, opened, level, offsets, size, fill):
    got = opened.read_patches(level, offsets, size, fill=fill)
    np.testing.assert_array_equal(got, padded_patches(store[1][level], offsets, size, fill))


@given(data=st.data(), level=st.integers(0, 2))
def test_boxes_equal_numpy(store, opened, data, level):
    whole = store[1][level]
    start = [data.draw(st.integers(0, n)) for n in whole.shape]
    stop = [data.draw(st.integers(a, n)) for a, n in zip(start, whole.shape, strict=True)]
    expected = whole[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    np.testing.assert_array_equal(opened.read(level, start, stop), expected)


def test_whole_levels_equal_zarr_python(store, opened):
    for number in range(3):
        theirs = zarr.open_array(str(store[0] / str(number)), mode="r")[:]
        np.testing.assert_array_equal(opened.read(number), theirs)
        np.testing.assert_array_equal(opened.dask(number).compute(), theirs)
    part = opened.dask(0)[1:, 10:200:3, 300:4:-7].compute()
    np.testing.assert_array_equal(part, store[1][0][1:, 10:200:3, 300:4:-7])


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_no_pixel(store, opened, num_threads):
    threaded = open_pyramid(store[0], num_threads=num_threads)
    np.testing.assert_array_equal(threaded.read(0), store[1][0])
    assert threaded.read_stats(0).num_chunks == 13 * 21
    offsets = np.random.default_rng(0).integers(-30, 330, (20, 2))
    np.testing.assert_array_equal(
        threaded.read_patches(0, offsets, (40, 50)), opened.read_patches(0, offsets, (40, 50))
    )
    with pytest.raises(InputError, match="num_threads 1 or more, got 0, 0"):
        open_pyramid(store[0], num_threads=0)


def test_levels_say_what_they_are(opened):
    assert opened.axes == ("c", "y", "x")
    assert opened.name == "slide"
    assert [v.shape for v in opened.levels] == [(3, 201, 330), (3, 101, 165), (3, 51, 83)]
    assert [v.downsample for v in opened.levels] == [(1, 1), (2, 2), (4, 4)]
    assert [v.pixel_size_um for v in opened.levels] == [(0.25, 0.25), (0.5, 0.5), (1.0, 1.0)]
    assert {v.chunk_shape for v in opened.levels} == {(3, 16, 16)}
    assert opened.levels[opened.levels[1]] is opened.levels[1]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({"downsample": 1}, 0),
        ({"downsample": 2}, 1),
        ({"downsample": 3}, 2),
        ({"downsample": 99}, 2),
        ({"pixel_size_um": 0.1}, 0),
        ({"pixel_size_um": 0.45}, 1),
        ({"pixel_size_um": 1}, 2),
    ],
)
def test_level_for_takes_the_nearest_in_ratio(opened, wanted, index):
    assert opened.level_for(**wanted).index == index


@pytest.mark.parametrize(
    "wanted", [{}, {"downsample": 1, "pixel_size_um": 1}, {"downsample": 0}, {"pixel_size_um": -1}]
)
def test_level_for_refuses_what_makes_no_sense(opened, wanted):
    with pytest.raises(InputError):
        opened.level_for(**wanted)
    with pytest.raises(InputError, match="pixel size is unknown"):
        open_pyramid(np.zeros((1, 4, 4), np.uint8)).level_for(pixel_size_um=1)


@pytest.mark.parametrize(
    ("offsets", "size", "says"),
    [
        ([[0, 0, 0]], (4, 4), r"integers \(N, 2\)"),
        ([[0.5, 0]], (4, 4), "float64"),
        ([[0, 0]], (4,), "2 positive numbers"),
        ([[0, 0]], (0, 4), "2 positive numbers"),
    ],
)
def test_patch_requests_that_do_not_fit_are_named(opened, offsets, size, says):
    with pytest.raises(InputError, match=says):
        opened.read_patches(0, offsets, size)


def test_other_requests_that_do_not_fit_are_named(opened):
    with pytest.raises(InputError, match="no level 3, there are 3"):
        opened.read_patches(3, [[0, 0]], (4, 4))
    with pytest.raises(InputError, match="does not lie in level 0"):
        opened.read(0, (0, 0, 0), (3, 202, 10))
    with pytest.raises(InputError, match="no label 'tissue'"):
        opened.label("tissue")
    with pytest.raises(InputError, match=r"out must be uint8 \(1, 3, 4, 4\)"):
        opened.read_patches(0, [[0, 0]], (4, 4), out=np.empty((1, 3, 4, 5), np.uint8))


def test_no_patches_and_out(opened, store):
    assert opened.read_patches(0, [], (4, 5)).shape == (0, 3, 4, 5)
    out = np.full((2, 3, 8, 8), 77, np.uint8)
    assert opened.read_patches(0, [[0, 0], [197, 326]], (8, 8), out=out) is out
    np.testing.assert_array_equal(out, padded_patches(store[1][0], [(0, 0), (197, 326)], (8, 8), 0))


def test_every_chunk_is_read_once_per_call_and_counts_only_grow(store):
    pyramid = open_pyramid(store[0])
    pyramid.read_patches(0, [[0, 0]] * 9, (16, 16))
    stats = pyramid.read_stats(0)
    assert (stats.num_chunks, stats.decoded_bytes) == (1, 3 * 16 * 16)
    index = parse_index((store[0] / "0" / "c" / "0" / "0" / "0").read_bytes(), (1, 4, 4))
    assert stats.stored_bytes == index[0, 0, 0, 1]
    # the second read meets an absent chunk: looked at, nothing stored
    pyramid.read_patches(0, [[80, 112]], (16, 16))
    assert pyramid.read_stats(0).num_chunks == 2
    assert pyramid.read_stats(0).stored_bytes == stats.stored_bytes
    assert pyramid.read_stats(1).num_chunks == 0
    pyramid.read_patches(0, [[-50, -50]], (16, 16))
    assert pyramid.read_stats(0).num_chunks == 2


def test_the_cache_serves_the_same_pixels_without_reading(store):
    pyramid = open_pyramid(store[0], cache_bytes=1 << 20)
    first = pyramid.read_patches(0, [[5, 5], [30, 60]], (40, 40))
    before = pyramid.read_stats(0)
    np.testing.assert_array_equal(pyramid.read_patches(0, [[5, 5], [30, 60]], (40, 40)), first)
    assert pyramid.read_stats(0) == before
    # a cache of one chunk keeps to its size and still gives the right pixels
    small = open_pyramid(store[0], cache_bytes=3 * 16 * 16)
    for _ in range(2):
        np.testing.assert_array_equal(small.read_patches(0, [[5, 5], [30, 60]], (40, 40)), first)
    assert small.read_stats(0).num_chunks == 2 * before.num_chunks - 1


def test_a_pickled_pyramid_reads_on(store):
    pyramid = open_pyramid(store[0], cache_bytes=1000)
    pyramid.read(0)
    copy = pickle.loads(pickle.dumps(pyramid))
    assert copy.read_stats(0).num_chunks == 0
    np.testing.assert_array_equal(copy.read(0), store[1][0])
    assert copy.levels == pyramid.levels
    assert len(pickle.dumps(pyramid)) < 5000


def test_threads_share_a_pyramid(store):
    pyramid = open_pyramid(store[0], cache_bytes=20_000, num_threads=2)
    rng = np.random.default_rng(0)
    requests = rng.integers(-30, 330, (40, 5, 2))
    start = threading.Barrier(4)

    def read(part):
        start.wait()
        return [pyramid.read_patches(0, offsets, (33, 20)) for offsets in requests[part::4]]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(4)))
    for part, patches in enumerate(results):
        for offsets, got in zip(requests[part::4], patches, strict=True):
            np.testing.assert_array_equal(got, padded_patches(store[1][0], offsets, (33, 20), 0))


def test_a_shard_replaced_by_another_is_read_anew(tmp_path):
    def write(value):
        with PyramidWriter(
            tmp_path / "a", level_shapes=[(1, 32, 32)], dtype="uint8", chunk_px=8, shard_px=32, overwrite=True
        ) as writer:
            writer.write_chunks(0, {(value, 0): np.full((1, 8, 8), value + 1, np.uint8)})

    write(0)
    pyramid = open_pyramid(tmp_path / "a")
    assert pyramid.read(0).max() == 1
    write(3)
    assert pyramid.read(0)[0, 24, 0] == 4
    assert pyramid.read(0)[0, 0, 0] == 0


@pytest.mark.parametrize("max_px", [10, 40, 83, 100, 165, 1000])
def test_thumbnails_are_means_that_fit(store, opened, max_px):
    thumbnail = opened.thumbnail(max_px)
    assert max(thumbnail.shape[1:]) <= max_px
    level = next((v for v in reversed(store[1]) if max(v.shape) >= max_px), store[1][0])
    np.testing.assert_array_equal(thumbnail, shrink(level, -(-level.shape[2] // max_px)))


def test_thumbnails_do_not_read_everything_where_levels_leave_a_gap(tmp_path):
    with PyramidWriter(
        tmp_path / "a.zarr", level_shapes=[(1, 640, 640), (1, 20, 20)], dtype="uint8"
    ) as writer:
        writer.write_shard(1, (0, 0), np.arange(400, dtype=np.uint8).reshape(1, 20, 20))
    pyramid = open_pyramid(tmp_path / "a.zarr")
    np.testing.assert_array_equal(pyramid.thumbnail(60), pyramid.read(1))
    assert pyramid.read_stats(0).num_chunks == 0
    assert pyramid.thumbnail(80).shape == (1, 80, 80)


def test_thumbnails_read_in_strips_are_the_same(store, opened, monkeypatch):
    whole = opened.thumbnail(30)
    monkeypatch.setattr("ats_stream.io.pyramid.THUMBNAIL_STRIP_PX", 1000)
    np.testing.assert_array_equal(opened.thumbnail(30), whole)


@pytest.mark.parametrize("shape", [(1, 5, 7), (4, 300, 520), (2, 3, 40, 50)])
def test_arrays_in_memory(shape):
    array = np.random.default_rng(0).integers(0, 60_000, shape).astype(np.uint16)
    pyramid = open_pyramid(array)
    assert pyramid.axes == (("c", "y", "x") if len(shape) == 3 else ("c", "z", "y", "x"))
    np.testing.assert_array_equal(pyramid.read(0), array)
    size = tuple(n // 2 + 1 for n in shape[1:])
    offset = [-1] * (len(shape) - 1)
    got = pyramid.read_patches(0, [offset], size, fill=3)[0]
    inside = tuple(slice(1, None) for _ in size)
    np.testing.assert_array_equal(
        got[(slice(None), *inside)], array[(slice(None), *(slice(0, s - 1) for s in size))]
    )
    assert (got[:, 0] == 3).all()


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((0, 4, 4)), np.zeros((1, 2, 2), "U3")])
def test_arrays_that_are_no_image_are_refused(array):
    with pytest.raises(InputError, match=r"array pyramid (must be numbers|are c, then)"):
        open_pyramid(array)


def test_a_batch_spans_images(store, opened):
    other = open_pyramid(store[1][1])
    got = read_batch([(opened, 0, [[3, 4], [-5, 6]]), (other, 0, [[7, 8]])], (12, 13), fill=1)
    np.testing.assert_array_equal(got[:2], padded_patches(store[1][0], [(3, 4), (-5, 6)], (12, 13), 1))
    np.testing.assert_array_equal(got[2:], padded_patches(store[1][1], [(7, 8)], (12, 13), 1))
    with pytest.raises(InputError, match="different dtype and channels"):
        read_batch(
            [(opened, 0, [[0, 0]]), (open_pyramid(np.zeros((1, 9, 9), np.uint8)), 0, [[0, 0]])], (2, 2)
        )
    with pytest.raises(InputError, match="at least one"):
        read_batch([], (2, 2))


def test_a_box_is_read_into_memory_that_is_given(store):
    pyramid = open_pyramid(store[0])
    level = pyramid.levels[0]
    out = np.zeros(level.shape, level.dtype)
    assert np.shares_memory(pyramid.read(0, out=out), out)
    assert np.array_equal(out, pyramid.read(0))
    with pytest.raises(InputError, match="out must be"):
        pyramid.read(0, out=out[:, 1:])
    with pytest.raises(InputError, match="out must be"):
        pyramid.read(0, out=out.astype(np.uint16))


def test_of_a_box_read_once_the_cache_keeps_chunks_that_reach_out_of_it(store):
    pyramid = open_pyramid(store[0], cache_bytes=1 << 20)
    whole = open_pyramid(store[0]).read(0)
    rows, columns = pyramid.levels[0].chunk_shape[1:]
    start, stop = (0, 0, 0), (3, rows, columns + 1)
    assert np.array_equal(pyramid.read(0, start, stop, is_once=True), whole[:, :rows, : columns + 1])
    assert pyramid.read_stats(0).num_chunks == 2
    # the second chunk comes from the cache, the first does not
    assert np.array_equal(pyramid.read(0, start, stop), whole[:, :rows, : columns + 1])
    assert pyramid.read_stats(0).num_chunks == 3
    assert np.array_equal(pyramid.read(0, start, stop), whole[:, :rows, : columns + 1])
    assert pyramid.read_stats(0).num_chunks == 3


def test_chunks_cut_off_at_the_edge_count_as_whole_in_a_box_read_once(store):
    pyramid = open_pyramid(store[0], cache_bytes=1 << 20)
    level = pyramid.levels[0]
    assert any(n % c for n, c in zip(level.shape, level.chunk_shape, strict=True))
    pyramid.read(0, is_once=True)
    num_chunks = pyramid.read_stats(0).num_chunks
    pyramid.read(0, is_once=True)
    assert pyramid.read_stats(0).num_chunks == 2 * num_chunks
