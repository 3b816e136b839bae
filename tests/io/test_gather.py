"""Reading at once from a store that counts, delays and fails as told."""

from __future__ import annotations

import itertools
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import InputError, ReadCancelledError, SlideError
from ats_stream.io import PyramidWriter, open_pyramid, read_batch
from ats_stream.io.gather import GatherConfig
from ats_stream.io.opening import open_inside
from ats_stream.io.plan import coalesce
from ats_stream.io.shard import index_nbytes
from ats_stream.io.storage.retry import RetryPolicy, with_retries
from ats_stream.io.storage.store_error import MissingKeyError, StoreError, TransientError
from ats_stream.io.storage.stores import LocalStore

CHUNK, SHARD, SIDE = 16, 64, 192
GRID = (1, 4, 4)


class FakeStore:
    """A folder that passes for remote: records what is read, and asks ``fault`` before each read."""

    is_remote = True

    def __init__(self, folder, fault=lambda key, count: None, *, max_retries=2):
        self.inner, self.fault = LocalStore(folder), fault
        self.policy = RetryPolicy(max_retries=max_retries, first_delay_s=0, max_delay_s=0)
        self.reads, self.lock = [], threading.Lock()

    @property
    def identity(self):
        return ("fake", self.inner.identity)

    def place(self, key):
        return f"fake://bucket/{key}"

    def open(self, key):
        return FakeBlob(self, key)

    def get(self, key, max_bytes):
        return self.inner.get(key, max_bytes)

    def size(self, key):
        return self.inner.size(key)

    def shard_reads(self, kind):
        return [read for read in self.reads if read[1] == kind]


