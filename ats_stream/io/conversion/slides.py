"""What conversions read from: slide, picture and video files, OME-Zarr stores, arrays. Full-resolution pixels
by region, and facts.

Shape letters: C channels, Y rows, X columns; ``*space`` are the sampled axes of a pyramid.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError, SlideError
from ats_stream.io.array_pyramid import DEFAULT_AXES, SPACE_AXES
from ats_stream.io.conversion.manifest import SourceStamp
from ats_stream.io.formats.parts import file_stamp
from ats_stream.io.opening import open_pyramid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from ats_stream.io import ngff
    from ats_stream.io.formats.parts import FileParts, Stamp
    from ats_stream.io.pyramid import Pyramid

Array = npt.NDArray[Any]
# decoded tiles kept while a slide is converted, and threads that decode them
CACHE_BYTES = 64 << 20  # 64 MiB
MAX_THREADS = 8
WHERE = "array in memory"


class SlideSource(Protocol):
    """Pixels of an image at full resolution, and what is known about it."""

    path: str
    name: str
    axes: tuple[str, ...]
    """``c`` first, then the space axes."""
    shape: tuple[int, ...]
    """(C, *space)."""
    dtype: np.dtype[Any]
    pixel_size_um: tuple[float, ...] | None
    """Per space axis, NaN along time; None when the file does not say."""
    metadata: dict[str, Any]
    """What may be copied to a pyramid; never names, dates, or identifiers."""
    channels: tuple[ngff.Channel, ...]
    """Empty when nothing is known of them."""
    level_shapes: tuple[tuple[int, ...], ...]
    """Levels that the file itself has, finest first."""
    associated_names: tuple[str, ...]
    stamp: SourceStamp | None
    """By what it is known again; None when it cannot be."""
    parts: FileParts | None
    """What a reader of files found, None for what is no file."""

    @property
    def source_bytes(self) -> int:
        """Bytes of the files, or of the array."""

    def read(self, start: Sequence[int], stop: Sequence[int], out: Array | None = None) -> Array:
        """Pixels of a box (C, *space) of level 0 that lies inside the image and is read once.

        ``out`` is memory for them, which may be used or not: they are where the result says.
        """

    def stamp_now(self) -> SourceStamp | None:
        """The stamp as it is now: another one means that the source was changed since it was opened."""

    def associated(self, name: str) -> Array:
        """One associated image (C, y, x), such as ``label`` or ``macro``."""

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """Context manager over ``close``."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArraySlide(Closing):
    """An array (C, *space): numpy, a memory map, dask, or whatever has shape, dtype and slices.

    One space axis is stored as an image of one row. A numpy array is known again by the checksum of its
    pixels, a dask array by its name, which dask derives from what it is computed from; others are not.
    """

    parts: FileParts | None = None

    def __init__(
        self,
        array: Any,
        *,
        axes: Sequence[str] | None = None,
        name: str = "array",
        pixel_size_um: Sequence[float] | None = None,
        channels: tuple[ngff.Channel, ...] = (),
    ) -> None:
        """InputError for what is no image."""
        names = tuple(axes) if axes is not None else {2: ("c", "x"), **DEFAULT_AXES}.get(len(array.shape), ())
        shape = tuple(int(n) for n in array.shape)
        self._is_line = names == ("c", "x")
        if names[:1] != ("c",) or not (self._is_line or names[1:] in SPACE_AXES):
            raise InputError(f"axes of an image are c, then x, y x, z y x, t y x or t z y x, got {names}")
        if len(shape) != len(names) or min(shape) < 1 or np.dtype(array.dtype).kind not in "iuf":
            expected = ", ".join(names) if axes is not None else "C, y, x"
            raise InputError(f"an image must be numbers ({expected}), got {array.dtype} {shape}")
        self._array = array
        self.path, self.name = WHERE, name
        self.axes = ("c", "y", "x") if self._is_line else names
        self.shape: tuple[int, ...] = (shape[0], 1, shape[1]) if self._is_line else shape
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self.pixel_size_um = self._sizes(pixel_size_um)
        self.metadata: dict[str, Any] = {}
        self.channels = channels
        self.level_shapes: tuple[tuple[int, ...], ...] = (self.shape,)
        self.associated_names: tuple[str, ...] = ()
        self.source_bytes = math.prod(shape) * self.dtype.itemsize
        self.stamp = self._stamp()

    def _sizes(self, given: Sequence[float] | None) -> tuple[float, ...] | None:
        if given is None:
            return None
        sizes = tuple(float(v) for v in given)
        sizes = (*sizes, *sizes) if self._is_line and len(sizes) == 1 else sizes
        if len(sizes) != len(self.shape) - 1:
            raise InputError(f"pixel_size_um needs one number for each of {self.axes[1:]}, got {sizes}")
        return sizes

    def stamp_now(self) -> SourceStamp | None:
        """The one it was opened with: whoever changes an array while it is converted knows."""
        return self.stamp

    def _stamp(self) -> SourceStamp | None:
        if isinstance(self._array, np.ndarray):
            # the buffer of an array with gaps would be a copy of all of it
            if not self._array.flags.c_contiguous:
                return None
            flat: Any = self._array.reshape(-1).view(np.uint8)
            token = f"{google_crc32c.value(flat):08x}"
        elif hasattr(self._array, "__dask_tokenize__"):
            token = str(self._array.name)
        else:
            return None
        return SourceStamp(name=token, nbytes=self.source_bytes, mtime_ns=0)

    def lazy(self, start: Sequence[int], stop: Sequence[int]) -> Any:
        """A part of the array (C, *space) as one dask ``Delayed``, in the graph of the whole array."""
        import dask.array

        from_array: Any = dask.array.from_array
        if not isinstance(self._array, dask.array.Array):
            self._array = from_array(self._array, chunks="auto")
        part = self._array[self._box(start, stop)].astype(self.dtype)
        part = (part[:, None] if self._is_line else part).rechunk(-1)
        # not optimised: parts that are optimised one by one have no blocks in common any more
        return part.to_delayed(optimize_graph=False).ravel()[0]

    def _box(self, start: Sequence[int], stop: Sequence[int]) -> tuple[slice, ...]:
        box = [slice(a, b) for a, b in zip(start, stop, strict=True)]
        if self._is_line:
            del box[1]
        return tuple(box)

    def read(self, start: Sequence[int], stop: Sequence[int], _out: Array | None = None) -> Array:
        """A part of the array, a view where that can be; a lazy one is computed here."""
        try:
            part = np.asarray(self._array[self._box(start, stop)], dtype=self.dtype)
        except Exception as error:  # what computes the array may raise anything
            where = f"box {tuple(start)} to {tuple(stop)}"
            reason = f"{where} cannot be computed: {type(error).__name__}: {error}"
            raise SlideError(self.path, " ".join(reason.split())) from error
        return part[:, None] if self._is_line else part

    def associated(self, name: str) -> Array:
        """Arrays have none."""
        raise InputError(f"{self.path}: no associated image {name!r}")


