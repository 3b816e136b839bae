"""What a pyramid is, apart from its pixels: its levels and the facts about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ats_stream.io.ngff import Channel

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of a pyramid; usable as an index, so ``pyramid.levels[level]`` is the level itself."""

    index: int
    shape: tuple[int, ...]
    """(C, *space)."""
    dtype: np.dtype[Any]
    downsample: tuple[float, ...]
    """Pixels of level 0 per pixel of this level, per space axis."""
    pixel_size_um: tuple[float, ...] | None
    """Per space axis; None when unknown, NaN along time."""
    chunk_shape: tuple[int, ...]

    def __index__(self) -> int:
        return self.index


@dataclass(frozen=True, kw_only=True)
class PyramidInfo:
    """What a pyramid is, apart from its pixels."""

    slide: str
    name: str
    axes: tuple[str, ...]
    channels: tuple[Channel, ...]
    levels: tuple[Level, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[tuple[str, str], ...] = ()
    """(name, place in the store) of each label image."""
    associated: Mapping[str, Callable[[], Array]] = field(default_factory=dict)
    """Reader of each associated image (C, y, x), such as ``macro``; to be pickled."""


def axis_downsample(full: int, size: int, stated: float) -> float:
    """Factor between two lengths in pixels: the stated one if the lengths agree with it, else a whole one,
    else the ratio.

    The ratio alone is off by the last, cut off block: 2967 -> 1484 is a factor of 2, not of 1.9993.

    >>> axis_downsample(2967, 1484, 2.0), axis_downsample(100, 25, 1.0), axis_downsample(10, 4, 1.0)
    (2.0, 4.0, 2.5)
    """
    for factor in (stated, float(round(full / size))):
        if factor >= 1 and abs(full / factor - size) < 1:
            return factor
    return full / size
