"""Which level of an image counts as full resolution: the one whose pixels are as large as in training."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING

from ats_stream.errors import SlideError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ats_stream.io import ArchiveRow, Level, Pyramid

TOLERANCE = 1.25
"""Pixels larger or smaller by this factor still count as of the same size: scanners of one magnification
differ by less, the next magnification by 2."""

NO_SIZES: Mapping[int, float | None] = MappingProxyType({})
"""What a table without pixel sizes gives, by row."""


def full_level(pyramid: Pyramid, wanted_um: float, assumed_um: float) -> Level:
    """The level to read patches from: the nearest to a pixel size in micrometres.

    ``wanted_um`` 0 is level 0, whatever its size. ``assumed_um`` is the size of level 0 in place of what the
    image says; 0 for what it says. Raises SlideError if the size is unknown, or that of no level is near.
    """
    finest = pyramid.levels[0]
    if wanted_um == 0:
        return finest
    size_um = assumed_um or level_0_um(pyramid)
    if size_um is None:
        raise SlideError(
            pyramid.slide,
            f"its pixel size is unknown, and the model reads {wanted_um:g} um per pixel "
            "(the column pixel_size_um of a table and --pixel-size of predict say it, "
            "--read-pixel-size 0 of train takes any)",
        )
    sizes = [size_um * _mean(level.downsample[-2:]) for level in pyramid.levels]
    nearest = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / wanted_um)))
    if not 1 / TOLERANCE <= sizes[nearest] / wanted_um <= TOLERANCE:
        there = ", ".join(f"{size:.3g}" for size in sizes)
        raise SlideError(
            pyramid.slide,
            f"no level near {wanted_um:g} um per pixel, which the model reads; its levels have {there}",
        )
    return pyramid.levels[nearest]


def given_sizes(rows: Sequence[ArchiveRow]) -> dict[int, float]:
    """Pixel sizes in micrometres that a table gives, by row, of the rows that it gives one for."""
    sizes = {number: row.pixel_size_um for number, row in enumerate(rows)}
    return {number: size for number, size in sizes.items() if size is not None}


def level_0_um(pyramid: Pyramid) -> float | None:
    """Pixel size of level 0, the mean of both axes; None if unknown."""
    sizes = pyramid.levels[0].pixel_size_um
    if sizes is None or not all(size > 0 for size in sizes[-2:]):
        return None
    return _mean(sizes[-2:])


def _mean(numbers: tuple[float, ...]) -> float:
    """The geometric mean."""
    return math.prod(numbers) ** (1 / len(numbers))
