"""Reading pyramids: whole levels, boxes, patches, thumbnails, label images.

Shape letters: N patches, C channels, D space axes; ``*space`` are the sampled axes: y x, z y x, t y x or
t z y x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError
from ats_stream.io.reader import LevelReader, merged, read_parts
from ats_stream.io.reduce import shrink
from ats_stream.io.views import VIEW_CACHE_BYTES, VIEWS, fingerprint, frozen

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from ats_stream.io.fetch import ReadStats
    from ats_stream.io.ngff import Channel
    from ats_stream.io.pyramid_info import Level, PyramidInfo
    from ats_stream.io.sources import ChunkSource
    from ats_stream.io.storage.stores import Store

Array = npt.NDArray[Any]
# pixels of a level that a thumbnail holds at once
THUMBNAIL_GAP = 8
THUMBNAIL_STRIP_PX = 16 << 20


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
        self._info, self._store = info, store
        self._labels: dict[str, Pyramid] = {}
        self._reader = LevelReader(
            info.slide, info.levels, sources, cache_bytes=cache_bytes, num_threads=num_threads
        )

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
    def sources(self) -> tuple[ChunkSource, ...]:
        """Where the chunks of each level come from."""
        return self._reader.sources

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
        """A label image as a pyramid of one integer channel, opened once; InputError for an unknown name."""
        from ats_stream.io.opening import open_inside

        if name in self._labels:
            return self._labels[name]
        places = dict(self._info.labels)
        if self._store is None or name not in places:
            raise InputError(f"{self.slide}: no label {name!r}, there are {sorted(places)}")
        opened = open_inside(
            self._store,
            places[name],
            cache_bytes=self._reader.cache_bytes,
            num_threads=self._reader.num_threads,
        )
        return self._labels.setdefault(name, opened)

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
        self,
        level: int | Level,
        start: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        *,
        out: Array | None = None,
        is_once: bool = False,
    ) -> Array:
        """Read a box of the level, by default all of it; ``start`` and ``stop`` are over (C, *space).

        ``out``, if given, is filled and returned. ``is_once`` says that the box is not read again: of its
        chunks the cache, if there is one, then keeps only those that reach out of it. Raises InputError for a
        box that reaches outside or does not fit into memory, or an ``out`` that does not fit the box,
        SlideError when the store is damaged.
        """
        target = self._reader.level(level)
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
        if out is not None and (out.shape != size or out.dtype != target.dtype):
            raise InputError(f"out must be {target.dtype} {size}, got {out.dtype} {out.shape}")
        return self._reader.box(target, first, size, out=out, is_once=is_once)

    def view(
        self,
        level: int | Level,
        *,
        cache_bytes: int = VIEW_CACHE_BYTES,
        derived: tuple[Hashable, Callable[[Array], Array]] | None = None,
    ) -> Array:
        """All of a level (C, *space), read-only, from memory if this process has read it before.

        The process keeps the views used last, ``cache_bytes`` of them at most, for all pyramids of the same
        image; 0 neither takes nor keeps any. A view is read again when the file or any key of the store that
        holds it has changed: each call asks the file system, or the server by a request of the head of each
        key. ``derived`` is the name of something else that is made of the pixels, and the function that makes
        it. Errors as in :meth:`read`.
        """
        target = self._reader.level(level)
        name, make = derived or (None, lambda pixels: pixels)
        known = fingerprint(self._reader.sources[target.index], target.index) if cache_bytes > 0 else None
        if known is None:
            return frozen(make(self.read(target))).view()
        key, stamp = known
        return VIEWS.get((key, name), stamp, lambda: make(self._reader.afresh(target)), max_bytes=cache_bytes)

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

    def read_stats(self, level: int | Level) -> ReadStats:
        """What was read from a level since the pyramid was opened in this process; the counts only grow."""
        return self._reader.stats(self._reader.level(level))

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

        target = self._reader.level(level)
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
    parts = [pyramid._reader.part(level, offsets, size) for pyramid, level, offsets in requests]
    kinds = {(part.level.dtype.name, part.level.shape[0]) for part in parts}
    if len(kinds) > 1:
        raise InputError(f"read_batch spans images of different dtype and channels: {sorted(kinds)}")
    top, num_patches = parts[0].level, sum(len(part.offsets_ND) for part in parts)
    shape = (num_patches, top.shape[0], *size)
    if out is None:
        out = parts[0].reader.empty(shape, top.dtype)
    elif out.shape != shape or out.dtype != top.dtype:
        raise InputError(f"out must be {top.dtype} {shape}, got {out.dtype} {out.shape}")
    read_parts(merged(parts), shape[1:], fill, out, cancel)
    return out
