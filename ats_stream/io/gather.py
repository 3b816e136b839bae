"""Reading remote shards: all indices at once, then all ranges at once, as many requests as are allowed.

A request that fails for a passing reason is repeated in its thread; any other failure stops the rest.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ats_stream.io.parallel import check_cancelled, thread_pool
from ats_stream.io.plan import coalesce
from ats_stream.io.sources import ChunkError, RawChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ats_stream.io.sources import Place, StoredRange, StoreSource

# how often a caller's wish to stop is looked at
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """How hard a remote store is asked."""

    max_requests: int = 96
    """Requests under way at once, per process."""
    max_inflight_bytes: int = 128 << 20  # 128 MiB
    """Bytes asked for and not yet decoded, per read."""
    gap_bytes: int = 128 << 10  # 128 KiB
    """Ranges of a shard no further apart than this are read by one request."""
    max_request_bytes: int = 4 << 20  # 4 MiB
    """Ranges are not joined to more than this."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_inflight_bytes", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gap_bytes < 0:
            raise ValueError(f"gap_bytes must not be negative, got {self.gap_bytes}")


DEFAULT_CONFIG = GatherConfig()


@dataclass(frozen=True)
class Want:
    """Chunks of one shard: ``numbers`` are theirs in the plan of the job."""

    job: int
    source: StoreSource
    shard: Place
    numbers: list[int]
    places: list[Place]


class Found(NamedTuple):
    """A chunk of a job's plan, as stored."""

    job: int
    number: int
    raw: RawChunk


@dataclass(frozen=True)
class _Task:
    """Something to ask the store; it gives chunks, and what to ask next."""

    job: int
    nbytes: int
    run: Callable[[threading.Event], tuple[list[Found], list[_Task]]]


def gather(
    wants: Iterable[Want], config: GatherConfig = DEFAULT_CONFIG, cancel: threading.Event | None = None
) -> Iterator[list[Found]]:
    """Yield the chunks wanted as they arrive, in any order; those that the store lacks come without data.

    Raises ChunkError, with the number of its job, for the first failure; ReadCancelledError once ``cancel``
    is set. Either way, and when the caller stops iterating, nothing more is requested.
    """
    waiting = deque(_locating(want, config) for want in wants)
    arrived: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    pool = thread_pool("ats-request", config.max_requests)
    num_running = inflight_bytes = 0

    def run(task: _Task) -> None:
        try:
            outcome: Any = task.run(stop) if not stop.is_set() else None
        except BaseException as error:
            if isinstance(error, ChunkError):
                error.job = task.job
            outcome = error
        arrived.put((task.nbytes, outcome))

    try:
        while waiting or num_running:
            while waiting and (
                not num_running or inflight_bytes + waiting[0].nbytes <= config.max_inflight_bytes
            ):
                task = waiting.popleft()
                pool.submit(run, task)
                num_running += 1
                inflight_bytes += task.nbytes
            chunks: list[Found] = []
            for nbytes, outcome in _take(arrived, cancel):
                num_running -= 1
                inflight_bytes -= nbytes
                if isinstance(outcome, BaseException):
                    raise outcome
                chunks += outcome[0]
                waiting.extend(outcome[1])
            if chunks:
                yield chunks
    finally:
        stop.set()


def _take(
    arrived: queue.SimpleQueue[tuple[int, Any]], cancel: threading.Event | None
) -> Iterator[tuple[int, Any]]:
    """Wait for one result, then take all that are there."""
    while True:
        check_cancelled(cancel)
        try:
            yield arrived.get(timeout=None if cancel is None else POLL_S)
            break
        except queue.Empty:
            continue
    while True:
        try:
            yield arrived.get_nowait()
        except queue.Empty:
            return


def _locating(want: Want, config: GatherConfig) -> _Task:
    """Ask where the chunks of a shard lie; then for them."""

    def run(stop: threading.Event) -> tuple[list[Found], list[_Task]]:
        ranges = want.source.locate(want.shard, want.places, stop)
        present = {found.place: found for found in ranges or ()}
        absent = [
            Found(want.job, number, RawChunk(place, None, 0))
            for number, place in zip(want.numbers, want.places, strict=True)
            if place not in present
        ]
        numbers = dict(zip(want.places, want.numbers, strict=True))
        return absent, [_reading(want, part, numbers) for part in _parts(list(present.values()), config)]

    if not want.source.layout.is_sharded:
        # nothing to ask first: the chunk is the whole key
        _, tasks = run(threading.Event())
        return tasks[0]
    return _Task(want.job, want.source.index_bytes, run)


def _parts(ranges: list[StoredRange], config: GatherConfig) -> list[list[StoredRange]]:
    if ranges and ranges[0].nbytes is None:
        return [[one] for one in ranges]
    groups = coalesce(
        [one.start for one in ranges],
        [one.nbytes or 0 for one in ranges],
        gap_bytes=config.gap_bytes,
        max_bytes=config.max_request_bytes,
    )
    return [[ranges[i] for i in group] for group in groups]


def _reading(want: Want, ranges: list[StoredRange], numbers: dict[Place, int]) -> _Task:
    """Ask for one stretch of a shard and cut the chunks out of it, or for the whole key."""
    first = ranges[0]
    start = first.start
    nbytes = None if first.nbytes is None else max(r.start + (r.nbytes or 0) for r in ranges) - start

    def run(stop: threading.Event) -> tuple[list[Found], list[_Task]]:
        data = want.source.read(want.shard, start, nbytes, stop)
        if data is None:
            return [Found(want.job, numbers[first.place], RawChunk(first.place, None, 0))], []
        chunks = []
        for one in ranges:
            begin = one.start - start
            part = data if one.nbytes is None else data[begin : begin + one.nbytes]
            chunks.append(Found(want.job, numbers[one.place], RawChunk(one.place, part, len(part))))
        return chunks, []

    return _Task(want.job, want.source.layout.decoder.nbytes if nbytes is None else nbytes, run)
