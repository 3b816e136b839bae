"""Acting on requests for boxes of pixels: checked, planned, read at once over images, errors with the slide.

Shape letters: N patches, C channels, D space axes; ``*space`` are the sampled axes.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from ats_stream.errors import InputError, SlideError
from ats_stream.io.chunk_cache import ChunkCache
from ats_stream.io.fetch import ReadStats, read_jobs
from ats_stream.io.layout import grid_shape
from ats_stream.io.place import ReadJob
from ats_stream.io.plan import plan_patches
from ats_stream.io.sources import ChunkError, ChunkSource, StoreSource
from ats_stream.io.zarr_source import ZarrSource

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ats_stream.io.plan import PatchPlan
    from ats_stream.io.pyramid_info import Level

Array = npt.NDArray[Any]
# requests of less are not held against the memory that is free
UNCHECKED_BYTES = 256 << 20  # 256 MiB
# parts of chunks that one call may copy: planning takes less than a kilobyte for each
MAX_PIECES = 1 << 20


class LevelReader:
    """The sources of one image's levels, with the cache and the counts of what is read from them.

    Pickling leaves cache and counts behind. Safe between threads.
    """

    def __init__(
        self,
        slide: str,
        levels: Sequence[Level],
        sources: Sequence[ChunkSource],
        *,
        cache_bytes: int,
        num_threads: int,
    ) -> None:
        self.slide, self.levels, self.sources = slide, tuple(levels), tuple(sources)
        self.cache_bytes, self.num_threads = cache_bytes, num_threads
        self._reset()

    def _reset(self) -> None:
        self.cache = ChunkCache(self.cache_bytes) if self.cache_bytes > 0 else None
        self._lock = threading.Lock()
        self._stats = [ReadStats() for _ in self.sources]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in {"cache", "_lock", "_stats"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def level(self, level: int | Level) -> Level:
        """The level of an index; InputError when there is none."""
        index = level.__index__()
        if not -len(self.levels) <= index < len(self.levels):
            raise InputError(f"{self.slide}: no level {index}, there are {len(self.levels)}")
        return self.levels[index]

    def stats(self, level: Level) -> ReadStats:
        """What was read from a level so far."""
        with self._lock:
            return self._stats[level.index]

    def count(self, level: Level, stats: ReadStats) -> None:
        """Add to what was read."""
        with self._lock:
            self._stats[level.index] += stats

    def part(self, level: int | Level, offsets_ND: npt.ArrayLike, size: tuple[int, ...]) -> Part:
        """A part of a read, with offsets that have a 0 for the channel; InputError for what does not fit."""
        target = self.level(level)
        offsets = np.asarray(offsets_ND)
        num_space = len(target.shape) - 1
        if offsets.size == 0:
            offsets = np.zeros((0, num_space), np.int64)
        if offsets.ndim != 2 or offsets.shape[1] != num_space or offsets.dtype.kind not in "iu":
            raise InputError(
                f"offsets must be integers (N, {num_space}), got {offsets.dtype} {offsets.shape}"
            )
        if len(size) != num_space or min(size) < 1:
            raise InputError(f"size must be {num_space} positive numbers, got {size}")
        with_channel = np.zeros((len(offsets), num_space + 1), np.int64)
        with_channel[:, 1:] = offsets
        return Part(self, target, with_channel, None)

    def box(
        self,
        level: Level,
        first: tuple[int, ...],
        size: tuple[int, ...],
        *,
        out: Array | None = None,
        is_once: bool = False,
    ) -> Array:
        """One box that lies inside the level, over (C, *space), into ``out`` if that is given; ``is_once``
        as in :class:`Part`.
        """
        memory = self.empty((1, *size), level.dtype) if out is None else out[None]
        if memory.size:
            read_parts([Part(self, level, np.array([first]), None, is_once)], size, 0, memory)
        pixels: Array = memory[0]
        return pixels

    def afresh(self, level: Level) -> Array:
        """All pixels of a level, without use of anything that is remembered of earlier reads."""
        source = self.sources[level.index]
        if isinstance(source, (StoreSource, ZarrSource)):
            source = source.afresh()
        sources = (*self.sources[: level.index], source, *self.sources[level.index + 1 :])
        again = LevelReader(self.slide, self.levels, sources, cache_bytes=0, num_threads=self.num_threads)
        pixels = again.box(level, (0,) * len(level.shape), level.shape)
        self.count(level, again.stats(level))
        return pixels

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array; InputError when it is large and does not fit into the memory that is free."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes <= UNCHECKED_BYTES or nbytes <= psutil.virtual_memory().available:
            with suppress(MemoryError):
                return np.empty(shape, dtype)
        raise InputError(
            f"{self.slide}: {nbytes} bytes of pixels {shape} do not fit into memory, read smaller boxes"
        )

    def plan(
        self, level: Level, offsets: npt.NDArray[np.int64], size: Sequence[int]
    ) -> tuple[ChunkSource, PatchPlan]:
        """Where the patches of a level lie in its chunks; InputError when they are in too many pieces."""
        source = self.sources[level.index]
        patch_grid, level_grid = (grid_shape(s, source.chunk_shape) for s in (size, source.shape))
        num_pieces = len(offsets) * math.prod(
            min(p + 1, n) for p, n in zip(patch_grid, level_grid, strict=True)
        )
        if num_pieces > MAX_PIECES:
            raise InputError(
                f"{self.slide}: a request takes {num_pieces} pieces of chunks {source.chunk_shape}, at most "
                f"{MAX_PIECES} are read at once: read smaller boxes or fewer patches"
            )
        return source, plan_patches(source.shape, source.chunk_shape, source.shard_shape, offsets, size)


@dataclass(frozen=True, eq=False)
class Part:
    """What one level of one image gives to a read."""

    reader: LevelReader
    level: Level
    offsets_ND: npt.NDArray[np.int64]
    rows_N: npt.NDArray[np.int64] | None
    """Its places in the result, None for all."""
    is_once: bool = False
    """Whether chunks that lie wholly in a patch are not wanted again."""


def merged(parts: Sequence[Part]) -> list[Part]:
    """One part for each level of each image, whatever the number of requests for it."""
    if len(parts) == 1:
        return list(parts)
    groups: dict[Hashable, list[tuple[Part, npt.NDArray[np.int64]]]] = {}
    first = 0
    for part in parts:
        rows = np.arange(first, first + len(part.offsets_ND))
        first += len(rows)
        source = part.reader.sources[part.level.index]
        key = source.identity if isinstance(source, StoreSource) else id(source)
        groups.setdefault(key, []).append((part, rows))
    return [
        Part(
            group[0][0].reader,
            group[0][0].level,
            np.concatenate([part.offsets_ND for part, _ in group]),
            np.concatenate([rows for _, rows in group]),
        )
        for group in groups.values()
    ]


def read_parts(
    parts: Sequence[Part],
    size: Sequence[int],
    fill: float,
    out: Array,
    cancel: threading.Event | None = None,
) -> None:
    """Plan and read all parts; errors name the slide and the level."""
    jobs = []
    for part in parts:
        source, plan = part.reader.plan(part.level, part.offsets_ND, size)
        if plan.outside.any():
            out[plan.outside if part.rows_N is None else part.rows_N[plan.outside]] = fill
        cache = part.reader.cache
        jobs.append(
            ReadJob(
                source=source,
                plan=plan,
                rows_N=part.rows_N,
                level=part.level.index,
                cache=cache,
                is_once=part.is_once,
            )
        )
    num_threads = max(part.reader.num_threads for part in parts)
    try:
        stats = read_jobs(jobs, out, num_threads=num_threads, cancel=cancel)
    except ChunkError as error:
        reason = " ".join(str(error).split())  # zarr-python also writes several lines
        part = parts[error.job]
        raise SlideError(part.reader.slide, f"level {part.level.index}: {reason}") from error
    for part, one in zip(parts, stats, strict=True):
        part.reader.count(part.level, one)
