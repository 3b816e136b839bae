"""Tiled and striped TIFF, Aperio SVS among them, read tile by tile; every missing byte is an error.

Shape letters: C channels (samples or pages), Y rows, X columns, S samples of a pixel.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import InputError, SlideError
from ats_stream.io.ngff import MICROMETRES
from ats_stream.io.slides import Closing, OpenSlideSource, describe
from ats_stream.io.tiff_pages import check_pages

if TYPE_CHECKING:
    from pathlib import Path

Array = npt.NDArray[Any]
# decoded tiles kept, so that those under the border of two regions are decoded once
CACHE_BYTES = 64 << 20  # 64 MiB
# a strip can be the whole image; beyond this one read would not be bounded any more
MAX_TILE_BYTES = 1 << 30  # 1 GiB
# resolution tags are often 72 or 96 dots per inch for want of better; no slide is that coarse
MAX_TAG_PIXEL_UM = 100.0
JPEG = 7
PHOTOMETRICS = {1: "MINISBLACK", 2: "RGB", 6: "YCBCR"}


class TiffSlide(Closing):
    """The first image of a TIFF file at full resolution."""

    def __init__(self, path: Path, vendor: str | None) -> None:
        import tifffile

        self.path, self.name = str(path), path.stem
        self._vendor, self._file = vendor, path
        self.source_bytes = path.stat().st_size
        check_pages(path)
        try:
            self._tiff = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError, struct.error) as error:
            raise SlideError(self.path, f"broken TIFF: {error}") from error
        try:
            self._read_facts()
        except SlideError:
            self._tiff.close()
            raise
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
            self._tiff.close()
            raise SlideError(self.path, f"broken TIFF: {type(error).__name__}: {error}") from error
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._cache: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._cache_bytes = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="ats-tiff")

    def _read_facts(self) -> None:
        series: Any = self._tiff.series[0]
        page = series.keyframe
        axes = series.axes
        if axes not in {"YX", "YXS", "SYX", "CYX", "IYX", "QYX"}:
            raise SlideError(self.path, f"TIFF axes {axes} {series.shape} are not an image (channels, y, x)")
        if int(page.photometric) not in PHOTOMETRICS:
            raise SlideError(
                self.path, f"TIFF photometric interpretation {page.photometric!s} is not supported"
            )
        self._page = page
        self._pages: list[Any] = list(series.pages) if axes[0] in "CIQ" else [series.pages[0]]
        self._planar = axes == "SYX"
        # a fourth sample beside red, green and blue is transparency
        num_samples = 1 if axes[-1] == "X" and not self._planar else int(page.samplesperpixel)
        self._samples = 3 if int(page.photometric) in (2, 6) and num_samples == 4 else num_samples
        self.dtype = np.dtype(series.dtype)
        if self.dtype.kind not in "iuf" or self.dtype.itemsize > 4:
            raise SlideError(self.path, f"TIFF pixels of dtype {self.dtype} are not supported")
        channels = len(self._pages) if axes[0] in "CIQ" else self._samples
        self.shape = (channels, int(page.imagelength), int(page.imagewidth))
        y, x = axes.index("Y"), axes.index("X")
        self.level_shapes = tuple((channels, int(v.shape[y]), int(v.shape[x])) for v in series.levels)
        self._tile = (int(page.tilelength), int(page.tilewidth)) if page.is_tiled else self._strip(page)
        self._grid = tuple(-(-n // t) for n, t in zip(self.shape[1:], self._tile, strict=True))
        if self._tile[0] * self._tile[1] * num_samples * self.dtype.itemsize > MAX_TILE_BYTES:
            raise SlideError(
                self.path, f"TIFF strips of {self._tile[0]} x {self._tile[1]} pixels are too large"
            )
        self._check_tiles()
        self.pixel_size_um = tiff_pixel_size_um(self._tiff, page)
        power = aperio_value(page.description, "AppMag") if self._vendor == "aperio" else None
        compression = getattr(page.compression, "name", str(page.compression))
        self.metadata = describe(self._vendor or "tiff", power, compression=compression)
        self.associated_names = self._associated_names()

    def _strip(self, page: Any) -> tuple[int, int]:
        return min(int(page.rowsperstrip), int(page.imagelength)), int(page.imagewidth)

    def _check_tiles(self) -> None:
        """All tiles must lie inside of the file: a copy cut short shows before anything is read."""
        planes = self._samples if self._planar else 1
        expected = self._grid[0] * self._grid[1] * planes
        for page in self._pages:
            if len(page.dataoffsets) < expected or len(page.databytecounts) < expected:
                raise SlideError(
                    self.path, f"broken TIFF: {len(page.dataoffsets)} tiles, expected {expected}"
                )
            for index, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
                if offset + size > self.source_bytes:
                    need = f"{self._tile_name(index)} needs bytes {offset} to {offset + size}"
                    raise SlideError(self.path, f"truncated: {need}, the file has {self.source_bytes}")

    def _tile_name(self, index: int) -> str:
        row, column = divmod(index % (self._grid[0] * self._grid[1]), self._grid[1])
        return f"tile {index} (row {row}, column {column})"

    def _associated_names(self) -> tuple[str, ...]:
        if self._vendor != "aperio":
            return ()
        with OpenSlideSource(self._file, self._vendor) as slide:
            return slide.associated_names

    def read_region(self, y0: int, x0: int, height: int, width: int) -> Array:
        """Decode the tiles under the region, several at once, and put them together."""
        out = np.empty((self.shape[0], height, width), self.dtype)
        rows = range(y0 // self._tile[0], -(-(y0 + height) // self._tile[0]))
        columns = range(x0 // self._tile[1], -(-(x0 + width) // self._tile[1]))
        per_plane = self._grid[0] * self._grid[1]
        planes = range(self._samples if self._planar else 1)

        def place(job: tuple[int, int, int, int]) -> None:
            number, plane, row, column = job
            tile_YXS = self._decode(number, plane * per_plane + row * self._grid[1] + column)
            top, left = row * self._tile[0], column * self._tile[1]
            a, b = max(top, y0), min(top + tile_YXS.shape[0], y0 + height)
            c, d = max(left, x0), min(left + tile_YXS.shape[1], x0 + width)
            part_CYX = tile_YXS[a - top : b - top, c - left : d - left].transpose(2, 0, 1)
            first = number + plane
            out[first : first + part_CYX.shape[0], a - y0 : b - y0, c - x0 : d - x0] = part_CYX

        list(self._pool.map(place, itertools.product(range(len(self._pages)), planes, rows, columns)))
        return out

    def _decode(self, number: int, index: int) -> Array:
        """Tile (Y, X, S) of a page, cut to the image."""
        key = (number, index)
        with self._lock:
            tile = self._cache.get(key)
            if tile is not None:
                self._cache.move_to_end(key)
                return tile
        tile = self._decode_bytes(self._pages[number], index)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = tile
                self._cache_bytes += tile.nbytes
            while self._cache_bytes > CACHE_BYTES and self._cache:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _decode_bytes(self, page: Any, index: int) -> Array:
        offset, size = int(page.dataoffsets[index]), int(page.databytecounts[index])
        name = self._tile_name(index)
        row, column = divmod(index % (self._grid[0] * self._grid[1]), self._grid[1])
        rows = min(self._tile[0], self.shape[1] - row * self._tile[0])
        columns = min(self._tile[1], self.shape[2] - column * self._tile[1])
        if size == 0:
            return self._absent_tile(name, rows, columns)
        try:
            data = os.pread(self._fd, size, offset)
        except OSError as error:
            raise SlideError(self.path, f"cannot read {name}: {error.strerror}") from error
        if len(data) != size:
            raise SlideError(self.path, f"truncated: {name} has {len(data)} of {size} bytes")
        # decoders fill what is missing of a cut off JPEG with grey and report nothing
        if int(page.compression) == JPEG and b"\xff\xd9" not in data[-16:]:
            raise SlideError(self.path, f"damaged: the JPEG data of {name} do not end as they must")
        try:
            decoded: Any = self._page.decode(
                data, index, jpegtables=self._page.jpegtables, jpegheader=self._page.jpegheader
            )[0]
        except Exception as error:  # decoders of many libraries raise what they like
            reason = f"damaged: {name} cannot be decoded: {type(error).__name__}: {error}"
            raise SlideError(self.path, reason) from error
        tile_YXS: Array = decoded[0][:rows, :columns, : self._samples if not self._planar else 1]
        if tile_YXS.shape[:2] != (rows, columns):
            got = f"{tile_YXS.shape[0]} x {tile_YXS.shape[1]}"
            raise SlideError(self.path, f"damaged: {name} has {got} pixels, expected {rows} x {columns}")
        return np.ascontiguousarray(tile_YXS)

    def _absent_tile(self, name: str, rows: int, columns: int) -> Array:
        """Files of measured values leave tiles without data out; in a colour slide that is damage."""
        if self._samples == 3:
            raise SlideError(self.path, f"damaged: {name} has no bytes")
        samples = self._samples if not self._planar else 1
        return np.full((rows, columns, samples), self._page.nodata, self.dtype)

    def associated(self, name: str) -> Array:
        """One associated image of an Aperio slide."""
        if name not in self.associated_names:
            raise InputError(f"{self.path}: no associated image {name!r}, there are {self.associated_names}")
        with OpenSlideSource(self._file, "aperio") as slide:
            return slide.associated(name)

    def close(self) -> None:
        """Close the file and the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tiff.close()
        os.close(self._fd)


