"""Acting on a patch plan: chunks are fetched and decoded once each and their pieces copied into the
patches."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.sources import ChunkSource, Place, RawChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def read_plan(
    source: ChunkSource,
    plan: PatchPlan,
    out: Array,
    *,
    level: int,
    cache: ChunkCache | None,
    num_threads: int,
) -> ReadStats:
    """Fill ``out`` (N, *size) with the pieces of the plan; pixels outside of the level stay as they are."""
    num_chunks = stored_bytes = 0
    decode = _decoder(source, level, cache)
    todo = _fetch(source, plan, level, cache)
    pool = _thread_pool(num_threads) if num_threads > 1 and plan.num_chunks >= MIN_THREADED_CHUNKS else None
    targets, sources, sizes = (a.tolist() for a in (plan.piece_target, plan.piece_source, plan.piece_size))
    patches, first_piece = plan.piece_patch.tolist(), plan.first_piece.tolist()

    def place(number: int, raw: RawChunk) -> None:
        chunk = source.fill_value if raw.data is None else decode(raw)
        for p in range(first_piece[number], first_piece[number + 1]):
            where = tuple(slice(a, a + n) for a, n in zip(targets[p], sizes[p], strict=True))
            what = chunk if raw.data is None else chunk[_box(sources[p], sizes[p])]
            out[(patches[p], *where)] = what

    def place_all(part: list[tuple[int, RawChunk]]) -> None:
        for number, raw in part:
            place(number, raw)

    for batch in _batches(todo):
        for _, raw in batch:
            if raw.stored_bytes >= 0:
                num_chunks += 1
                stored_bytes += raw.stored_bytes
        if pool is None:
            place_all(batch)
        else:
            # one task per thread: handing over single chunks costs as much as decoding them
            list(pool.map(place_all, [batch[i::num_threads] for i in range(num_threads)]))
    chunk_bytes = int(np.prod(source.chunk_shape, dtype=np.int64)) * source.dtype.itemsize
    return ReadStats(num_chunks=num_chunks, stored_bytes=stored_bytes, decoded_bytes=num_chunks * chunk_bytes)


def _box(start: list[int], size: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def _decoder(source: ChunkSource, level: int, cache: ChunkCache | None) -> Callable[[RawChunk], Array]:
    def decode(raw: RawChunk) -> Array:
        if isinstance(raw.data, np.ndarray):
            return raw.data  # from the cache
        chunk = source.decode(raw)
        if cache is not None:
            cache.put((level, raw.place), chunk)
        return chunk

    return decode


def _fetch(
    source: ChunkSource, plan: PatchPlan, level: int, cache: ChunkCache | None
) -> Iterator[tuple[int, RawChunk]]:
    """Number and stored form of every chunk of the plan; one from the cache comes decoded, with -1 stored
    bytes.
    """
    places: list[Place] = [tuple(p) for p in plan.chunks.tolist()]
    bounds = plan.first_chunk.tolist()
    for s, shard in enumerate(plan.shards.tolist()):
        wanted = []
        for number in range(bounds[s], bounds[s + 1]):
            cached = cache.get((level, places[number])) if cache is not None else None
            if cached is None:
                wanted.append(number)
            else:
                yield number, RawChunk(places[number], cached, -1)
        if wanted:
            yield from zip(wanted, source.fetch(tuple(shard), [places[n] for n in wanted]), strict=True)


def _batches(items: Iterator[tuple[int, RawChunk]]) -> Iterator[list[tuple[int, RawChunk]]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == CHUNKS_PER_BATCH:
            yield batch
            batch = []
    if batch:
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
