"""One level of a TIFF file as a source of chunks: each tile or strip of each page is a chunk, read where it
stands in the file and decoded through imagecodecs.

Shape letters: C channels, Y rows, X columns, S samples of a pixel, F pages of the level, T tiles of a page.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.io.formats.image_header import JPEG_END, jpeg2000_size, jpeg_size, webp_size
from ats_stream.io.formats.kept import Kept
from ats_stream.io.formats.parts import Stamp, check_stamp, whole_grid
from ats_stream.io.jpeg import JpegFormat
from ats_stream.io.layout import MAX_CHUNK_BYTES, check_bounds
from ats_stream.io.sources import OPEN_FLAGS, ChunkError, RawChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ats_stream.io.sources import Place

Array = npt.NDArray[Any]
# black is zero, RGB, YCbCr
PHOTOMETRICS = frozenset({1, 2, 6})
JPEG = 7
_JPEG2000 = frozenset({33003, 33004, 33005, 34712})
_WEBP = frozenset({50001, 34927})
# decoders that are told how many bytes may come out: none, LZW, deflate, PackBits, LZMA, Zstandard
_BOUNDED = frozenset({1, 5, 8, 32946, 32773, 34925, 50000, 34926})
COMPRESSIONS = _BOUNDED | _JPEG2000 | _WEBP | {JPEG}
_SIZES: dict[int, Callable[[bytes], tuple[int, int, int]]] = {
    JPEG: jpeg_size,
    **dict.fromkeys(_JPEG2000, jpeg2000_size),
    **dict.fromkeys(_WEBP, webp_size),
}
# what decoders add for every tile at most, whatever its size
_SLACK_BYTES = 1 << 16
# rows without compression are read in pieces of about this size, however the file cuts them
PLAIN_BYTES = 256 << 10  # 256 KiB
# letters of tifffile that mean channels, and those that become axes of a pyramid, in the pyramid's order
CHANNEL_LETTERS = "CIQ"
SPACE_LETTERS = "TZ"


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """What turns the bytes of a tile into pixels."""

    page_decode: Callable[..., Any]
    tables: bytes | None
    header: bytes | None
    is_jfif: bool
    jpeg: JpegFormat | None
    """How whole tiles of 8 bits are decoded faster than tifffile does, to the same pixels."""


# a decoder holds what tifffile knows of a file, megabytes of a large slide, so not all of them are kept
MAX_DECODERS = 128
_decoders: Kept[_Decoding] = Kept(MAX_DECODERS)


class TiffLevel:
    """Chunks (C, *space) of one level of one series of a TIFF file."""

    def __init__(self, path: str, stamp: Stamp, tiff: Any, series: int, level: int) -> None:
        """Read the facts of an open file; ValueError when they are not those of an image."""
        self.path, self.stamp, self.series, self.level = path, stamp, series, level
        found = tiff.series[series].levels[level]
        page = found.keyframe
        self._read_axes(found, page)
        self._read_tiles(page)
        self.compression = int(page.compression)
        self.compression_name = compression_name(page)
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"TIFF compression {self.compression_name} is not supported")
        self.fill_value = np.asarray(page.nodata).astype(self.dtype)[()]
        self._read_offsets(tiff, found)
        _decoders.get(self._key, lambda: _decoding_of(page))

    def _read_axes(self, found: Any, page: Any) -> None:
        axes, shape = str(found.axes), tuple(int(n) for n in found.shape)
        sizes = dict(zip(axes, shape, strict=True))
        if len(sizes) != len(axes) or not axes.rstrip("S").endswith("YX") or int(page.imagedepth) != 1:
            raise ValueError(f"TIFF axes {axes} {shape} are not an image (channels, y, x)")
        if int(page.photometric) not in PHOTOMETRICS:
            raise ValueError(f"TIFF photometric interpretation {page.photometric!s} is not supported")
        self.dtype = np.dtype(found.dtype).newbyteorder("=")
        if self.dtype.kind not in "iuf" or self.dtype.itemsize > 8:
            raise ValueError(f"TIFF pixels of dtype {self.dtype} are not supported")
        lead = [a for a in axes if a not in "SYX"]
        others = [a for a in lead if a not in CHANNEL_LETTERS + SPACE_LETTERS and sizes[a] > 1]
        channel = [a for a in lead if a in CHANNEL_LETTERS]
        if others or len(channel) > 1:
            raise ValueError(f"TIFF axes {axes} {shape} are not an image (channels, y, x)")
        self._is_planar = axes.endswith("SYX")
        self._stored_samples = sizes.get("S", 1)
        self.photometric = int(page.photometric)
        is_color = self.photometric in (2, 6)
        # a fourth sample beside red, green and blue is transparency
        self.samples = 3 if is_color and self._stored_samples == 4 else self._stored_samples
        self.is_color = self.samples == 3
        space = [a for a in SPACE_LETTERS if a in lead and sizes[a] > 1]
        num_channels = math.prod(sizes[a] for a in channel) * self.samples
        self.axes = ("c", *(a.lower() for a in space), "y", "x")
        self.shape = (num_channels, *(sizes[a] for a in space), sizes["Y"], sizes["X"])
        if min(self.shape) < 1:
            raise ValueError(f"TIFF image without pixels: {shape}")
        self._lead_shape = tuple(sizes[a] for a in lead)
        # position of every leading axis of the file in a place (c, *space) of a chunk, None for length 1
        self._lead_from = tuple(
            0 if a in channel else 1 + space.index(a) if a in space else None for a in lead
        )

    def _read_tiles(self, page: Any) -> None:
        height, width = self.shape[-2:]
        self.is_tiled = bool(page.is_tiled)
        if (int(page.imagelength), int(page.imagewidth)) != (height, width):
            raise ValueError(f"TIFF page of {page.imagelength} x {page.imagewidth} pixels in {self.shape}")
        if self.is_tiled:
            self.tile = (int(page.tilelength), int(page.tilewidth))
        else:
            self.tile = (min(int(page.rowsperstrip), height), width)
        self._plain = _plain_layout(page) if int(page.compression) == 1 else None
        if self._plain is not None:
            # a run of rows without compression may be read in pieces of any height
            row_bytes = width * self._plain.itemsize * (1 if self._is_planar else self._stored_samples)
            self.tile = (min(height, max(1, PLAIN_BYTES // row_bytes)), width)
        if min(self.tile) < 1:
            raise ValueError(f"TIFF tiles of {self.tile[0]} x {self.tile[1]} pixels")
        per_chunk = 1 if self._is_planar else self.samples
        self._tile_bytes = (
            math.prod(self.tile) * self.dtype.itemsize * (1 if self._is_planar else self._stored_samples)
        )
        if self._tile_bytes > MAX_CHUNK_BYTES:
            kind = "tiles" if self.is_tiled else "strips"
            raise ValueError(f"TIFF {kind} of {self.tile[0]} x {self.tile[1]} pixels are too large")
        self.grid = tuple(-(-n // t) for n, t in zip((height, width), self.tile, strict=True))
        # never larger than the level: readers hold chunks, not the padding of tiles
        cut = tuple(min(t, n) for t, n in zip(self.tile, (height, width), strict=True))
        self.chunk_shape = (per_chunk, *(1 for _ in self.shape[1:-2]), *cut)
        self.shard_shape = whole_grid(self.shape, self.chunk_shape)
        check_bounds(self.shape, self.chunk_shape, self.chunk_shape, self.dtype)

    def _read_offsets(self, tiff: Any, found: Any) -> None:
        """Places of all tiles in the file, and that they lie inside of it: a copy cut short shows here."""
        planes = self._stored_samples if self._is_planar else 1
        expected = self.grid[0] * self.grid[1] * planes
        pages = list(found.pages)
        num_pages = math.prod(self._lead_shape)
        # ImageJ describes one page and writes the planes of the others behind it
        is_run = len(pages) == 1 and found.dataoffset is not None
        if len(pages) != num_pages and not is_run:
            raise ValueError(f"broken TIFF: {len(pages)} pages, expected {num_pages}")
        table = np.zeros((2, num_pages, expected), np.uint64)
        for number, page in enumerate(pages):
            if page is None:
                continue  # a plane that the metadata list and nobody wrote
            if page.parent is not tiff:
                raise ValueError("TIFF image spans several files, which is not supported")
            offsets, counts = page.dataoffsets, page.databytecounts
            if self._plain is not None:
                offsets, counts = self._pieces(offsets, counts, planes)
            if len(offsets) < expected or len(counts) < expected:
                raise ValueError(f"broken TIFF: {len(offsets)} tiles, expected {expected}")
            table[0, number], table[1, number] = offsets[:expected], counts[:expected]
        if is_run:
            plane_bytes = math.prod(self.shape[-2:]) * self._stored_samples * self.dtype.itemsize
            table[0] = table[0, :1] + np.arange(num_pages, dtype=np.uint64)[:, None] * np.uint64(plane_bytes)
            table[1] = table[1, :1]
        self._offset_FT, self._count_FT = table
        limit = np.uint64(self.stamp[0])
        past = (self._offset_FT > limit) | (self._count_FT > limit - np.minimum(self._offset_FT, limit))
        if past.any():
            page_number, index = (int(v) for v in np.argwhere(past)[0])
            begin, count = int(self._offset_FT[page_number, index]), int(self._count_FT[page_number, index])
            need = f"{self._tile_name(index)} needs bytes {begin} to {begin + count}"
            raise ValueError(f"truncated: {need}, the file has {limit}")

    def _pieces(self, offsets: Sequence[int], counts: Sequence[int], planes: int) -> tuple[Array, Array]:
        """Offsets and sizes of runs of rows instead of the strips that they are made of."""
        height, width = self.shape[-2:]
        row_bytes = width * self.dtype.itemsize * (1 if self._is_planar else self._stored_samples)
        if sum(counts) < height * row_bytes * planes:
            raise ValueError(
                f"broken TIFF: {sum(counts)} bytes in strips, expected {height * row_bytes * planes}"
            )
        rows = np.arange(self.grid[0]) * self.tile[0]
        sizes = np.minimum(self.tile[0], height - rows) * row_bytes
        starts = offsets[0] + (np.arange(planes)[:, None] * height + rows) * row_bytes
        return starts.ravel(), np.tile(sizes, planes)

    def _tile_name(self, index: int) -> str:
        row, column = divmod(index % (self.grid[0] * self.grid[1]), self.grid[1])
        return f"tile {index} (row {row}, column {column})"

    def tile_of(self, place: Sequence[int]) -> tuple[int, int]:
        """Number of the page, and of the tile in it, that hold a chunk."""
        channel, row, column = place[0], place[-2], place[-1]
        plane = 0
        if self._is_planar:
            channel, plane = divmod(channel, self.samples)
        values = (channel, *place[1:-2])
        lead = tuple(0 if axis is None else values[axis] for axis in self._lead_from)
        page = int(np.ravel_multi_index(lead, self._lead_shape)) if lead else 0
        return page, (plane * self.grid[0] + row) * self.grid[1] + column

    @property
    def samples_mixed(self) -> int | None:
        """Samples of a pixel that lie interleaved in each tile, None where they lie in planes."""
        return None if self._is_planar else self._stored_samples

    @property
    def jpeg(self) -> tuple[bytes | None, bool, bool]:
        """Of a level of JPEG: tables its tiles share, whether they begin as JFIF, whether they lack heads."""
        decoding = _decoders.get(self._key, self._reopen)
        return decoding.tables, decoding.is_jfif, decoding.header is not None

    def tile_table(self) -> Array:
        """Offset and size in bytes of all tiles that are not planes, (2, c, *space) over the chunk grid."""
        table = np.stack([self._offset_FT, self._count_FT]).reshape(2, *self._lead_shape, *self.grid)
        # leading axes of the file in the order of a place; those of length 1 vanish
        order = [i for i, axis in enumerate(self._lead_from) if axis is not None]
        order.sort(key=lambda i: self._lead_from[i] or 0)
        dropped = [i for i, axis in enumerate(self._lead_from) if axis is None]
        table = table.transpose(0, *(1 + i for i in (*order, *dropped)), -2, -1)
        lead = tuple(-(-n // c) for n, c in zip(self.shape[:-2], self.chunk_shape[:-2], strict=True))
        return table.reshape(2, *lead, *self.grid)

    def fetch(self, _shard: Place, /, places: Sequence[Place]) -> Iterator[RawChunk]:
        """Read the bytes of tiles. One that a sparse file leaves out, without bytes or a place, is absent; so
        is one without bytes in a file of measurements, while in colour it is what a broken program left.
        """
        try:
            fd = os.open(self.path, OPEN_FLAGS)
        except OSError as error:
            raise ChunkError(f"cannot open the file: {error.strerror}") from error
        try:
            info = os.fstat(fd)
            check_stamp((info.st_size, info.st_mtime_ns), self.stamp)
            for place in places:
                yield self._fetch_tile(fd, place)
        finally:
            os.close(fd)

    def _fetch_tile(self, fd: int, place: Place) -> RawChunk:
        page, index = self.tile_of(place)
        offset, size = int(self._offset_FT[page, index]), int(self._count_FT[page, index])
        if size == 0:
            if self.is_color and offset:
                raise ChunkError(f"damaged: {self._tile_name(index)} has no bytes")
            return RawChunk(place, None, 0)
        if size > 2 * self._tile_bytes + _SLACK_BYTES:
            raise ChunkError(
                f"damaged: {self._tile_name(index)} has {size} bytes for {self._tile_bytes} of pixels"
            )
        try:
            data = os.pread(fd, size, offset)
        except OSError as error:
            raise ChunkError(f"cannot read {self._tile_name(index)}: {error.strerror}") from error
        if len(data) != size:
            raise ChunkError(f"truncated: {self._tile_name(index)} has {len(data)} of {size} bytes")
        return RawChunk(place, data, size)

    def decode(self, raw: RawChunk) -> Array:
        """Decode one tile, cut off at the edge of the level."""
        _, index = self.tile_of(raw.place)
        if self._plain is not None:
            samples = 1 if self._is_planar else self._stored_samples
            tile_YXS = np.frombuffer(raw.data, self._plain).reshape(-1, self.shape[-1], samples)
        else:
            tile_YXS = self._decode_tile(raw.data, index)
        rows, columns = (
            min(c, n - p * c)
            for p, c, n in zip(raw.place[-2:], self.chunk_shape[-2:], self.shape[-2:], strict=True)
        )
        tile_YXS = tile_YXS[:rows, :columns, : self.chunk_shape[0]]
        if tile_YXS.shape != (rows, columns, self.chunk_shape[0]):
            got = " x ".join(str(n) for n in tile_YXS.shape[:2])
            raise ChunkError(
                f"damaged: {self._tile_name(index)} has {got} pixels, expected {rows} x {columns}"
            )
        lead = (1,) * (len(self.shape) - 3)
        chunk_CYX = tile_YXS.transpose(2, 0, 1).astype(self.dtype, copy=False)
        return chunk_CYX.reshape(chunk_CYX.shape[0], *lead, rows, columns)

    def _decode_tile(self, data: bytes, index: int) -> Array:
        decoding = _decoders.get(self._key, self._reopen)
        if decoding.jpeg is not None:
            with suppress(ValueError):  # what it is instead, or what is wrong with it, is found out below
                return decoding.jpeg.decode(data, (*self.tile, self._stored_samples))
        self._check_head(data, index, decoding)
        try:
            decoded: Any = decoding.page_decode(
                data, index, jpegtables=decoding.tables, jpegheader=decoding.header
            )[0]
            tile_YXS: Array = decoded[0]
        except Exception as error:  # decoders of many libraries raise what they like
            reason = f"damaged: {self._tile_name(index)} cannot be decoded: {type(error).__name__}: {error}"
            raise ChunkError(" ".join(reason.split())) from error
        return tile_YXS

    def _check_head(self, data: bytes, index: int, decoding: _Decoding) -> None:
        """Decoders allocate what the data declare, and fill what is missing of a JPEG with grey."""
        if self.compression == JPEG and JPEG_END not in data[-16:]:
            raise ChunkError(f"damaged: the JPEG data of {self._tile_name(index)} do not end as they must")
        if self.compression not in _SIZES or decoding.header:
            return
        try:
            height, width, samples = _SIZES[self.compression](data)
        except ValueError as error:
            raise ChunkError(f"damaged: {self._tile_name(index)} cannot be decoded: {error}") from error
        if height * width * samples * self.dtype.itemsize > 4 * self._tile_bytes + _SLACK_BYTES:
            raise ChunkError(
                f"damaged: {self._tile_name(index)} declares {height} x {width} pixels, "
                f"the tile has {self.tile[0]} x {self.tile[1]}"
            )

    @property
    def _key(self) -> tuple[str, Stamp, int, int]:
        return self.path, self.stamp, self.series, self.level

    def _reopen(self) -> _Decoding:
        """The decoder again, in another process or after others took its place."""
        import tifffile

        try:
            with tifffile.TiffFile(self.path) as tiff:
                return _decoding_of(tiff.series[self.series].levels[self.level].keyframe)
        except Exception as error:  # a file that changed since may break in any way
            raise ChunkError(f"cannot open the file again: {type(error).__name__}: {error}") from error


def compression_name(page: Any) -> str:
    """Name of a page's compression, its number when it has none."""
    import tifffile

    number = int(page.compression)
    return str(tifffile.COMPRESSION(number).name) if number in set(tifffile.COMPRESSION) else str(number)


