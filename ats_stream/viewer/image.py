"""One image of the viewer: its tiles, and what lies on top of it. Safe between threads.

Shape letters: C channels, Y rows, X columns. ``at`` is a place along each space axis but y and x, in pixels
of level 0.
"""

from __future__ import annotations

import io
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ats_stream.io.reduce import halve
from ats_stream.viewer.display import display_for
from ats_stream.viewer.tiles import TILE_PX, resolutions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ats_stream.io import Level, Pyramid
    from ats_stream.viewer.display import Display
    from ats_stream.viewer.tiles import Resolution

FORMATS = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
"""Formats of tiles, and the media type of each."""
# values of the level that are held at once while a tile is averaged
STRIP_VALUES = 16 << 20
# sides of the look from afar that windows are taken from
SAMPLE_PX = 2048


class TiledImage:
    """The tiles of a pyramid, as it is shown."""

    def __init__(self, pyramid: Pyramid, *, tile_px: int = TILE_PX) -> None:
        self.pyramid = pyramid
        self.resolutions = resolutions(pyramid.levels, tile_px=tile_px)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of level 0."""
        height, width = self.pyramid.levels[0].shape[-2:]
        return height, width

    @property
    def other_axes(self) -> tuple[tuple[str, int], ...]:
        """Name and length of the space axes besides y and x, such as z and t."""
        return tuple(zip(self.pyramid.axes[1:-2], self.pyramid.levels[0].shape[1:-2], strict=True))

    @property
    def middle(self) -> tuple[int, ...]:
        """The place along the other axes that is shown at first: the first of times, the middle of depths."""
        return tuple(0 if axis == "t" else length // 2 for axis, length in self.other_axes)

    @cached_property
    def display(self) -> Display:
        """How its pixels are shown; reads the coarsest level, or the centre of a large one."""
        level = self.pyramid.levels[-1]
        cuts = [(max(0, (n - SAMPLE_PX) // 2), min(n, (n + SAMPLE_PX) // 2)) for n in level.shape[-2:]]
        planes = self._depth(level, self.middle)
        start = (0, *planes, *(a for a, _ in cuts))
        stop = (level.shape[0], *(p + 1 for p in planes), *(b for _, b in cuts))
        sample = self.pyramid.read(level, start, stop).reshape(level.shape[0], *(b - a for a, b in cuts))
        return display_for(self.pyramid.channels, sample)

    def pixels(
        self, resolution: Resolution, column: int, row: int, *, channels: Sequence[int], at: Sequence[int]
    ) -> NDArray[Any] | None:
        """The pixels (C, Y, X) of a tile, of the chosen channels in their order; None outside the image.

        Raises SlideError when the image cannot be read.
        """
        box = resolution.box(column, row)
        if box is None:
            return None
        level, factor = self.pyramid.levels[resolution.level], resolution.factor
        planes, first, last = self._depth(level, at), min(channels), max(channels) + 1
        rows = STRIP_VALUES // ((box.right - box.left) * (last - first))
        step = max(1, rows // factor) * factor
        strips = []
        for top in range(box.top, box.bottom, step):
            bottom = min(top + step, box.bottom)
            strip = self.pyramid.read(
                level,
                (first, *planes, top, box.left),
                (last, *(p + 1 for p in planes), bottom, box.right),
            )
            strips.append(averaged(strip.reshape(last - first, bottom - top, -1), factor))
        pixels = strips[0] if len(strips) == 1 else np.concatenate(strips, axis=1)
        return pixels[[c - first for c in channels]]

    def tile(
        self,
        resolution: Resolution,
        column: int,
        row: int,
        *,
        channels: Sequence[int],
        at: Sequence[int],
        encoding: str,
    ) -> bytes | None:
        """A tile as a picture file, one of ``FORMATS``; None outside the image. Errors as in `pixels`."""
        pixels = self.pixels(resolution, column, row, channels=channels, at=at)
        return None if pixels is None else encoded(self.display.rgb(pixels, channels), encoding)

    def _depth(self, level: Level, at: Sequence[int]) -> tuple[int, ...]:
        """Indices of the other axes in a level, of those in level 0."""
        factors, lengths = level.downsample[:-2], level.shape[1:-2]
        return tuple(min(math.floor(p / f), n - 1) for p, f, n in zip(at, factors, lengths, strict=True))


def averaged(pixels_CYX: NDArray[Any], factor: int) -> NDArray[Any]:
    """Means of blocks of a power of two, by halving as conversion does: the level that it would have made."""
    pixels = pixels_CYX.astype(np.uint8) if pixels_CYX.dtype == np.bool_ else pixels_CYX
    while factor > 1:
        pixels, factor = halve(pixels), factor // 2
    return pixels.astype(pixels_CYX.dtype, copy=False)


def encoded(pixels_YXC: NDArray[np.uint8], encoding: str) -> bytes:
    """RGB or RGBA pixels as a picture file; JPEG and WebP lose what is hardly seen."""
    stream = io.BytesIO()
    picture = Image.fromarray(pixels_YXC)
    if encoding == "png":
        picture.save(stream, "PNG", compress_level=1)
    elif encoding == "webp":
        picture.save(stream, "WEBP", quality=90, method=0)
    else:
        picture.save(stream, "JPEG", quality=90, subsampling=0)
    return stream.getvalue()
