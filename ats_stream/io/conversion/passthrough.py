"""Levels of slides whose JPEG tiles go into a pyramid as they are, without decoding.

A level can pass when it is made of whole JPEG tiles of one size, without planes or extra samples, and when no
tile has room for text: segments of programs and comments, other than a plain JFIF or Adobe mark. What cannot
pass has a reason in words. Of tiles some are looked at beforehand; every one is checked when it is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ats_stream.errors import SlideError
from ats_stream.io.codecs import ChunkCodec, max_stored_bytes
from ats_stream.io.conversion.array_writer import ArraySpec
from ats_stream.io.formats.jpeg_head import quality_of, tables_alone
from ats_stream.io.formats.openslide_source import OpenSlideLevel
from ats_stream.io.formats.parts import FileParts, file_stamp
from ats_stream.io.formats.stored_tiles import StoredTiles, tile_name
from ats_stream.io.formats.tile_source import JPEG, TiffLevel
from ats_stream.io.jpeg import JpegFormat
from ats_stream.io.layout import grid_shape
from ats_stream.io.pyramid_info import axis_downsample
from ats_stream.io.shard import shard_tail
from ats_stream.io.sources import ChunkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ats_stream.io.conversion.pass_layout import ShardSize
    from ats_stream.io.formats.jpeg_head import JpegHead
    from ats_stream.io.sources import Place

SAMPLED_TILES = 16
WHITE = 255
_RGB, _YCBCR = 2, 6


@dataclass(frozen=True, kw_only=True)
class CopiedLevel:
    """A level of a pyramid that takes its chunks from a slide, bit for bit."""

    level: int
    """Number of the level in the slide."""
    downsample: tuple[float, ...]
    """Per space axis, against level 0."""
    spec: ArraySpec
    head: JpegHead
    """Of one of its tiles."""
    tiles: StoredTiles

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tiles."""
        return int(self.tiles.nbytes.sum())

    def places(self) -> Iterator[Place]:
        """All shards."""
        return np.ndindex(*grid_shape(self.spec.shape, self.spec.shard))

    def shard(self, place: Place) -> dict[Place, bytes]:
        """The chunks of a shard, as :func:`read_shard` gives them."""
        return read_shard(self.tiles, self.spec, place, self.level)


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """Which levels of a slide are copied, and how the coarser ones are encoded that it lacks."""

    levels: tuple[CopiedLevel, ...]
    left_out: dict[int, str]
    """Levels of the slide that cannot be copied, and why."""
    coarse: JpegFormat
    """Quality, colours and subsampling of the source."""


def read_shard(tiles: StoredTiles, spec: ArraySpec, place: Place, level: int) -> dict[Place, bytes]:
    """The chunks of a shard as they lie in the slide, by place in it; those without bytes are absent.

    Raises SlideError when the slide changed, is damaged, or has a tile that must not be copied.
    """
    try:
        return tiles.read(*_box(spec, place))
    except ChunkError as error:
        raise SlideError(tiles.path, f"level {level}: {error}") from error


def shard_parts(tiles: StoredTiles, spec: ArraySpec, place: Place, level: int) -> list[bytes | memoryview]:
    """The same as a shard, in pieces that are larger than chunks where tiles follow each other in the slide;
    none when no chunk is there.
    """
    try:
        inner, nbytes, pieces = tiles.read_joined(*_box(spec, place))
    except ChunkError as error:
        raise SlideError(tiles.path, f"level {level}: {error}") from error
    return [*pieces, *shard_tail(inner, nbytes, spec.grid)] if pieces else []


def _box(spec: ArraySpec, place: Place) -> tuple[Place, Place]:
    """First chunk of a shard and the one after its last, cut off at the edge."""
    start = tuple(p * g for p, g in zip(place, spec.grid, strict=True))
    ends = grid_shape(spec.shape, spec.chunk)
    return start, tuple(min(a + g, n) for a, g, n in zip(start, spec.grid, ends, strict=True))


def passable(parts: FileParts) -> str | None:
    """Why the tiles of a slide cannot be copied, None when they can: those of its finest level at least."""
    try:
        _check_level(parts, 0, _stored_levels(parts)[0])
    except ValueError as error:
        return str(error)
    return None


