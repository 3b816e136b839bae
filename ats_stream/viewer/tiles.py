"""Which tiles a viewer sees of a pyramid, and which pixels each holds. Pure arithmetic, nothing is read.

A resolution is a level as it is (factor 1), or a level halved until blocks of ``factor`` x ``factor`` pixels
are one: between two levels that lie far apart, and below the coarsest until one tile holds the image. So each
tile of a level is exactly the level's own pixels, and all others are those of levels that conversion would
have made of the nearest finer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io import Level

TILE_PX = 512
# a tile reads at most (TILE_PX * MAX_FACTOR) ** 2 pixels
MAX_FACTOR = 16
# the next level takes over once it has less than this times the pixels, along a side, of the one before
_NEAR = 2**0.5


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of pixels: first row and column, and those after the last."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The image at one size, cut into tiles of ``tile_px`` pixels along each side."""

    level: int
    """Index of the pyramid's level that is read."""
    factor: int
    """Pixels of that level, along each side, averaged into one."""
    level_size: tuple[int, int]
    """Height and width of the level."""
    downsample: tuple[float, float]
    """Pixels of level 0 per pixel, along y and x."""
    tile_px: int

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return -(-self.level_size[0] // self.factor)

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return -(-self.level_size[1] // self.factor)

    @property
    def num_rows(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.tile_px)

    @property
    def num_columns(self) -> int:
        """Columns of tiles."""
        return -(-self.width // self.tile_px)

    def box(self, column: int, row: int) -> Box | None:
        """The pixels of the level under a tile; None for a tile outside the image.

        >>> one = Resolution(level=2, factor=2, level_size=(100, 700), downsample=(8, 8), tile_px=256)
        >>> one.box(1, 0)
        Box(top=0, left=512, bottom=100, right=700)
        >>> one.box(2, 0) is None
        True
        """
        if not (0 <= column < self.num_columns and 0 <= row < self.num_rows):
            return None
        step = self.tile_px * self.factor
        height, width = self.level_size
        return Box(
            top=row * step,
            left=column * step,
            bottom=min((row + 1) * step, height),
            right=min((column + 1) * step, width),
        )


def resolutions(levels: Sequence[Level], *, tile_px: int = TILE_PX) -> tuple[Resolution, ...]:
    """All resolutions of a pyramid, coarsest first; their pixels shrink from the last to the first.

    Levels of the size of the one before, as where only another axis was halved, are left out.
    """
    kept = [levels[0]]
    for level in levels[1:]:
        if any(n < m for n, m in zip(level.shape[-2:], kept[-1].shape[-2:], strict=True)):
            kept.append(level)
    found = []
    for number, level in enumerate(kept):
        coarser = kept[number + 1] if number + 1 < len(kept) else None
        for factor in _factors(level, coarser, tile_px):
            y, x = level.downsample[-2:]
            found.append(
                Resolution(
                    level=level.index,
                    factor=factor,
                    level_size=(level.shape[-2], level.shape[-1]),
                    downsample=(y * factor, x * factor),
                    tile_px=tile_px,
                )
            )
    return tuple(reversed(found))


def _factors(level: Level, coarser: Level | None, tile_px: int) -> list[int]:
    """Powers of two from 1 on: up to the next level, or until one tile holds all."""
    factors = [1]
    longest = max(level.shape[-2:])
    while factors[-1] < MAX_FACTOR:
        factor = 2 * factors[-1]
        if coarser is None:
            if -(-longest // factors[-1]) <= tile_px:
                break
        elif longest < factor * max(coarser.shape[-2:]) * _NEAR:
            break
        factors.append(factor)
    return factors
