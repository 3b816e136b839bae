"""Acting on patch plans: every chunk is fetched and decoded once and its pieces copied into the patches."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import ReadCancelledError
from ats_stream.io.gather import Found, Want, gather
from ats_stream.io.sources import ChunkError, ChunkSource, Place, RawChunk, StoreSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.plan import PatchPlan

Array = npt.NDArray[Any]
# decoding in threads pays from here on; below, handing over costs more than decoding
MIN_THREADED_CHUNKS = 16
# chunks in flight per batch, so that memory does not grow with the request
CHUNKS_PER_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ReadStats:
    """What was read so far: chunks looked at, their bytes in the store, their bytes as pixels.

    A chunk that is absent from the store counts in ``decoded_bytes`` (its pixels were looked at) with no
    stored bytes; one served by the chunk cache counts nowhere.
    """

    num_chunks: int = 0
    stored_bytes: int = 0
    decoded_bytes: int = 0

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(
            num_chunks=self.num_chunks + other.num_chunks,
            stored_bytes=self.stored_bytes + other.stored_bytes,
            decoded_bytes=self.decoded_bytes + other.decoded_bytes,
        )


class ChunkCache:
    """Decoded chunks up to ``max_bytes`` in all, least recently used dropped first; safe between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[int, Place], Array] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, Place]) -> Array | None:
        """The chunk, or None."""
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: tuple[int, Place], chunk: Array) -> None:
        """Keep a chunk; one larger than the whole cache is not kept."""
        if chunk.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._chunks.pop(key, None)
            self._chunks[key] = chunk
            self._bytes += chunk.nbytes - (old.nbytes if old is not None else 0)
            while self._bytes > self.max_bytes:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes


@dataclass(frozen=True, kw_only=True)
class ReadJob:
    """The part of a read that concerns one level of one image."""

    source: ChunkSource
    plan: PatchPlan
    rows_N: npt.NDArray[np.int64] | None
    """Where each patch of the plan goes in the result; None for the same order."""
    level: int
    cache: ChunkCache | None


def read_jobs(
    jobs: Sequence[ReadJob], out: Array, *, num_threads: int, cancel: threading.Event | None = None
) -> list[ReadStats]:
    """Fill ``out`` (N, *size) with the pieces of all plans; pixels outside of a level stay as they are.

    Local chunks are read one after another, remote ones at once, over all jobs. When this returns or raises,
    nothing writes into ``out`` any more. Raises ChunkError with the number of its job, and ReadCancelledError
    once ``cancel`` is set.
    """
    placers = [_Placer(number, job, out) for number, job in enumerate(jobs)]
    num_chunks, stored_bytes = [0] * len(jobs), [0] * len(jobs)
    is_large = sum(job.plan.num_chunks for job in jobs) >= MIN_THREADED_CHUNKS
    pool = _thread_pool(num_threads) if num_threads > 1 and is_large else None

    def place_all(part: list[Found]) -> None:
        for found in part:
            placers[found.job].place(found.number, found.raw)

    for batch in _arriving(jobs, cancel):
        if cancel is not None and cancel.is_set():
            raise ReadCancelledError("reading was cancelled")
        for found in batch:
            if found.raw.stored_bytes >= 0:
                num_chunks[found.job] += 1
                stored_bytes[found.job] += found.raw.stored_bytes
        if pool is None:
            place_all(batch)
            continue
        # one task per thread: handing over single chunks costs as much as decoding them
        tasks = [pool.submit(place_all, batch[i::num_threads]) for i in range(num_threads)]
        wait(tasks)
        for task in tasks:
            task.result()
    return [
        ReadStats(num_chunks=n, stored_bytes=b, decoded_bytes=n * placer.chunk_bytes)
        for n, b, placer in zip(num_chunks, stored_bytes, placers, strict=True)
    ]