def plan_pass(
    parts: FileParts, size: ShardSize, *, max_levels: int | None = None, max_base_values: int | None = None
) -> PassPlan:
    """What of a slide is copied; ValueError with the reason of :func:`passable` when it is nothing.

    A shard of the last level has at most ``max_base_values`` numbers, those of all channels and planes, where
    that is possible: coarser levels are made from it.
    """
    passing: list[tuple[int, StoredTiles, JpegFormat, JpegHead]] = []
    left_out: dict[int, str] = {}
    for number, found in enumerate(_stored_levels(parts)[:max_levels]):
        try:
            passing.append((number, *_check_level(parts, number, found)))
        except ValueError as error:
            if number == 0:
                raise
            left_out[number] = str(error)
    levels = [_copied(parts, *level, size) for level in passing[:-1]]
    last = passing[-1]
    if max_base_values is not None:
        depth = math.prod(parts.sources[last[0]].shape[:-2])
        size = replace(size, max_px=max_base_values // depth)
    levels.append(_copied(parts, *last, size))
    return PassPlan(levels=tuple(levels), left_out=left_out, coarse=_coarse_format(levels[-1]))


def stored_tiles(parts: FileParts) -> dict[int, StoredTiles]:
    """The tiles of the levels that have any, for whoever copies them by a plan (:func:`read_shard`)."""
    found = enumerate(_stored_levels(parts))
    return {number: level[0] for number, level in found if not isinstance(level, str)}


def _stored_levels(parts: FileParts) -> list[tuple[StoredTiles, JpegFormat] | str]:
    """Tiles and format of each level, or why it has none; ValueError when the slide is of no such kind."""
    top, vendor = parts.sources[0], parts.metadata.get("vendor")
    if "t" in parts.axes:
        raise ValueError("images over time are decoded")
    if isinstance(top, TiffLevel):
        return [_tiff_level(source) for source in parts.sources]
    if isinstance(top, OpenSlideLevel) and vendor == "philips":
        return _philips_levels(parts)
    if isinstance(top, OpenSlideLevel) and vendor == "dicom":
        from ats_stream.io.formats.dicom import dicom_levels

        found = dicom_levels(parts.path, [source.shape for source in parts.sources])
        form = JpegFormat(colorspace_data="RGB")
        return [tiles if isinstance(tiles, str) else (tiles, form) for tiles in found]
    if isinstance(top, OpenSlideLevel):
        raise ValueError(f"tiles of {vendor} slides are put together by OpenSlide")
    raise ValueError("not a slide of tiles")


def _tiff_level(source: Any) -> tuple[StoredTiles, JpegFormat] | str:
    """The tiles of a level of a TIFF file, in the colours in which it is read."""
    reason = _tiff_reason(source)
    if reason is not None:
        return reason
    tables, is_jfif, _ = source.jpeg
    form = JpegFormat(
        tables=None if tables is None else tables_alone(tables),
        # RGB that was never transformed, as in Aperio slides, does not say so
        colorspace_jpeg="RGB" if source.photometric == _RGB and not is_jfif else None,
        colorspace_data="RGB" if source.is_color else None,
    )
    return _tiff_tiles(source, source.shape, form.tables), form


def _tiff_reason(source: Any) -> str | None:
    """Why the data of a level of a TIFF file are no JPEG tiles."""
    if source.compression != JPEG:
        return f"compression is {source.compression_name}, not JPEG"
    if not source.is_tiled:
        return "stored in strips, not tiles"
    if source.samples_mixed is None:
        return "samples are stored in planes"
    if source.samples_mixed != source.samples or source.samples not in (1, 3):
        return f"{source.samples_mixed} samples per pixel"
    if source.dtype != np.uint8:
        return f"pixels are {source.dtype}, not uint8"
    if source.jpeg[2]:
        return "tiles are pieces between restart markers of one JPEG"
    return None


def _tiff_tiles(source: TiffLevel, shape: tuple[int, ...], tables: bytes | None) -> StoredTiles:
    """The tiles of a level, without those past the edge of a shape that it is cut to."""
    grid = grid_shape(shape[-2:], source.tile)
    offset, nbytes = source.tile_table()[..., : grid[0], : grid[1]]
    return StoredTiles(
        path=source.path,
        stamp=source.stamp,
        offset=offset,
        nbytes=nbytes,
        size=(*source.tile, source.samples),
        tables=tables,
    )


def _philips_levels(parts: FileParts) -> list[tuple[StoredTiles, JpegFormat] | str]:
    """The tiles of a Philips TIFF, whose levels OpenSlide cuts to their true size."""
    import tifffile

    stamp = file_stamp(parts.path)
    found: list[tuple[StoredTiles, JpegFormat] | str] = []
    try:
        with tifffile.TiffFile(parts.path) as tiff:
            sources = [TiffLevel(parts.path, stamp, tiff, 0, i) for i in range(len(tiff.series[0].levels))]
            if len(sources) != len(parts.sources):
                raise ValueError(f"{len(sources)} levels of tiles, expected {len(parts.sources)}")
            for source, shown in zip(sources, parts.sources, strict=True):
                reason = _tiff_reason(source)
                if reason is None and (source.axes, source.samples) != (parts.axes, 3):
                    reason = f"{source.samples} samples per pixel"
                if reason is None and any(a < b for a, b in zip(source.shape, shown.shape, strict=True)):
                    reason = f"tiles cover {source.shape}, the level has {shown.shape}"
                if reason is not None:
                    found.append(reason)
                    continue
                tables = source.jpeg[0]
                form = JpegFormat(
                    tables=None if tables is None else tables_alone(tables),
                    colorspace_jpeg="YCBCR" if source.photometric == _YCBCR else "RGB",
                    colorspace_data="RGB",
                )
                found.append((_tiff_tiles(source, shown.shape, form.tables), form))
    except Exception as error:  # tifffile meets what damage there is with any error
        raise ValueError(f"tiles cannot be found: {' '.join(str(error).split())}") from error
    return found


def _check_level(
    parts: FileParts, number: int, found: tuple[StoredTiles, JpegFormat] | str
) -> tuple[StoredTiles, JpegFormat, JpegHead]:
    """A level that can be copied; ValueError says why not."""
    if isinstance(found, str):
        raise ValueError(found)
    tiles, form = found
    source = parts.sources[number]
    absent = np.argwhere(tiles.nbytes == 0)
    lost = np.argwhere((tiles.nbytes == 0) & (tiles.offset != 0))
    # reading it is an error too
    if len(lost) and isinstance(source, TiffLevel) and source.is_color:
        raise ValueError(f"{tile_name(lost[0])} has no bytes")
    if len(absent) and isinstance(source, OpenSlideLevel) and len(set(source.background.tolist())) > 1:
        raise ValueError(f"tiles are missing on a background of {source.background.tolist()}")
    largest = int(tiles.nbytes.max())
    # what readers take for damage
    if largest > max_stored_bytes(math.prod(tiles.size)):
        raise ValueError(f"tiles of {largest} bytes, their pixels have {math.prod(tiles.size)}")
    return tiles, form, tiles.sample(SAMPLED_TILES)


def _copied(
    parts: FileParts,
    number: int,
    tiles: StoredTiles,
    form: JpegFormat,
    head: JpegHead,
    size: ShardSize,
) -> CopiedLevel:
    source = parts.sources[number]
    chunk = (tiles.size[2], *(1 for _ in source.shape[1:-2]), *tiles.size[:2])
    grid = grid_shape(source.shape, chunk)
    stated = parts.stated_downsample[number] if parts.stated_downsample else 0.0
    factors = zip(parts.sources[0].shape[1:], source.shape[1:], strict=True)
    depth = math.prod(grid[:-2])
    down, across = size.tiles(grid[-2:], chunk[-2:], depth=depth, tile_bytes=float(tiles.nbytes.mean()))
    # all channels and planes of a place together
    counts = (*grid[:-2], down, across)
    return CopiedLevel(
        level=number,
        downsample=tuple(axis_downsample(full, size, stated) for full, size in factors),
        spec=ArraySpec(
            shape=source.shape,
            dtype=source.dtype,
            axes="".join(parts.axes),
            chunk=chunk,
            shard=tuple(c * n for c, n in zip(chunk, counts, strict=True)),
            fill_value=_fill_value(source, tiles),
            codec=ChunkCodec(name="jpeg", jpeg=form),
        ),
        head=head,
        tiles=tiles,
    )


def _fill_value(source: Any, tiles: StoredTiles) -> int:
    """What readers see where no tile is: the same as in the slide; white in colour that has all of them."""
    if isinstance(source, OpenSlideLevel) and not tiles.nbytes.all():
        return int(source.background[0])
    return WHITE if tiles.size[2] == 3 and tiles.nbytes.all() else int(source.fill_value)


def _coarse_format(level: CopiedLevel) -> JpegFormat:
    """How the levels are encoded that are made from a copied one: in its quality, colours and subsampling."""
    jpeg, head = level.spec.codec.jpeg, level.head
    if jpeg is None:
        raise AssertionError("a copied level is JPEG")
    space = None
    if head.size[2] == 3:
        is_ycbcr = head.is_ycbcr if jpeg.colorspace_jpeg is None else jpeg.colorspace_jpeg == "YCBCR"
        space = "YCBCR" if is_ycbcr else "RGB"
    return JpegFormat(
        colorspace_jpeg=space,
        colorspace_data=jpeg.colorspace_data,
        level=quality_of(head.quantisation),
        subsampling=head.subsampling if space == "YCBCR" else None,
    )
