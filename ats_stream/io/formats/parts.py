"""What a reader of a file format finds: the levels and what is known about them, before it is a pyramid."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io.sources import ChunkError, RawChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ats_stream.io.ngff import Channel
    from ats_stream.io.sources import ChunkSource, Place

Array = npt.NDArray[Any]
Stamp = tuple[int, int]
# a picture is decoded and held as a whole; the bound is the one of Pillow against picture bombs
MAX_PICTURE_PX = 178_956_970


@dataclass(frozen=True, kw_only=True)
class FileParts:
    """The levels of a file, finest first, and the facts about them."""

    path: str
    name: str
    axes: tuple[str, ...]
    """``c`` first."""
    sources: tuple[ChunkSource, ...]
    pixel_size_um: tuple[float, ...] | None
    """Of level 0 per space axis, NaN where it means nothing or is unknown; None when all of it is unknown."""
    metadata: Mapping[str, Any]
    """What may be copied to a pyramid; never names, dates, or identifiers."""
    stamp: Stamp
    channels: tuple[Channel, ...] = ()
    stated_downsample: tuple[float, ...] = ()
    """What the file says of each level, one number per level; empty when it says nothing."""
    associated: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    """Reader of each associated image (C, y, x); to be pickled."""
    companions: Callable[[], Sequence[Path]] = tuple
    """Finds the other files of a slide that is more than one; to be pickled."""


def file_stamp(path: str | os.PathLike[str]) -> Stamp:
    """Size and time of change of a file: what was learnt of it holds as long as these do."""
    info = os.stat(path)  # noqa: PTH116  # a string path is wanted in the hot loop
    return info.st_size, info.st_mtime_ns


def check_stamp(found: Stamp, expected: Stamp) -> None:
    """ChunkError when a file is not the one that was opened."""
    if found != expected:
        raise ChunkError(
            f"the file changed since it was opened: {found[0]} bytes now, {expected[0]} bytes then"
        )


def places_alone(path: str, stamp: Stamp, places: Sequence[Place]) -> Iterator[RawChunk]:
    """The fetch of a file whose library reads and decodes in one go: places, if the file is unchanged.

    ChunkError when it changed since it was opened, or cannot be looked at.
    """
    try:
        check_stamp(file_stamp(path), stamp)
    except OSError as error:
        raise ChunkError(f"cannot open the file: {error.strerror}") from error
    for place in places:
        yield RawChunk(place, place, 0)


def describe(vendor: str, objective_power: Any, **more: Any) -> dict[str, Any]:
    """The metadata that are copied to a pyramid, and no others: vendor, objective power, compression."""
    facts: dict[str, Any] = {"vendor": vendor, **more}
    try:
        facts["objective_power"] = float(objective_power)
    except (TypeError, ValueError):
        return facts
    return facts


def believable_sizes(y: Any, x: Any) -> tuple[float, float] | None:
    """A pixel size (y, x) in micrometres, None unless both are positive numbers.

    >>> believable_sizes("0.5", 0.25), believable_sizes(None, 1), believable_sizes(0, 1)
    ((0.5, 0.25), None, None)
    """
    try:
        pair = (float(y), float(x))
    except (TypeError, ValueError):
        return None
    return pair if all(0 < v < float("inf") for v in pair) else None


def check_picture_size(path: str, what: str, width: int, height: int) -> None:
    """SlideError for a picture too large to be held as a whole."""
    if width * height > MAX_PICTURE_PX:
        raise SlideError(
            path, f"{what} is too large to be read whole: {width} x {height}, at most {MAX_PICTURE_PX} pixels"
        )


def box_of(source: ChunkSource, place: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First pixel and size of a chunk, cut off at the edge of the level."""
    start = tuple(p * c for p, c in zip(place, source.chunk_shape, strict=True))
    size = tuple(min(c, n - a) for a, c, n in zip(start, source.chunk_shape, source.shape, strict=True))
    return start, size


def whole_grid(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shard shape of a level that is one file: all of its chunks are asked for in one call."""
    return tuple(-(-n // c) * c for n, c in zip(shape, chunk_shape, strict=True))


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