def _plain_layout(page: Any) -> np.dtype[Any] | None:
    """The dtype in the file if its strips are one run of plain numbers, None if they need a decoder."""
    dtype = np.dtype(page.dtype)
    offsets, counts = page.dataoffsets, page.databytecounts
    is_run = not page.is_tiled and all(
        a + n == b for a, n, b in zip(offsets, counts, offsets[1:], strict=False)
    )
    is_plain = page.predictor == 1 and page.fillorder == 1 and page.bitspersample == 8 * dtype.itemsize
    return dtype.newbyteorder(page.parent.byteorder) if is_run and is_plain else None


def _decoding_of(page: Any) -> _Decoding:
    return _Decoding(
        page_decode=page.decode,
        tables=page.jpegtables,
        header=page.jpegheader,
        is_jfif=bool(page.is_jfif),
        jpeg=_jpeg_format(page),
    )


def _jpeg_format(page: Any) -> JpegFormat | None:
    """How the tiles of a page are plain JPEG, with the colours that tifffile takes; None for any other."""
    is_plain = page.jpegheader is None and page.bitspersample == 8 and not page.extrasamples
    if int(page.compression) != JPEG or not is_plain or int(page.planarconfig) != 1:
        return None
    # colours of Aperio's tiles are RGB, though nothing in them says so
    is_untold = int(page.photometric) == 2 and not page.is_jfif
    try:
        return JpegFormat(
            tables=page.jpegtables,
            colorspace_jpeg="RGB" if is_untold else None,
            colorspace_data="RGB" if int(page.photometric) in (2, 6) else None,
        )
    except ValueError:  # unusual tables
        return None
