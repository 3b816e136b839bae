"""Reading pyramids: whole levels, boxes, patches, thumbnails, label images.

Shape letters: N patches, C channels, D space axes; ``*space`` are the sampled axes: y x, z y x, t y x or
t z y x.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from ats_stream.errors import InputError, SlideError
from ats_stream.io.fetch import ChunkCache, ReadJob, ReadStats, read_jobs
from ats_stream.io.layout import grid_shape
from ats_stream.io.plan import plan_patches
from ats_stream.io.reduce import shrink
from ats_stream.io.sources import ChunkError, ChunkSource, StoreSource

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from ats_stream.io.ngff import Channel
    from ats_stream.io.plan import PatchPlan
    from ats_stream.io.stores import Store

Array = npt.NDArray[Any]
# requests of less are not held against the memory that is free
UNCHECKED_BYTES = 256 << 20  # 256 MiB
# parts of chunks that one call may copy: planning takes less than a kilobyte for each
MAX_PIECES = 1 << 20
# pixels of a level that a thumbnail holds at once
THUMBNAIL_GAP = 8
THUMBNAIL_STRIP_PX = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of a pyramid; usable as an index, so ``pyramid.levels[level]`` is the level itself."""

    index: int
    shape: tuple[int, ...]
    """(C, *space)."""
    dtype: np.dtype[Any]
    downsample: tuple[float, ...]
    """Pixels of level 0 per pixel of this level, per space axis."""
    pixel_size_um: tuple[float, ...] | None
    """Per space axis; None when unknown, NaN along time."""
    chunk_shape: tuple[int, ...]

    def __index__(self) -> int:
        return self.index


