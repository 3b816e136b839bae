"""Opening slide files and arrays as sources for conversion: full-resolution pixels by region, and facts.

Aperio SVS and other tiled TIFF are read tile by tile through tifffile, which is exact against OpenSlide and
also knows WebP and 16 bit; formats whose tiles overlap or need stitching go through OpenSlide.
Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError, SlideError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from types import TracebackType

Array = npt.NDArray[Any]
# rows that OpenSlide reads per call: its pictures have four bytes per pixel
OPENSLIDE_ROWS = 512
# pictures that Pillow opens are held in memory as a whole
MAX_PICTURE_PX = 400 << 20
# formats that OpenSlide knows and whose level 0 is plain tiles of a TIFF
PLAIN_TIFF_VENDORS = frozenset({"aperio", "generic-tiff"})


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


class OpenSlideSource(Closing):
    """A slide through OpenSlide; RGB, transparent parts filled with the slide's background colour."""

    def __init__(self, path: Path, vendor: str) -> None:
        import openslide

        self.path, self.name = str(path), path.stem
        try:
            self._slide = openslide.OpenSlide(str(path))
            sizes = self._slide.level_dimensions
            properties = dict(self._slide.properties)
            self.associated_names = tuple(self._slide.associated_images)
        except openslide.OpenSlideError as error:
            raise SlideError(str(path), f"OpenSlide cannot open it: {error}") from error
        self.level_shapes = tuple((3, h, w) for w, h in sizes)
        self.shape = self.level_shapes[0]
        self.dtype = np.dtype(np.uint8)
        self.pixel_size_um = _sizes(properties.get("openslide.mpp-y"), properties.get("openslide.mpp-x"))
        self.metadata = describe(vendor, properties.get("openslide.objective-power"))
        self.source_bytes = path.stat().st_size
        color = properties.get("openslide.background-color", "FFFFFF")
        self._background = np.frombuffer(bytes.fromhex(color), np.uint8)

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """Read in strips of rows, two at a time; OpenSlide is safe between threads."""
        out = np.empty((3, height, width), np.uint8)

        def read(row: int) -> None:
            rows = min(OPENSLIDE_ROWS, height - row)
            strip_CYX = self._read_strip(y0 + row, x0, rows, width)
            out[:, row : row + rows] = strip_CYX

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, range(0, height, OPENSLIDE_ROWS)))
        return out

    def _read_strip(self, y0: int, x0: int, height: int, width: int) -> Array:
        import openslide

        try:
            picture = self._slide.read_region((x0, y0), 0, (width, height))
        except openslide.OpenSlideError as error:
            reason = (
                f"OpenSlide cannot read rows {y0} to {y0 + height}, columns {x0} to {x0 + width}: {error}"
            )
            raise SlideError(self.path, reason) from error
        return opaque(np.asarray(picture), self._background).transpose(2, 0, 1)

    def associated(self, name: str) -> Array:
        """Decode one associated image."""
        import openslide

        if name not in self.associated_names:
            raise InputError(f"{self.path}: no associated image {name!r}, there are {self.associated_names}")
        try:
            picture = self._slide.associated_images[name]
        except openslide.OpenSlideError as error:
            raise SlideError(
                self.path, f"OpenSlide cannot read associated image {name!r}: {error}"
            ) from error
        return opaque(np.asarray(picture), self._background).transpose(2, 0, 1)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def opaque(rgba_YXC: Array, background: Array) -> Array:
    """RGB of a picture over a background colour; already opaque pixels are copied as they are.

    >>> opaque(np.array([[[9, 9, 9, 255], [0, 0, 0, 0]]], np.uint8), np.full(3, 255, np.uint8)).tolist()
    [[[9, 9, 9], [255, 255, 255]]]
    """
    rgb_YXC: Array = rgba_YXC[..., :3]
    alpha_YX = rgba_YXC[..., 3]
    if bool((alpha_YX == 255).all()):
        return rgb_YXC
    share = alpha_YX[..., None].astype(np.uint16)
    mixed: Array = (rgb_YXC * share + background * (255 - share) + 127) // 255
    return mixed.astype(np.uint8)


def describe(vendor: str, objective_power: Any, **more: Any) -> dict[str, Any]:
    """The metadata that are copied to a pyramid, and no others: vendor, objective power, compression."""
    facts: dict[str, Any] = {"vendor": vendor, **more}
    try:
        facts["objective_power"] = float(objective_power)
    except (TypeError, ValueError):
        return facts
    return facts


def _sizes(y: Any, x: Any) -> tuple[float, float] | None:
    try:
        pair = (float(y), float(x))
    except (TypeError, ValueError):
        return None
    return pair if all(0 < v < float("inf") for v in pair) else None


def open_slide(path: str | os.PathLike[str]) -> SlideSource:
    """Open a slide or picture file as a source to be closed after use, best in a ``with`` block.

    Raises SlideError, naming the file, when it does not exist, is no slide, or is cut short.
    """
    import openslide

    from ats_stream.io.tiff import TiffSlide
    from ats_stream.io.tiff_pages import is_tiff

    path = Path(path)
    if not path.exists():
        raise SlideError(str(path), "no such file")
    if not path.is_file():
        raise SlideError(str(path), "not a file")
    try:
        vendor = openslide.OpenSlide.detect_format(str(path))
        if vendor is not None and vendor not in PLAIN_TIFF_VENDORS:
            return OpenSlideSource(path, vendor)
        if is_tiff(path):
            return TiffSlide(path, vendor)
        return _open_picture(path)
    except OSError as error:
        raise SlideError(str(path), f"cannot read it: {error.strerror or error}") from error


def _open_picture(path: Path) -> ArraySlide:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PICTURE_PX:
                raise SlideError(
                    str(path), f"too large for a plain picture: {picture.width} x {picture.height}"
                )
            kind = "L" if picture.mode in {"1", "L", "I;16", "I", "F"} else "RGB"
            pixels = np.asarray(picture if picture.mode == "I;16" else picture.convert(kind))
            vendor = str(picture.format).lower()
    except UnidentifiedImageError as error:
        raise SlideError(str(path), "not a slide: neither OpenSlide, tifffile nor Pillow knows it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, SlideError):
            raise
        raise SlideError(str(path), f"broken picture: {error}") from error
    image_CYX = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return ArraySlide(
        image_CYX,
        name=path.stem,
        metadata=describe(vendor, None),
        path=str(path),
        source_bytes=path.stat().st_size,
    )


def associated_images(slide: SlideSource) -> Iterator[tuple[str, Array]]:
    """Name and pixels (C, y, x) of every associated image."""
    for name in slide.associated_names:
        yield name, slide.associated(name)
