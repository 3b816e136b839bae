"""Views kept by the process: read once, never stale, never writable, bounded."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import SlideError
from ats_stream.io import Pyramid, PyramidWriter, ngff, open_pyramid, views
from ats_stream.io.storage import stores
from ats_stream.io.views import VIEWS, ViewCache
from ats_stream.io.zarr_source import ZarrSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHAPES = [(3, 128, 96), (3, 64, 48)]
VIEW_BYTES = 3 * 64 * 48
NUM_CHUNKS = 4 * 3  # of the coarse level


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this test alone, that trusts files however young."""
    monkeypatch.setattr(stores, "YOUNG_NS", 0)
    VIEWS.clear()
    yield
    VIEWS.clear()


def write(target: Path, seed: int = 0, shapes: Any = SHAPES) -> Path:
    rng = np.random.default_rng(seed)
    with PyramidWriter(
        target, level_shapes=shapes, dtype="uint8", chunk_px=16, shard_px=32, overwrite=True
    ) as writer:
        for level, (_, height, width) in enumerate(shapes):
            for row, column in np.ndindex(-(-height // 32), -(-width // 32)):
                size = (3, min(32, height - row * 32), min(32, width - column * 32))
                writer.write_shard(level, (row, column), rng.integers(1, 255, size, dtype=np.uint8))
        writer.write_label("tissue", np.eye(64, 48, dtype=np.uint8), downsample=2)
    return target


def num_read(*pyramids: Pyramid) -> int:
    return sum(pyramid.read_stats(1).num_chunks for pyramid in pyramids)


def test_pyramids_of_one_image_share_its_view(tmp_path: Path) -> None:
    place = write(tmp_path / "a.zarr")
    one, other, third = (open_pyramid(place) for _ in range(3))
    expected = third.read(1)
    np.testing.assert_array_equal(one.view(1), expected)
    assert num_read(one) == NUM_CHUNKS
    for pyramid in (one, other, pickle.loads(pickle.dumps(one))):
        np.testing.assert_array_equal(pyramid.view(-1), expected)
    assert num_read(one, other) == NUM_CHUNKS
    other.view(1, cache_bytes=0)  # neither taken nor kept
    assert num_read(other) == NUM_CHUNKS
    np.testing.assert_array_equal(one.view(0), one.read(0))  # levels are kept apart
    assert VIEWS.num_bytes == 5 * VIEW_BYTES


def test_what_is_derived_is_kept_under_its_name(tmp_path: Path) -> None:
    pyramid = open_pyramid(write(tmp_path / "a.zarr"))
    calls = []

    def total(pixels: np.ndarray) -> np.ndarray:
        calls.append(pixels.shape)
        return pixels.sum(axis=0, dtype=np.int64)

    for _ in range(2):
        got = pyramid.view(1, derived=("total", total))
        np.testing.assert_array_equal(got, pyramid.read(1).sum(axis=0, dtype=np.int64))
    assert calls == [SHAPES[1]]
    np.testing.assert_array_equal(pyramid.view(1), pyramid.read(1))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_nobody_writes_into_what_is_kept(tmp_path: Path, cache_bytes: int) -> None:
    place = write(tmp_path / "a.zarr")
    for source in (place, np.zeros((3, 20, 30), np.uint8)):
        pyramid = open_pyramid(source)
        for derived in (None, ("first", lambda pixels: pixels[0]), ("new", lambda pixels: pixels + 1)):
            view = pyramid.view(-1, cache_bytes=cache_bytes, derived=derived)
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                view.flags.writeable = True


def overwrite_folder(place: Path) -> None:
    write(place, seed=1)


def overwrite_shards(place: Path) -> None:
    """Shards of another image under the same metadata, one of them removed."""
    for shard in sorted((write(place.with_name("b.zarr"), seed=1) / "1" / "c").rglob("*")):
        if shard.is_file():
            shutil.copyfile(
                shard, place / "1" / "c" / shard.relative_to(place.with_name("b.zarr") / "1" / "c")
            )
    (place / "1" / "c" / "0" / "0" / "0").unlink()


@pytest.mark.parametrize("overwrite", [overwrite_folder, overwrite_shards])
def test_an_image_that_was_overwritten_is_read_again(
    tmp_path: Path, overwrite: Callable[[Path], None]
) -> None:
    place = write(tmp_path / "a.zarr")
    before = open_pyramid(place, cache_bytes=1 << 20)
    old = before.view(1)
    before.read(1)  # chunks and indices are kept, too
    overwrite(place)
    expected = open_pyramid(place).read(1)
    assert not np.array_equal(expected, old)
    np.testing.assert_array_equal(before.view(1), expected)
    np.testing.assert_array_equal(open_pyramid(place).view(1), expected)


def test_an_absent_shard_that_appears_is_seen(tmp_path: Path) -> None:
    place = write(tmp_path / "a.zarr")
    shard = place / "1" / "c" / "0" / "1" / "0"
    hidden = shard.rename(tmp_path / "hidden")
    pyramid = open_pyramid(place)
    assert not pyramid.view(1)[:, 32:, :32].any()
    hidden.rename(shard)
    assert pyramid.view(1)[:, 32:, :32].all()


def test_an_image_of_the_same_place_but_other_metadata_is_another(tmp_path: Path) -> None:
    place = write(tmp_path / "a.zarr")
    before = open_pyramid(place)
    write(place, shapes=[(3, 128, 96), (3, 32, 24)])
    assert open_pyramid(place).view(1).shape == (3, 32, 24)
    assert open_pyramid(place).view(1).shape == (3, 32, 24)
    assert before.view(1).shape == before.levels[1].shape  # what it was opened as, as reading it gives


def test_a_file_written_a_moment_ago_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "YOUNG_NS", 10**18)
    pyramid = open_pyramid(write(tmp_path / "a.zarr"))
    for _ in range(2):
        np.testing.assert_array_equal(pyramid.view(1), pyramid.read(1))
    assert num_read(pyramid) == 4 * NUM_CHUNKS
    assert VIEWS.num_bytes == 0


def test_a_level_of_very_many_keys_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = open_pyramid(write(tmp_path / "a.zarr"))
    monkeypatch.setattr(views, "MAX_LOCAL_KEYS", 3)  # one fewer than its shards
    pyramid.view(1)
    assert VIEWS.num_bytes == 0
    monkeypatch.setattr(views, "MAX_LOCAL_KEYS", 4)
    pyramid.view(1)
    assert VIEWS.num_bytes == VIEW_BYTES


def test_arrays_in_memory_are_not_kept() -> None:
    array = np.zeros((3, 20, 30), np.uint8)
    pyramid = open_pyramid(array)
    assert not pyramid.view(0).any()
    array[:] = 1
    assert pyramid.view(0).all()


def test_members_of_a_zip_file_hold_as_long_as_it_does(tmp_path: Path) -> None:
    path = shutil.make_archive(str(tmp_path / "a"), "zip", write(tmp_path / "a.zarr"))
    one, other = open_pyramid(path), open_pyramid(path)
    for pyramid in (one, other, one):
        np.testing.assert_array_equal(pyramid.view(1), open_pyramid(tmp_path / "a.zarr").read(1))
    assert num_read(one, other) == NUM_CHUNKS
    shutil.make_archive(str(tmp_path / "a"), "zip", write(tmp_path / "a.zarr", seed=1))
    with pytest.raises(SlideError, match="changed since it was opened"):
        one.view(1)
    np.testing.assert_array_equal(open_pyramid(path).view(1), open_pyramid(tmp_path / "a.zarr").read(1))


def test_slides_read_in_place_are_kept_until_they_change(slide_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    shutil.copyfile(slide_path, path)
    one, other = open_pyramid(path), open_pyramid(path)
    expected = one.read(0)
    before = one.read_stats(0)
    for pyramid in (other, one):
        np.testing.assert_array_equal(pyramid.view(0), expected)
    assert one.read_stats(0) == before
    os.utime(path, ns=(1, 1))
    with pytest.raises(SlideError, match="changed since it was opened"):
        one.view(0)
    np.testing.assert_array_equal(open_pyramid(path).view(0), expected)


@pytest.mark.filterwarnings("ignore")  # zarr-python warns that this codec has no specification
@pytest.mark.parametrize("shards", [None, (3, 32, 32)])
def test_codecs_known_to_zarr_python_alone_are_kept_too(tmp_path: Path, shards: Any) -> None:
    from zarr.codecs.numcodecs import BZ2

    place = tmp_path / "a.zarr"
    attributes = ngff.build_image(name="x", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=None)
    zarr.create_group(str(place), attributes=attributes)
    pixels = np.random.default_rng(0).integers(0, 9, (3, 40, 30), dtype=np.uint8)
    array = zarr.create_array(
        str(place / "0"), data=pixels, chunks=(3, 16, 16), shards=shards, compressors=[BZ2()]
    )
    one, other = open_pyramid(place), open_pyramid(place)
    assert isinstance(one._reader.sources[0], ZarrSource)
    for pyramid in (one, other):
        np.testing.assert_array_equal(pyramid.view(0), pixels)
    assert other.read_stats(0).num_chunks == 0
    array[:, :2] = pixels[:, :2] = 77
    np.testing.assert_array_equal(other.view(0), pixels)


@pytest.mark.parametrize("name", ["a.zarr", "a.zip"])
def test_servers_are_asked_for_entity_tags(tmp_path: Path, serve: Any, name: str) -> None:
    folder = write(tmp_path / "a.zarr")
    shutil.make_archive(str(tmp_path / "a"), "zip", folder)
    server = serve(tmp_path)
    server.states_tags = True
    one, other = (open_pyramid(f"{server.url}/{name}") for _ in range(2))
    for pyramid in (one, other, one):
        np.testing.assert_array_equal(pyramid.view(1), open_pyramid(folder).read(1))
    assert num_read(one, other) == NUM_CHUNKS
    before = len(server.requests)
    one.view(1)
    assert len(server.requests) - before == (4 if name == "a.zarr" else 1)  # one head of each shard
    write(folder, seed=1)
    shutil.make_archive(str(tmp_path / "a"), "zip", folder)
    for pyramid in (one, open_pyramid(f"{server.url}/{name}")):
        np.testing.assert_array_equal(pyramid.view(1), open_pyramid(folder).read(1))


def test_what_a_server_does_not_tag_is_not_kept(tmp_path: Path, serve: Any) -> None:
    server = serve(write(tmp_path / "a.zarr"))
    pyramid = open_pyramid(server.url)
    for _ in range(2):
        np.testing.assert_array_equal(pyramid.view(1), open_pyramid(tmp_path / "a.zarr").read(1))
    assert num_read(pyramid) == 2 * NUM_CHUNKS
    assert VIEWS.num_bytes == 0


def test_a_server_that_refuses_is_an_error_of_reading(tmp_path: Path, serve: Any) -> None:
    server = serve(write(tmp_path / "a.zarr"))
    pyramid = open_pyramid(server.url)
    server.fault = lambda path, count: 403
    with pytest.raises(SlideError, match=r"level 1: access to .* is denied: the server answered 403"):
        pyramid.view(1)


def test_threads_that_ask_at_once_make_it_once() -> None:
    cache, started, go = ViewCache(), threading.Event(), threading.Event()
    made = []

    def make() -> np.ndarray:
        started.set()
        assert go.wait(60)
        made.append(np.arange(3))
        return made[-1]

    def get(_: int) -> np.ndarray:
        return cache.get("a", 1, make, max_bytes=max_bytes)

    for max_bytes in (1 << 10, 0):  # be it kept or not
        cache.clear()
        made.clear()
        started.clear()
        go.clear()
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(get, 0)
            assert started.wait(60)
            others = [pool.submit(get, n) for n in range(3)]
            # another key does not wait for the first one
            cache.get("b", 1, lambda: np.zeros(1), max_bytes=max_bytes)
            go.set()
            results = [future.result(60) for future in (first, *others)]
        assert all(result.tolist() == [0, 1, 2] for result in results)
        if max_bytes:
            assert len(made) == 1


def test_a_failure_is_that_of_its_caller_alone() -> None:
    cache, started, go = ViewCache(), threading.Event(), threading.Event()

    def fail() -> np.ndarray:
        started.set()
        assert go.wait(60)
        raise OSError("gone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", 1, fail, max_bytes=99)
        assert started.wait(60)
        second = pool.submit(cache.get, "a", 1, lambda: np.ones(2), max_bytes=99)
        go.set()
        with pytest.raises(OSError, match="gone"):
            first.result(60)
        assert second.result(60).tolist() == [1, 1]
    assert cache.get("a", 1, fail, max_bytes=99).tolist() == [1, 1]


@given(st.integers(0, 12), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1))))
def test_what_was_used_longest_ago_goes_first_and_the_bound_holds(
    max_bytes: int, asked: list[tuple[int, int]]
) -> None:
    cache = ViewCache()
    kept: dict[int, int] = {}  # stamp by key, oldest first; key n takes n bytes
    for key, stamp in asked:
        made = []
        cache.get(
            key,
            stamp,
            lambda key=key, made=made: made.append(1) or np.zeros(key, np.uint8),
            max_bytes=max_bytes,
        )
        assert bool(made) == (kept.get(key) != stamp)
        kept.pop(key, None)
        if key <= max_bytes:
            kept[key] = stamp
        while sum(kept) > max_bytes:
            del kept[next(iter(kept))]
        assert cache.num_bytes == sum(kept) <= max_bytes


def test_a_child_made_by_a_fork_begins_anew(tmp_path: Path) -> None:
    pyramid = open_pyramid(write(tmp_path / "a.zarr"))
    expected = pyramid.view(1).tobytes()
    with VIEWS._lock:  # as another thread may hold it at that moment
        pid = os.fork()
        if pid == 0:
            os._exit(
                0 if pyramid.view(1).tobytes() == expected and num_read(pyramid) == 2 * NUM_CHUNKS else 1
            )
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
