"""Acting on patch plans: every chunk is fetched and decoded once and its pieces copied into the patches."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.gather import Found, Want, gather
from ats_stream.io.parallel import run_all
from ats_stream.io.place import Numbered, Placer, ReadJob
from ats_stream.io.sources import ChunkError, RawChunk, StoreSource

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Iterator, Sequence

    from ats_stream.io.sources import ChunkSource, Place

Array = npt.NDArray[Any]
# threads pay from here on; below, handing over costs more than decoding
MIN_THREADED_CHUNKS = 16
# compiled code pays from here on: importing numba takes as long as copying some ten thousand pieces
MIN_COMPILED_PIECES = 128
# what a thread reads, decodes and copies at a time; little enough to stay in its cache
PART_BYTES = 2 << 20  # 2 MiB, decoded
PART_CHUNKS = 32


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


def read_jobs(
    jobs: Sequence[ReadJob], out: Array, *, num_threads: int, cancel: threading.Event | None = None
) -> list[ReadStats]:
    """Fill ``out`` (N, *size) with the pieces of all plans; pixels outside of a level stay as they are.

    Of local chunks each thread reads and decodes a few, then the next few; remote ones are asked for all at
    once, over all jobs, and decoded as they arrive. When this returns or raises, nothing writes into ``out``
    any more. Raises ChunkError with the number of its job (of local jobs, the first in the order of the
    plans), and ReadCancelledError once ``cancel`` is set.
    """
    is_large = sum(len(job.plan.piece_patch) for job in jobs) >= MIN_COMPILED_PIECES
    readers = [_Reader(number, job, out, is_large=is_large) for number, job in enumerate(jobs)]
    local = [reader for reader in readers if not _is_remote(reader.source)]
    remote = [reader for reader in readers if _is_remote(reader.source)]
    num_chunks = sum(reader.num_chunks for reader in local)
    parts = (
        partial(reader.read, part)
        for reader in local
        for part in reader.parts(_part_length(reader.chunk_bytes, num_chunks, num_threads))
    )
    run_all(parts, num_threads if num_chunks >= MIN_THREADED_CHUNKS else 1, cancel)
    for batch in _arriving(remote, cancel):
        ordered = sorted(batch, key=lambda found: found.job)
        arrived = []
        for number, of_job in groupby(ordered, key=lambda found: found.job):
            reader, chunks = readers[number], [(found.number, found.raw) for found in of_job]
            length = _part_length(reader.chunk_bytes, len(batch), num_threads)
            arrived += [partial(reader.place, chunks[i : i + length]) for i in range(0, len(chunks), length)]
        run_all(arrived, num_threads if len(batch) >= MIN_THREADED_CHUNKS else 1, cancel)
    return [reader.stats() for reader in readers]


def _part_length(chunk_bytes: int, num_chunks: int, num_threads: int) -> int:
    """Chunks that a thread takes at a time: something for each, and no more than what stays in its cache."""
    return max(1, min(PART_CHUNKS, PART_BYTES // chunk_bytes, -(-num_chunks // num_threads)))


class _Reader:
    """Reads the chunks of one job, and counts them."""

    def __init__(self, number: int, job: ReadJob, out: Array, *, is_large: bool) -> None:
        plan = job.plan
        self.number, self.job, self.source = number, job, job.source
        self.num_chunks = plan.num_chunks
        self.chunk_bytes = math.prod(job.source.chunk_shape) * job.source.dtype.itemsize
        self._placer = Placer(job, out, compiled=is_large)
        self._places: list[Place] = [tuple(place) for place in plan.chunks.tolist()]
        self._shards: list[Place] = [tuple(shard) for shard in plan.shards.tolist()]
        self._bounds: list[int] = plan.first_chunk.tolist()
        self._counts: list[tuple[int, int]] = []

    def parts(self, length: int) -> Iterator[range]:
        """The numbers of all chunks in parts of at most ``length``, cut between shards where that can be."""
        first = 0
        for begin, end in pairwise(self._bounds):
            if first < begin and end - first > length:
                yield range(first, begin)
                first = begin
            while end - first > length:
                yield range(first, first + length)
                first += length
        if first < self.num_chunks:
            yield range(first, self.num_chunks)

    def read(self, part: range) -> None:
        """Read, decode and copy chunks of a local level."""
        if not self._placer.can_read_files:
            self.place(self._fetch(part.start, part.stop))
            return
        for shard, numbers in self._spans(part.start, part.stop):
            self._read_file(shard, numbers)

    def _read_file(self, shard: Place, numbers: range) -> None:
        """The same for chunks of one shard, by compiled code; whatever it cannot do is left to the rest."""
        assert isinstance(self.source, StoreSource)
        left = np.arange(numbers.start, numbers.stop)

        def use(file: int, found_K2: npt.NDArray[np.int64]) -> None:
            nonlocal left
            is_done_K = self._placer.place_file(file, found_K2, left)
            self._counts.append((int(is_done_K.sum()), int(found_K2[is_done_K, 1].sum())))
            left = left[~is_done_K]

        try:
            self.source.fetch_located(shard, self.job.plan.chunks[numbers.start : numbers.stop], use)
        except ChunkError as error:
            error.job = self.number
            raise
        if len(left):
            rest = left.tolist()
            self.place(zip(rest, self.source.fetch(shard, self.places(rest)), strict=True))

    def place(self, chunks: Iterable[Numbered]) -> None:
        """Decode and copy chunks, given with their numbers."""
        try:
            chunks = list(chunks)
            self._placer.place(chunks)
        except ChunkError as error:
            error.job = self.number
            raise
        stored = [raw.stored_bytes for _, raw in chunks if raw.stored_bytes >= 0]
        self._counts.append((len(stored), sum(stored)))

    def stats(self) -> ReadStats:
        """What was read so far."""
        num_chunks, stored_bytes = (sum(values) for values in zip((0, 0), *self._counts, strict=True))
        decoded_bytes = num_chunks * self.chunk_bytes
        return ReadStats(num_chunks=num_chunks, stored_bytes=stored_bytes, decoded_bytes=decoded_bytes)

    def shards(self, first: int, last: int) -> Iterator[tuple[Place, list[int], list[Numbered]]]:
        """Each shard of the chunks from ``first`` to before ``last``: numbers of those to be read, and those
        from the cache, which come decoded, with -1 stored bytes.
        """
        cache, level = self.job.cache, self.job.level
        for shard, span in self._spans(first, last):
            numbers, cached = list(span), []
            if cache is not None:
                found = [(n, cache.get((level, self._places[n]))) for n in numbers]
                cached = [(n, RawChunk(self._places[n], got, -1)) for n, got in found if got is not None]
                numbers = [n for n, got in found if got is None]
            yield shard, numbers, cached

    def _spans(self, first: int, last: int) -> Iterator[tuple[Place, range]]:
        """Each shard of the chunks from ``first`` to before ``last``, and the numbers of its chunks there."""
        for s in range(bisect_right(self._bounds, first) - 1, len(self._shards)):
            if self._bounds[s] >= last:
                return
            yield self._shards[s], range(max(first, self._bounds[s]), min(last, self._bounds[s + 1]))

    def places(self, numbers: Sequence[int]) -> list[Place]:
        """Of chunks, in the chunk grid."""
        return [self._places[n] for n in numbers]

    def _fetch(self, first: int, last: int) -> Iterator[Numbered]:
        for shard, numbers, cached in self.shards(first, last):
            yield from cached
            if numbers:
                yield from zip(numbers, self.source.fetch(shard, self.places(numbers)), strict=True)


def _arriving(readers: Sequence[_Reader], cancel: threading.Event | None) -> Iterator[list[Found]]:
    """All chunks of remote jobs, as they come."""
    wants: list[Want] = []
    cached: list[Found] = []
    for reader in readers:
        assert isinstance(reader.source, StoreSource)
        for shard, numbers, at_hand in reader.shards(0, reader.num_chunks):
            cached += [Found(reader.number, number, raw) for number, raw in at_hand]
            if numbers:
                wants.append(Want(reader.number, reader.source, shard, numbers, reader.places(numbers)))
    if cached:
        yield cached
    if wants:
        yield from gather(wants, cancel=cancel)


def _is_remote(source: ChunkSource) -> bool:
    return isinstance(source, StoreSource) and source.store.is_remote