class _Placer:
    """Decodes the chunks of one job and copies their pieces to where they belong."""

    def __init__(self, number: int, job: ReadJob, out: Array) -> None:
        plan = job.plan
        self.number, self.job, self.out = number, job, out
        self.source_start, self.source_stop, self.target_start, self.target_stop = (
            a.tolist()
            for first in (plan.piece_source, plan.piece_target)
            for a in (first, first + plan.piece_size)
        )
        rows_P = plan.piece_patch if job.rows_N is None else job.rows_N[plan.piece_patch]
        self.rows, self.first_piece = rows_P.tolist(), plan.first_piece.tolist()
        self.chunk_bytes = math.prod(job.source.chunk_shape) * job.source.dtype.itemsize

    def place(self, number: int, raw: RawChunk) -> None:
        """Copy the pieces of one chunk."""
        is_absent = raw.data is None
        chunk = self.job.source.fill_value if is_absent else self._decode(raw)
        for p in range(self.first_piece[number], self.first_piece[number + 1]):
            what = chunk if is_absent else chunk[(*map(slice, self.source_start[p], self.source_stop[p]),)]
            self.out[(self.rows[p], *map(slice, self.target_start[p], self.target_stop[p]))] = what

    def _decode(self, raw: RawChunk) -> Array:
        if isinstance(raw.data, np.ndarray):
            return raw.data  # from the cache
        try:
            chunk = self.job.source.decode(raw)
        except ChunkError as error:
            error.job = self.number
            raise
        if self.job.cache is not None:
            self.job.cache.put((self.job.level, raw.place), chunk)
        return chunk


def _arriving(jobs: Sequence[ReadJob], cancel: threading.Event | None) -> Iterator[list[Found]]:
    """All chunks of all jobs in batches; one from the cache comes decoded, with -1 stored bytes."""
    remote = [number for number, job in enumerate(jobs) if _is_remote(job.source)]
    local = [number for number in range(len(jobs)) if number not in remote]
    yield from _batches(found for number in local for found in _fetch(number, jobs[number]))
    wants: list[Want] = []
    cached: list[Found] = []
    for number in remote:
        job = jobs[number]
        for shard, numbers, places in _shards(job.plan):
            wanted = []
            for n, place in zip(numbers, places, strict=True):
                chunk = job.cache.get((job.level, place)) if job.cache is not None else None
                if chunk is None:
                    wanted.append((n, place))
                else:
                    cached.append(Found(number, n, RawChunk(place, chunk, -1)))
            if wanted:
                assert isinstance(job.source, StoreSource)
                wants.append(Want(number, job.source, shard, [n for n, _ in wanted], [p for _, p in wanted]))
    if cached:
        yield cached
    if wants:
        yield from gather(wants, cancel=cancel)


def _is_remote(source: ChunkSource) -> bool:
    return isinstance(source, StoreSource) and source.store.is_remote


def _shards(plan: PatchPlan) -> Iterator[tuple[Place, range, list[Place]]]:
    """Each shard of a plan with the numbers and places of its chunks."""
    places: list[Place] = [tuple(p) for p in plan.chunks.tolist()]
    bounds = plan.first_chunk.tolist()
    for s, shard in enumerate(plan.shards.tolist()):
        yield tuple(shard), range(bounds[s], bounds[s + 1]), places[bounds[s] : bounds[s + 1]]


def _fetch(job_number: int, job: ReadJob) -> Iterator[Found]:
    """Read the chunks of a local job one after another."""
    source, cache, level = job.source, job.cache, job.level
    for shard, numbers, places in _shards(job.plan):
        wanted = list(numbers)
        if cache is not None:
            wanted = []
            for number, place in zip(numbers, places, strict=True):
                chunk = cache.get((level, place))
                if chunk is None:
                    wanted.append(number)
                else:
                    yield Found(job_number, number, RawChunk(place, chunk, -1))
        if not wanted:
            continue
        first = numbers[0]
        try:
            fetched = source.fetch(shard, [places[n - first] for n in wanted])
            for number, raw in zip(wanted, fetched, strict=True):
                yield Found(job_number, number, raw)
        except ChunkError as error:
            error.job = job_number
            raise


def _batches(items: Iterator[Found]) -> Iterator[list[Found]]:
    while batch := list(islice(items, CHUNKS_PER_BATCH)):
        yield batch


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """One pool per size and process: threads do not survive a fork, so a child makes its own."""
    key = (os.getpid(), num_threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(num_threads, thread_name_prefix="ats-decode")
        return _pools[key]