def aperio_value(description: str, key: str) -> str | None:
    """A value of an Aperio image description.

    >>> aperio_value("Aperio v1 |AppMag = 20|MPP = 0.499", "MPP")
    '0.499'
    """
    for part in description.split("|")[1:]:
        name, _, value = part.partition("=")
        if name.strip() == key:
            return value.strip()
    return None


def tiff_pixel_size_um(tiff: Any, page: Any) -> tuple[float, float] | None:
    """Pixel size (y, x): from Aperio's MPP, else OME's physical size, else a believable resolution tag."""
    if tiff.is_svs:
        mpp = aperio_value(page.description, "MPP")
        return _pair(mpp, mpp)
    if tiff.is_ome:
        return ome_pixel_size_um(tiff.ome_metadata or "")
    unit = page.tags.get("ResolutionUnit")
    # without the tag the unit is the inch
    unit_um = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit is not None else 2)
    tags = [page.tags.get(name) for name in ("YResolution", "XResolution")]
    if unit_um is None or any(tag is None for tag in tags):
        return None
    values = [tag.value for tag in tags]
    if any(n <= 0 or d <= 0 for n, d in values):
        return None
    pair = _pair(*(unit_um * d / n for n, d in values))
    return pair if pair is not None and max(pair) <= MAX_TAG_PIXEL_UM else None


def ome_pixel_size_um(xml: str) -> tuple[float, float] | None:
    """Pixel size (y, x) of OME-XML.

    >>> ome_pixel_size_um('<Pixels PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5"/>')
    (0.5, 0.5)
    """
    short = {"nm": "nanometer", "mm": "millimeter", "cm": "centimeter", "m": "meter"}
    found = []
    for axis in "YX":
        size = re.search(rf'PhysicalSize{axis}="([^"]+)"', xml)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', xml)
        if size is None:
            return None
        # the default unit is the micrometre, which comes with either of two mu signs
        name = short.get(unit.group(1)) if unit is not None else "micrometer"
        if name is None and unit is not None and unit.group(1) not in {"\u00b5m", "\u03bcm", "um"}:
            return None
        try:
            found.append(float(size.group(1)) * MICROMETRES[name or "micrometer"])
        except ValueError:
            return None
    return _pair(*found)


def _pair(y: Any, x: Any) -> tuple[float, float] | None:
    try:
        pair = (float(y), float(x))
    except (TypeError, ValueError):
        return None
    return pair if all(0 < v < float("inf") for v in pair) else None