@dataclass(frozen=True, kw_only=True)
class PyramidInfo:
    """What a pyramid is, apart from its pixels."""

    slide: str
    name: str
    axes: tuple[str, ...]
    channels: tuple[Channel, ...]
    levels: tuple[Level, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[tuple[str, str], ...] = ()
    """(name, place in the store) of each label image."""
    associated: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    """Reader of each associated image (C, y, x), such as ``macro``; to be pickled."""


class Pyramid:
    """A multi-resolution image, opened by :func:`ats_stream.io.open_pyramid`.

    Pickling carries the description, not open files or caches, so a copy in another process reads on its own.
    Reads may run in several threads at once.
    """

    def __init__(
        self,
        info: PyramidInfo,
        sources: Sequence[ChunkSource],
        *,
        cache_bytes: int = 0,
        num_threads: int = 1,
        store: Store | None = None,
    ) -> None:
        """``store`` holds the label images."""
        self._info, self._sources, self._store = info, tuple(sources), store
        self._cache_bytes = cache_bytes
        self._num_threads = num_threads
        self._reset()

    def _reset(self) -> None:
        self._cache = ChunkCache(self._cache_bytes) if self._cache_bytes > 0 else None
        self._lock = threading.Lock()
        self._stats = [ReadStats() for _ in self._sources]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in {"_cache", "_lock", "_stats"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __repr__(self) -> str:
        top = self.levels[0]
        return f"<Pyramid {self._info.slide} {top.dtype} {top.shape}, {len(self.levels)} levels>"

    @property
    def slide(self) -> str:
        """Where the pyramid was opened from, as errors name it."""
        return self._info.slide

    @property
    def name(self) -> str:
        """Name of the image."""
        return self._info.name

    @property
    def levels(self) -> tuple[Level, ...]:
        """All levels, finest first."""
        return self._info.levels

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of every level, ``c`` first."""
        return self._info.axes

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Names and colours of the channels; empty when the store says nothing."""
        return self._info.channels

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the converter kept of the slide's own metadata."""
        return self._info.metadata

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the label images, such as ``tissue``."""
        return tuple(name for name, _ in self._info.labels)

    def label(self, name: str) -> Pyramid:
        """Open one label image as a pyramid of one integer channel; InputError for an unknown name."""
        from ats_stream.io.opening import open_inside

        places = dict(self._info.labels)
        if self._store is None or name not in places:
            raise InputError(f"{self.slide}: no label {name!r}, there are {sorted(places)}")
        return open_inside(
            self._store, places[name], cache_bytes=self._cache_bytes, num_threads=self._num_threads
        )

    @property
    def associated_names(self) -> tuple[str, ...]:
        """Names of the pictures beside the image, such as ``label`` and ``macro`` of a slide."""
        return tuple(self._info.associated)

    def associated(self, name: str) -> Array:
        """One associated image (C, y, x); InputError for an unknown name, SlideError for a broken one."""
        if name not in self._info.associated:
            raise InputError(f"{self.slide}: no associated image {name!r}, there are {self.associated_names}")
        return self._info.associated[name]()

    def level_for(self, *, downsample: float | None = None, pixel_size_um: float | None = None) -> Level:
        """The level nearest, in ratio, to a downsampling factor or a pixel size in micrometres; give one."""
        if (downsample is None) == (pixel_size_um is None):
            raise InputError("level_for needs either downsample or pixel_size_um")
        wanted = downsample if downsample is not None else pixel_size_um
        if wanted is None or not 0 < wanted < math.inf:
            raise InputError(f"downsample or pixel_size_um must be positive, got {wanted}")

        def value(level: Level) -> float:
            if downsample is not None:
                return math.prod(level.downsample[-2:]) ** (1 / len(level.downsample[-2:]))
            if level.pixel_size_um is None:
                raise InputError(
                    f"{self.slide}: its pixel size is unknown, so no level can be chosen by pixel_size_um"
                )
            return math.prod(level.pixel_size_um[-2:]) ** (1 / len(level.pixel_size_um[-2:]))

        return min(self.levels, key=lambda level: (abs(math.log(value(level) / wanted)), level.index))

    def read(
        self, level: int | Level, start: Sequence[int] | None = None, stop: Sequence[int] | None = None
    ) -> Array:
        """Read a box of the level, by default all of it; ``start`` and ``stop`` are over (C, *space).

        Raises InputError for a box that reaches outside or does not fit into memory, SlideError when the
        store is damaged.
        """
        target = self._level(level)
        first = tuple(int(v) for v in start) if start is not None else (0,) * len(target.shape)
        last = tuple(int(v) for v in stop) if stop is not None else target.shape
        fits = len(first) == len(last) == len(target.shape) and all(
            0 <= a <= b <= n for a, b, n in zip(first, last, target.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"{self.slide}: box {first} to {last} does not lie in level {target.index} {target.shape}"
            )
        size = tuple(b - a for a, b in zip(first, last, strict=True))
        out = self._empty((1, *size), target.dtype)
        if out.size:
            _read_parts([_Part(self, target, np.array([first]), None)], size, 0, out)
        box: Array = out[0]
        return box

    def read_patches(
        self,
        level: int | Level,
        offsets_ND: npt.ArrayLike,
        size_D: Sequence[int],
        *,
        fill: float = 0,
        out: Array | None = None,
        cancel: threading.Event | None = None,
    ) -> Array:
        """Read N patches of one size: (N, C, *size) in the level's dtype.

        ``offsets_ND`` are the first pixels of the patches in pixels of that level, integers; they may be
        negative or reach past the edge, what lies outside is ``fill``. Every chunk is fetched and decoded
        once per call. ``out``, if given, is filled and returned: the memory of a pinned tensor, say, as
        ``tensor.numpy()``. Raises SlideError when the store is damaged or does not answer, InputError for
        arguments that do not fit, or too many pixels or chunks for one call, and ReadCancelledError soon
        after ``cancel`` is set; then ``out`` holds some of the pixels.
        """
        return read_batch([(self, level, offsets_ND)], size_D, fill=fill, out=out, cancel=cancel)

    def _offsets(
        self, level: int | Level, offsets_ND: npt.ArrayLike, size: tuple[int, ...]
    ) -> tuple[Level, npt.NDArray[np.int64]]:
        """The level, and offsets with 0 for the channel; InputError for what does not fit."""
        target = self._level(level)
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
        return target, with_channel

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array; InputError when it is large and does not fit into the memory that is free."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes <= UNCHECKED_BYTES or nbytes <= psutil.virtual_memory().available:
            with suppress(MemoryError):
                return np.empty(shape, dtype)
        raise InputError(
            f"{self.slide}: {nbytes} bytes of pixels {shape} do not fit into memory, read smaller boxes"
        )

    def _level(self, level: int | Level) -> Level:
        index = level.__index__()
        if not -len(self.levels) <= index < len(self.levels):
            raise InputError(f"{self.slide}: no level {index}, there are {len(self.levels)}")
        return self.levels[index]

    def _plan(
        self, level: Level, offsets: npt.NDArray[np.int64], size: Sequence[int]
    ) -> tuple[ChunkSource, PatchPlan]:
        source = self._sources[level.index]
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

    def _count(self, level: Level, stats: ReadStats) -> None:
        with self._lock:
            self._stats[level.index] += stats

    def read_stats(self, level: int | Level) -> ReadStats:
        """What was read from a level since the pyramid was opened in this process; the counts only grow."""
        with self._lock:
            return self._stats[self._level(level).index]

    def thumbnail(self, max_px: int) -> Array:
        """The whole image as (C, y, x), its longer side at most ``max_px``, by exact means of blocks.

        Of other space axes the middle plane is taken. Where the levels leave a gap, so that the next finer
        one has more than 8 times the side, the next coarser one is given as it is. Memory is bounded by the
        result and one strip of pixels.
        """
        if max_px < 1:
            raise InputError(f"max_px must be positive, got {max_px}")
        level = next((v for v in reversed(self.levels) if max(v.shape[-2:]) >= max_px), self.levels[0])
        coarser = self.levels[level.index + 1 :]
        if coarser and max(level.shape[-2:]) > THUMBNAIL_GAP * max_px:
            level = coarser[0]
        middle = tuple(n // 2 for n in level.shape[1:-2])
        height, width = level.shape[-2:]
        factor = math.ceil(max(height, width) / max_px)
        rows = max(1, THUMBNAIL_STRIP_PX // (width * factor)) * factor
        strips = []
        for y in range(0, height, rows):
            stop = (level.shape[0], *(m + 1 for m in middle), min(y + rows, height), width)
            strip = self.read(level, (0, *middle, y, 0), stop)
            strips.append(shrink(strip.reshape(level.shape[0], -1, width), factor))
        return np.concatenate(strips, axis=1)

    def dask(self, level: int | Level) -> Any:
        """A lazy dask array of a level; its blocks are whole chunks, about 16 MiB each."""
        import dask.array

        from_array: Any = dask.array.from_array

        target = self._level(level)
        chunk = target.chunk_shape
        scale = max(1, round((16e6 / (math.prod(chunk) * target.dtype.itemsize)) ** (1 / (len(chunk) - 1))))
        blocks = (chunk[0], *(min(c * scale, n) for c, n in zip(chunk[1:], target.shape[1:], strict=True)))
        return from_array(_LazyLevel(self, target), chunks=blocks, name=False, meta=np.empty(0, target.dtype))


class _LazyLevel:
    """What dask slices: one level as a read-only array."""

    def __init__(self, pyramid: Pyramid, level: Level) -> None:
        self.pyramid, self.level = pyramid, level
        self.shape, self.dtype, self.ndim = level.shape, level.dtype, len(level.shape)

    def __getitem__(self, key: tuple[slice, ...]) -> Array:
        bounds = [s.indices(n) for s, n in zip(key, self.shape, strict=True)]
        box = self.pyramid.read(self.level, [b[0] for b in bounds], [max(b[0], b[1]) for b in bounds])
        return box[tuple(slice(None, None, b[2]) for b in bounds)]


def axis_downsample(full: int, size: int, stated: float) -> float:
    """Factor between two lengths in pixels: the stated one if the lengths agree with it, else a whole one,
    else the ratio.

    The ratio alone is off by the last, cut off block: 2967 -> 1484 is a factor of 2, not of 1.9993.

    >>> axis_downsample(2967, 1484, 2.0), axis_downsample(100, 25, 1.0), axis_downsample(10, 4, 1.0)
    (2.0, 4.0, 2.5)
    """
    for factor in (stated, float(round(full / size))):
        if factor >= 1 and abs(full / factor - size) < 1:
            return factor
    return full / size


@dataclass(frozen=True, eq=False)
class _Part:
    """What one level of one image gives to a read; ``rows_N`` are its places in the result, None for all."""

    pyramid: Pyramid
    level: Level
    offsets_ND: npt.NDArray[np.int64]
    rows_N: npt.NDArray[np.int64] | None


def read_batch(
    requests: Sequence[tuple[Pyramid, int | Level, npt.ArrayLike]],
    size_D: Sequence[int],
    *,
    fill: float = 0,
    out: Array | None = None,
    cancel: threading.Event | None = None,
) -> Array:
    """Patches of several pyramids, one request after another: (sum of N, C, *size).

    Every chunk is fetched and decoded once, also where requests name the same level twice; of remote stores
    everything is asked for at once. ``fill``, ``out`` and ``cancel`` are as in
    :meth:`Pyramid.read_patches`. InputError, before anything is read, when dtypes or numbers of channels
    differ.
    """
    if not requests:
        raise InputError("read_batch needs at least one request")
    size = tuple(int(s) for s in size_D)
    parts = [(pyramid, *pyramid._offsets(level, offsets, size)) for pyramid, level, offsets in requests]
    kinds = {(level.dtype.name, level.shape[0]) for _, level, _ in parts}
    if len(kinds) > 1:
        raise InputError(f"read_batch spans images of different dtype and channels: {sorted(kinds)}")
    top, num_patches = parts[0][1], sum(len(offsets) for _, _, offsets in parts)
    shape = (num_patches, top.shape[0], *size)
    if out is None:
        out = parts[0][0]._empty(shape, top.dtype)
    elif out.shape != shape or out.dtype != top.dtype:
        raise InputError(f"out must be {top.dtype} {shape}, got {out.dtype} {out.shape}")
    _read_parts(_merged(parts), shape[1:], fill, out, cancel)
    return out


def _merged(parts: Sequence[tuple[Pyramid, Level, npt.NDArray[np.int64]]]) -> list[_Part]:
    """One part for each level of each image, whatever the number of requests for it."""
    if len(parts) == 1:
        return [_Part(*parts[0], None)]
    groups: dict[Hashable, list[_Part]] = {}
    first = 0
    for pyramid, level, offsets in parts:
        rows = np.arange(first, first + len(offsets))
        first += len(offsets)
        source = pyramid._sources[level.index]
        key = source.identity if isinstance(source, StoreSource) else id(source)
        groups.setdefault(key, []).append(_Part(pyramid, level, offsets, rows))
    return [
        _Part(
            group[0].pyramid,
            group[0].level,
            np.concatenate([part.offsets_ND for part in group]),
            np.concatenate([part.rows_N for part in group if part.rows_N is not None]),
        )
        for group in groups.values()
    ]


def _read_parts(
    parts: Sequence[_Part],
    size: Sequence[int],
    fill: float,
    out: Array,
    cancel: threading.Event | None = None,
) -> None:
    """Plan and read all parts; errors name the slide and the level."""
    jobs = []
    for part in parts:
        source, plan = part.pyramid._plan(part.level, part.offsets_ND, size)
        if plan.outside.any():
            out[plan.outside if part.rows_N is None else part.rows_N[plan.outside]] = fill
        cache = part.pyramid._cache
        jobs.append(
            ReadJob(source=source, plan=plan, rows_N=part.rows_N, level=part.level.index, cache=cache)
        )
    num_threads = max(part.pyramid._num_threads for part in parts)
    try:
        stats = read_jobs(jobs, out, num_threads=num_threads, cancel=cancel)
    except ChunkError as error:
        reason = " ".join(str(error).split())  # zarr-python also writes several lines
        part = parts[error.job]
        raise SlideError(part.pyramid.slide, f"level {part.level.index}: {reason}") from error
    for part, one in zip(parts, stats, strict=True):
        part.pyramid._count(part.level, one)