class FakeBlob:
    stamp = None

    def __init__(self, store, key):
        self.store, self.key = store, key

    def _do(self, kind, start, nbytes, read):
        with self.store.lock:
            self.store.reads.append((self.key, kind, start, nbytes))
            count = len(self.store.reads)
        told = self.store.fault(self.key, count)
        blob = self.store.inner.open(self.key)
        if blob is None:
            raise MissingKeyError(self.key)
        with blob:
            result = read(blob)
        return result[:-1] if told == "short" else result

    def read(self, start, nbytes):
        return self._do("range", start, nbytes, lambda blob: blob.read(start, nbytes))

    def tail(self, nbytes):
        return self._do("tail", 0, nbytes, lambda blob: blob.tail(nbytes))

    def whole(self, max_bytes):
        return self._do("whole", 0, max_bytes, lambda blob: blob.whole(max_bytes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("gather") / "slide.zarr"
    rng = np.random.default_rng(0)
    with PyramidWriter(
        target, level_shapes=[(3, SIDE, SIDE), (3, 96, 96)], dtype="uint8", chunk_px=CHUNK, shard_px=SHARD
    ) as writer:
        for place in np.ndindex(3, 3):
            if place != (2, 2):
                writer.write_shard(0, place, rng.integers(1, 255, (3, SHARD, SHARD), dtype=np.uint8))
    return target


@pytest.fixture(scope="module")
def level(folder):
    return open_pyramid(folder).read(0)


def opened(store, **options):
    return open_inside(store, "", **{"cache_bytes": 0, "num_threads": 1, **options})


@given(
    offsets=st.lists(st.tuples(st.integers(-60, 220), st.integers(-60, 220)), min_size=1, max_size=9),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    num_threads=st.sampled_from([1, 2]),
    cache_bytes=st.sampled_from([0, 10_000]),
    passing=st.sets(st.integers(1, 20), max_size=6),
    kind=st.sampled_from(["error", "short", "slow"]),
)
def test_patches_are_those_of_the_folder_whatever_fails_in_passing(
    folder, offsets, size, num_threads, cache_bytes, passing, kind
):
    def fault(key, count):
        if count not in passing:
            return None
        if kind == "error":
            raise TransientError("busy")
        if kind == "slow":
            threading.Event().wait(0.002)
        return kind if "c/" in key else None

    store = FakeStore(folder, fault, max_retries=6)
    pyramid = opened(store, num_threads=num_threads, cache_bytes=cache_bytes)
    plain = open_pyramid(folder)
    if kind == "short":
        store.fault = lambda key, count: (
            "short" if count in passing and store.reads[-1][1] == "range" else None
        )
    for _ in range(2):
        got = pyramid.read_patches(0, offsets, size, fill=7)
        np.testing.assert_array_equal(got, plain.read_patches(0, offsets, size, fill=7))


def test_indices_are_read_once_and_ranges_are_joined(folder, level):
    store = FakeStore(folder)
    pyramid = opened(store)
    np.testing.assert_array_equal(pyramid.read(0), level)
    # one index for each shard (the absent one says so there), one request for the chunks of each
    assert len(store.shard_reads("tail")) == 9
    assert {read[3] for read in store.shard_reads("tail")} == {index_nbytes(GRID)}
    assert len(store.shard_reads("range")) == 8
    store.reads.clear()
    pyramid.read_patches(0, [[0, 0]], (CHUNK, CHUNK))
    assert [read[1] for read in store.reads] == ["range"]
    # the index of an absent shard is asked for again: the shard may have been written meanwhile
    store.reads.clear()
    pyramid.read_patches(0, [[180, 180]], (8, 8))
    assert [read[1] for read in store.reads] == ["tail"]


def test_a_batch_reads_each_chunk_once_over_images_and_requests(folder, level):
    store = FakeStore(folder)
    one, other = opened(store), opened(store)
    out = np.zeros((5, 3, 8, 8), np.uint8)
    offsets = [[4, 4], [5, 5]]
    got = read_batch(
        [(one, 0, offsets), (other, 0, offsets[:1]), (one, 0, [[-4, 4], [100, 0]])], (8, 8), out=out
    )
    assert got is out
    for patch, (y, x) in zip(out, [*offsets, offsets[0]], strict=False):
        np.testing.assert_array_equal(patch, level[:, y : y + 8, x : x + 8])
    np.testing.assert_array_equal(out[3, :, 4:], level[:, :4, 4:12])
    assert not out[3, :, :4].any()
    np.testing.assert_array_equal(out[4], level[:, 100:108, :8])
    # two shards; the chunks of the first lie next to each other
    assert len(store.shard_reads("tail")) == 2
    assert len(store.shard_reads("range")) == 2
    assert one.read_stats(0).num_chunks == 2
    assert other.read_stats(0).num_chunks == 0


def test_all_shards_are_asked_at_once(folder):
    barrier = threading.Barrier(9)

    def fault(key, count):
        if 1 <= count <= 9:  # the nine indices: none is answered before all are asked for
            barrier.wait(20)

    store = FakeStore(folder, fault)
    pyramid = opened(store)
    store.reads.clear()
    assert pyramid.read(0).any()
    assert not barrier.broken


@pytest.mark.parametrize("max_bytes", [1, 3000, 1 << 20])
def test_bytes_in_flight_are_bounded(folder, level, monkeypatch, max_bytes):
    config = GatherConfig(max_inflight_bytes=max_bytes, gap_bytes=0, max_request_bytes=1, max_requests=7)
    monkeypatch.setattr("ats_stream.io.fetch.gather", lambda wants, cancel: gather(wants, config, cancel))
    from ats_stream.io.gather import gather

    held, most, lock = [0], [0], threading.Lock()

    def fault(key, count):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        threading.Event().wait(0.001)
        with lock:
            held[0] -= 1

    pyramid = opened(FakeStore(folder, fault))
    np.testing.assert_array_equal(pyramid.read(0), level)
    # a chunk of 16 x 16 x 3 pixels of noise takes 768 bytes and some, an index 260
    assert most[0] <= {1: 1, 3000: 7, 1 << 20: 7}[max_bytes]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_failure_is_one_line_and_stops_the_rest(folder, num_threads):
    def fault(key, count):
        if key.endswith("0/1"):
            raise StoreError(f"cannot read {key}: access is denied")

    store = FakeStore(folder, fault)
    pyramid = opened(store, num_threads=num_threads)
    with pytest.raises(SlideError, match=r"^fake://bucket/: level 0: cannot read c/0/0/1: access is denied$"):
        pyramid.read(0)
    assert pyramid.read_stats(0).num_chunks == 0


def test_failures_that_do_not_pass_are_told_with_their_number_of_tries(folder):
    def fault(key, count):
        raise TransientError("cannot read c/0/0/0: the server answered 503")

    store = FakeStore(folder, fault, max_retries=3)
    with pytest.raises(SlideError, match=r"answered 503 \(4 tries\)"):
        opened(store).read_patches(0, [[0, 0]], (4, 4))
    assert len(store.reads) == 4


def test_short_reads_that_stay_short_are_told(folder):
    store = FakeStore(folder, max_retries=1)
    store.fault = lambda key, count: "short" if store.reads[-1][1] == "range" else None
    with pytest.raises(SlideError, match=r"c/0/0/0 is truncated: \d+ of \d+ bytes from 0 \(2 tries\)"):
        opened(store).read_patches(0, [[0, 0]], (4, 4))


def test_a_shard_that_disappears_is_no_empty_shard(folder):
    def fault(key, count):
        if count == 2:
            raise MissingKeyError(key)

    with pytest.raises(SlideError, match="c/0/0/0 disappeared after its index was read"):
        opened(FakeStore(folder, fault)).read_patches(0, [[0, 0]], (4, 4))


def test_the_error_names_the_image_of_the_batch_that_failed(folder, level):
    whole = open_pyramid(folder)
    broken = FakeStore(folder)
    broken.place = lambda key: "fake://other/"
    pyramid = opened(broken)
    broken.fault = lambda key, count: (_ for _ in ()).throw(StoreError("gone"))
    with pytest.raises(SlideError, match=r"^fake://other/: level 0: gone"):
        read_batch([(whole, 0, [[0, 0]]), (pyramid, 0, [[0, 0]])], (4, 4))
    with pytest.raises(InputError, match="out must be uint8"):
        read_batch([(whole, 0, [[0, 0]])], (4, 4), out=np.zeros((1, 3, 4, 4), np.int8))


def test_a_read_that_waits_is_cancelled(folder):
    cancel, release = threading.Event(), threading.Event()

    def fault(key, count):
        cancel.set()
        release.wait(20)

    store = FakeStore(folder, fault)
    pyramid = opened(store)
    out = np.zeros((1, 3, 192, 192), np.uint8)
    with pytest.raises(ReadCancelledError, match="reading was cancelled"):
        pyramid.read_patches(0, [[0, 0]], (192, 192), out=out, cancel=cancel)
    release.set()
    assert not out.any()
    with pytest.raises(ReadCancelledError):
        open_pyramid(folder).read_patches(0, [[0, 0]], (4, 4), cancel=cancel)


def test_files_without_shards_are_read_whole_and_absent_ones_are_filled(tmp_path):
    import zarr

    from ats_stream.io import ngff

    group = zarr.create_group(str(tmp_path / "a"), zarr_format=3)
    array = group.create_array("0", shape=(1, 40, 40), chunks=(1, 16, 16), dtype="uint8", fill_value=9)
    array[:, :16, :20] = 5
    attributes = ngff.build_image(name="s", axes="cyx", paths=["0"], downsamples=[(1, 1)], pixel_size_um=None)
    group.attrs.update(attributes)
    store = FakeStore(tmp_path / "a")
    pyramid = pickle.loads(pickle.dumps(open_pyramid(tmp_path / "a")))
    np.testing.assert_array_equal(opened(store).read(0), pyramid.read(0))
    assert {read[1] for read in store.reads} == {"whole"}
    assert len(store.reads) == 9


@given(
    ranges=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=20),
    gap_bytes=st.integers(0, 50),
    max_bytes=st.integers(1, 200),
)
def test_groups_hold_every_range_once_within_bounds(ranges, gap_bytes, max_bytes):
    starts, sizes = [r[0] for r in ranges], [r[1] for r in ranges]
    groups = coalesce(starts, sizes, gap_bytes=gap_bytes, max_bytes=max_bytes)
    assert sorted(i for group in groups for i in group) == list(range(len(ranges)))
    for group in groups:
        end = starts[group[0]]
        for i in group:
            assert starts[i] - end <= gap_bytes
            end = max(end, starts[i] + sizes[i])
        assert len(group) == 1 or end - starts[group[0]] <= max_bytes
    for one, two in itertools.pairwise(groups):
        end = max(starts[i] + sizes[i] for i in one)
        both = max(end, starts[two[0]] + sizes[two[0]]) - starts[one[0]]
        assert starts[two[0]] - end > gap_bytes or both > max_bytes


def test_retries_stop_when_told():
    stop, calls = threading.Event(), []

    def action():
        calls.append(0)
        stop.set()
        raise TransientError("busy")

    with pytest.raises(StoreError, match="reading was stopped"):
        with_retries(action, RetryPolicy(max_retries=9, first_delay_s=60), stop)
    assert len(calls) == 1


def test_other_errors_are_not_tried_again():
    calls = []

    def action():
        calls.append(0)
        raise StoreError("denied")

    with pytest.raises(StoreError, match=r"^denied$"):
        with_retries(action, RetryPolicy())
    assert len(calls) == 1


@pytest.mark.parametrize("wrong", [{"max_requests": 0}, {"gap_bytes": -1}, {"max_inflight_bytes": 0}])
def test_bounds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GatherConfig(**wrong)