class PyramidSlide(Closing):
    """Level 0 of a pyramid, that of an OME-Zarr store for instance."""

    parts: FileParts | None = None

    def __init__(self, pyramid: Pyramid, stamp: SourceStamp | None) -> None:
        top = pyramid.levels[0]
        self._pyramid = pyramid
        self.path, self.name, self.axes = pyramid.slide, pyramid.name, pyramid.axes
        # masks are stored as numbers
        self.dtype = np.dtype(np.uint8) if top.dtype == bool else top.dtype
        self.level_shapes = tuple(level.shape for level in pyramid.levels)
        self.shape = top.shape
        self.pixel_size_um = top.pixel_size_um
        self.metadata = dict(pyramid.metadata)
        self.channels = pyramid.channels
        self.stamp = stamp
        self.associated_names = pyramid.associated_names

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of the files; 0 for what lies behind a URL."""
        path = Path(self.path)
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else 0

    def stamp_now(self) -> SourceStamp | None:
        """From the metadata of the store as they are now."""
        return _store_stamp(self._pyramid)

    def read(self, start: Sequence[int], stop: Sequence[int], out: Array | None = None) -> Array:
        """Decode the chunks under the box, several at once, and put them together."""
        fits = out is not None and self._pyramid.levels[0].dtype == out.dtype
        pixels = self._pyramid.read(0, start, stop, out=out if fits else None, is_once=True)
        return pixels.astype(self.dtype, copy=False)

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """Pixels (C, height, width) of level 0 of an image (C, y, x)."""
        return self.read((0, y0, x0), (self.shape[0], y0 + height, x0 + width))

    def read_level(self, level: int, start: Sequence[int], stop: Sequence[int]) -> Array:
        """Pixels of a box (C, *space) of one of its own levels."""
        return self._pyramid.read(level, start, stop)

    def associated(self, name: str) -> Array:
        """Decode one associated image."""
        return self._pyramid.associated(name)


class FileSlide(PyramidSlide):
    """A slide, picture, TIFF or video file, read through its pyramid."""

    def __init__(self, parts: FileParts, num_threads: int | None = None) -> None:
        from ats_stream.io.formats.slide_pyramid import pyramid_of

        # tiles under the border of two regions are decoded once
        threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
        pyramid = pyramid_of(parts, cache_bytes=CACHE_BYTES, num_threads=threads)
        companions = parts.companions()
        stamp = _files_stamp(parts.path, [parts.stamp, *map(file_stamp, companions)])
        super().__init__(pyramid, stamp)
        self.source_bytes = stamp.nbytes
        self.parts = parts
        self._files = (parts.path, *map(str, companions))
        # of axes without a size (time) nothing is known
        self.pixel_size_um = parts.pixel_size_um

    def stamp_now(self) -> SourceStamp | None:
        """Size and time of change of the slide's files; None when one is gone."""
        try:
            stamps = [file_stamp(path) for path in self._files]
        except OSError:
            return None
        return _files_stamp(self.path, stamps)


