"""Slide files and arrays as sources for conversion: full-resolution pixels by region, and facts.

Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError, SlideError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from ats_stream.io.parts import FileParts

Array = npt.NDArray[Any]
# decoded tiles kept while a slide is converted, and threads that decode them
CACHE_BYTES = 64 << 20  # 64 MiB
MAX_THREADS = 8


class SlideSource(Protocol):
    """Pixels of a slide at full resolution, and what is known about them."""

    path: str
    name: str
    shape: tuple[int, int, int]
    """(C, y, x)."""
    dtype: np.dtype[Any]
    pixel_size_um: tuple[float, float] | None
    """(y, x), None when the file does not say."""
    metadata: dict[str, Any]
    """What may be copied to a pyramid; never names, dates, or identifiers."""
    level_shapes: tuple[tuple[int, int, int], ...]
    """Levels that the file itself has, finest first."""
    associated_names: tuple[str, ...]
    source_bytes: int

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """Pixels (C, height, width) of level 0; the region lies inside the image."""

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
    """An array (C, y, x) as a slide: numpy, a memory map, dask, or whatever has shape, dtype and slices."""

    def __init__(
        self,
        array: Any,
        *,
        name: str = "array",
        pixel_size_um: tuple[float, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        path: str = "array in memory",
        source_bytes: int | None = None,
    ) -> None:
        if len(array.shape) != 3 or min(array.shape) < 1 or np.dtype(array.dtype).kind not in "iuf":
            raise InputError(f"an image must be numbers (C, y, x), got {array.dtype} {tuple(array.shape)}")
        self._array = array
        self.path, self.name = path, name
        channels, height, width = (int(n) for n in array.shape)
        self.shape = (channels, height, width)
        self.dtype = np.dtype(array.dtype)
        self.pixel_size_um = pixel_size_um
        self.metadata = dict(metadata or {})
        self.level_shapes: tuple[tuple[int, int, int], ...] = (self.shape,)
        self.associated_names: tuple[str, ...] = ()
        whole = channels * height * width * self.dtype.itemsize
        self.source_bytes = whole if source_bytes is None else source_bytes

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """A part of the array; a lazy one is computed here."""
        return np.asarray(self._array[:, y0 : y0 + height, x0 : x0 + width])

    def associated(self, name: str) -> Array:
        """Arrays have none."""
        raise InputError(f"{self.path}: no associated image {name!r}")


class FileSlide(Closing):
    """A slide, picture or TIFF file as the source of a conversion, read through its pyramid."""

    def __init__(self, parts: FileParts) -> None:
        """SlideError when it is no image (channels, y, x)."""
        from ats_stream.io.slide_pyramid import pyramid_of

        top = parts.sources[0]
        self.path, self.name, self.dtype = parts.path, parts.name, top.dtype
        if parts.axes != ("c", "y", "x"):
            found = f"axes {', '.join(parts.axes)} {top.shape} are not an image (c, y, x)"
            raise SlideError(parts.path, found)
        self.level_shapes = tuple((s.shape[0], s.shape[1], s.shape[2]) for s in parts.sources)
        self.shape = self.level_shapes[0]
        sizes = parts.pixel_size_um
        self.pixel_size_um = (sizes[-2], sizes[-1]) if sizes is not None else None
        self.metadata = dict(parts.metadata)
        self.source_bytes = parts.stamp[0]
        # tiles under the border of two regions are decoded once
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._pyramid = pyramid_of(parts, cache_bytes=CACHE_BYTES, num_threads=threads)
        self.associated_names = self._pyramid.associated_names

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """Decode the tiles under the region, several at once, and put them together."""
        return self._pyramid.read(0, (0, y0, x0), (self.shape[0], y0 + height, x0 + width))

    def associated(self, name: str) -> Array:
        """Decode one associated image."""
        return self._pyramid.associated(name)


def open_slide(path: str | os.PathLike[str]) -> SlideSource:
    """Open a slide or picture file as a source to be closed after use, best in a ``with`` block.

    Raises SlideError, naming the file, when it does not exist, is no slide, or is cut short.
    """
    from ats_stream.io.slide_pyramid import file_parts

    return FileSlide(file_parts(path))


def associated_images(slide: SlideSource) -> Iterator[tuple[str, Array]]:
    """Name and pixels (C, y, x) of every associated image."""
    for name in slide.associated_names:
        yield name, slide.associated(name)