def _files_stamp(path: str, stamps: Sequence[Stamp]) -> SourceStamp:
    """What tells that any file of a slide was changed: their bytes together, and the latest change."""
    return SourceStamp(
        name=Path(path).name,
        nbytes=sum(nbytes for nbytes, _ in stamps),
        mtime_ns=max(mtime_ns for _, mtime_ns in stamps),
    )


def open_slide(path: str | os.PathLike[str], *, num_threads: int | None = None) -> FileSlide:
    """Open a slide, picture or video file as a source to be closed after use, best in a ``with`` block.

    Raises SlideError, naming the file, when it does not exist, is no slide, or is cut short.
    """
    from ats_stream.io.formats.slide_pyramid import file_parts

    return FileSlide(file_parts(path), num_threads)


def open_source(
    source: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    num_threads: int | None = None,
) -> PyramidSlide:
    """Open whatever ``open_pyramid`` reads as a source: a file, or an OME-Zarr image in a folder, in a zip or
    behind a URL. Raises SlideError, naming it, when it cannot be read.
    """
    text = os.fspath(source)
    path = Path(text)
    if "://" not in text and (path.is_file() or not path.exists()) and path.suffix.lower() != ".zip":
        return open_slide(text, num_threads=num_threads)
    pyramid = open_pyramid(
        text,
        storage_options=storage_options,
        cache_bytes=CACHE_BYTES,
        num_threads=num_threads or min(MAX_THREADS, os.cpu_count() or 1),
    )
    return PyramidSlide(pyramid, _store_stamp(pyramid))


def _store_stamp(pyramid: Pyramid) -> SourceStamp:
    """What a store's metadata tell of it, and when they were written, where that is known."""
    facts = [[level.shape, level.dtype.name, level.chunk_shape, level.downsample] for level in pyramid.levels]
    digest = hashlib.sha256(json.dumps([pyramid.name, facts]).encode()).hexdigest()[:16]
    path = Path(pyramid.slide)
    found = [p.stat() for p in (path, path / "zarr.json", path / ".zattrs") if p.exists()]
    return SourceStamp(
        name=f"{path.name} {digest}",
        nbytes=sum(one.st_size for one in found),
        mtime_ns=max((one.st_mtime_ns for one in found), default=0),
    )


def associated_images(slide: SlideSource) -> Iterator[tuple[str, Array]]:
    """Name and pixels (C, y, x) of every associated image."""
    for name in slide.associated_names:
        yield name, slide.associated(name)
