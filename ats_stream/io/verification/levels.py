"""Verifying the pixels of an image: every chunk decodes, and each level goes with the one above it.

Three rules, for a level of which each pixel stands for a block of pixels of the level above:

* ``EXACT``: it is the mean of the block, to the bit (floats: to the last two bits). So lossless levels are
  built.
* ``JPEG``: the same before it was stored as JPEG (of quality 20 or more). Means over tiles of 32 pixels of
  the coarse level agree to within 6 of 255.
* ``RESAMPLED``: it comes from a scanner or another program, which resample as they like, with half a pixel of
  shift or more. Means over tiles of 32 pixels agree to within 24 of 255.

Tiles are smaller at edges; with fewer than 16 x 16 pixels they may differ by 16 / sqrt(pixels) times as much.

Of types other than uint8, the range of the coarsest level stands for 255. Masks, of which the largest value
of a block is kept, follow ``LARGEST``; those of other programs must hold no value that the level above
does not hold nearby (``KNOWN_VALUES``).
Shape letters: C channels, ``*space`` axes.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.errors import SlideError
from ats_stream.io.layout import grid_shape
from ats_stream.io.reduce import block_means, halve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ats_stream.io.pyramid import Pyramid

Array = npt.NDArray[Any]
TILE_PX = 32
SMALL_TILE_PX = 16
JPEG_SHARE = 6 / 255
RESAMPLED_SHARE = 24 / 255
# of the finer level, decoded: what a thread holds, several times over while it compares
BOX_BYTES = 16 << 20  # 16 MiB


class Rule(enum.Enum):
    """How a level has to follow from the one above it."""

    EXACT = "the mean of the level above"
    JPEG = "the mean of the level above, up to JPEG"
    RESAMPLED = "like the level above"
    LARGEST = "the largest value of the level above"
    KNOWN_VALUES = "made of values of the level above"


@dataclass(frozen=True)
class Box:
    """A part of a level and what lies under it in the coarser level; over (C, *space)."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    coarse_start: tuple[int, ...]
    coarse_stop: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """How a box of the coarser level differs from what it should be."""

    num_px: int
    """Values, or tiles, that differ."""
    first: tuple[int, ...]
    """Place of the first of them, or of the largest difference, in the coarser level."""
    largest: float


@dataclass(frozen=True)
class BadChunk:
    """A chunk that cannot be read."""

    level: int
    place: tuple[int, ...]
    reason: str


def plan_boxes(
    fine_shape: Sequence[int],
    coarse_shape: Sequence[int],
    fine_chunk: Sequence[int],
    coarse_chunk: Sequence[int],
    itemsize: int,
) -> Iterator[Box]:
    """Cut two levels into boxes that lie over each other, about BOX_BYTES of the finer one each.

    Boxes end where chunks of both levels do, as far as that is possible, so that few are read twice.

    >>> [(b.stop, b.coarse_stop) for b in plan_boxes((1, 9, 7), (1, 5, 4), (1, 4, 4), (1, 4, 4), 1 << 20)]
    [((1, 8, 7), (1, 4, 4)), ((1, 9, 7), (1, 5, 4))]
    """
    factors = [f / c for f, c in zip(fine_shape, coarse_shape, strict=True)]
    units = [
        math.lcm(c, fc // math.gcd(fc, max(1, round(f))))
        for c, fc, f in zip(coarse_chunk, fine_chunk, factors, strict=True)
    ]
    size = [min(u, n) for u, n in zip(units, coarse_shape, strict=True)]
    per_px = math.prod(factors) * itemsize
    for axis in reversed(range(len(size))):
        # the last axes first: their chunks lie one after another
        times = int(BOX_BYTES // max(1, math.prod(size) * per_px))
        size[axis] = min(coarse_shape[axis], size[axis] * max(1, times))
    for place in itertools.product(*map(range, grid_shape(coarse_shape, size))):
        start = tuple(p * s for p, s in zip(place, size, strict=True))
        stop = tuple(min(a + s, n) for a, s, n in zip(start, size, coarse_shape, strict=True))
        yield Box(
            _scaled(start, factors, fine_shape, coarse_shape),
            _scaled(stop, factors, fine_shape, coarse_shape),
            start,
            stop,
        )


def _scaled(
    place: Sequence[int], factors: Sequence[float], fine_shape: Sequence[int], coarse_shape: Sequence[int]
) -> tuple[int, ...]:
    """A border of the coarser level in pixels of the finer one: whole factors are taken as such."""
    result = []
    for p, factor, fine, coarse in zip(place, factors, fine_shape, coarse_shape, strict=True):
        whole = max(1, round(factor))
        exact = whole if -(-fine // whole) == coarse else factor
        result.append(fine if p == coarse else min(fine, round(p * exact)))
    return tuple(result)


def whole_factors(fine_shape: Sequence[int], coarse_shape: Sequence[int]) -> tuple[int, ...] | None:
    """The factor along each axis if all are whole, the last block being cut off at the edge; else None.

    >>> whole_factors((3, 9, 8), (3, 5, 4)), whole_factors((3, 75, 75), (3, 37, 37))
    ((1, 2, 2), None)
    """
    factors = [max(1, round(f / c)) for f, c in zip(fine_shape, coarse_shape, strict=True)]
    is_whole = all(-(-f // k) == c for f, c, k in zip(fine_shape, coarse_shape, factors, strict=True))
    return tuple(factors) if is_whole else None


def read_box(
    pyramid: Pyramid, level: int, start: Sequence[int], stop: Sequence[int]
) -> Array | list[BadChunk]:
    """The pixels of a box, or the chunks in it that cannot be read."""
    try:
        return pyramid.read(level, start, stop)
    except SlideError as error:
        bad = list(_bad_chunks(pyramid, level, start, stop))
        return bad or [BadChunk(level, tuple(start), error.reason)]


def _bad_chunks(
    pyramid: Pyramid, level: int, start: Sequence[int], stop: Sequence[int]
) -> Iterator[BadChunk]:
    shape, chunk = pyramid.levels[level].shape, pyramid.levels[level].chunk_shape
    ranges = [range(a // c, -(-b // c)) for a, b, c in zip(start, stop, chunk, strict=True)]
    for place in itertools.product(*ranges):
        first = [p * c for p, c in zip(place, chunk, strict=True)]
        last = [min(a + c, n) for a, c, n in zip(first, chunk, shape, strict=True)]
        try:
            pyramid.read(level, first, last)
        except SlideError as error:
            yield BadChunk(level, place, error.reason)


def compare(rule: Rule, fine: Array, coarse: Array, box: Box, value_range: float) -> Difference | None:
    """How a box of the coarser level breaks the rule, None if it does not.

    ``value_range`` is what the tolerances are shares of.
    """
    if rule in (Rule.EXACT, Rule.LARGEST):
        return _compare_exactly(rule, fine, coarse, box)
    if rule is Rule.KNOWN_VALUES:
        return _compare_values(fine, coarse, box)
    factors = whole_factors(fine.shape, coarse.shape)
    if rule is Rule.JPEG and factors is not None:
        # a last block that is cut off weighs as much as others: of a few planes, a large part of a tile
        fine = _means(fine, factors)
    return _compare_tiles(
        JPEG_SHARE if rule is Rule.JPEG else RESAMPLED_SHARE, fine, coarse, box, value_range
    )


def _compare_exactly(rule: Rule, fine: Array, coarse: Array, box: Box) -> Difference | None:
    factors = whole_factors(fine.shape, coarse.shape)
    if factors is None:
        return Difference(coarse.size, box.coarse_start, math.inf)
    if rule is Rule.LARGEST:
        expected = fine
        for axis, factor in enumerate(factors):
            expected = np.maximum.reduceat(expected, np.arange(0, expected.shape[axis], factor), axis=axis)
    else:
        expected = _means(fine, factors)
    if fine.dtype.kind == "f":
        equal = np.isclose(coarse, expected, rtol=2 * np.finfo(fine.dtype).eps, atol=0, equal_nan=True)
    else:
        equal = coarse == expected
    if bool(equal.all()):
        return None
    first = np.argwhere(~equal)[0]
    largest = np.abs(coarse.astype(np.float64) - expected)[~equal].max()
    place = tuple(int(a + b) for a, b in zip(box.coarse_start, first, strict=True))
    return Difference(int((~equal).sum()), place, float(largest))


def _means(fine: Array, factors: tuple[int, ...]) -> Array:
    if factors == (1, 2, 2) and fine.dtype.itemsize <= 4:
        return halve(fine)
    return block_means(fine, factors)


def _compare_values(fine: Array, coarse: Array, box: Box) -> Difference | None:
    unknown = ~np.isin(coarse, np.unique(fine))
    if not bool(unknown.any()):
        return None
    first = np.argwhere(unknown)[0]
    place = tuple(int(a + b) for a, b in zip(box.coarse_start, first, strict=True))
    return Difference(int(unknown.sum()), place, float(coarse[tuple(first)]))


def _compare_tiles(
    share: float, fine: Array, coarse: Array, box: Box, value_range: float
) -> Difference | None:
    borders = [_tile_borders(n) for n in coarse.shape]
    borders[0] = np.arange(coarse.shape[0])
    under = [
        np.floor(b * (f / c) + 0.5).astype(np.int64)
        for b, f, c in zip(borders, fine.shape, coarse.shape, strict=True)
    ]
    # what is not a number is averaged by each program in its own way
    difference = np.nan_to_num(np.abs(_tile_means(coarse, borders) - _tile_means(fine, under)), posinf=np.inf)
    # the fewer pixels, the less noise evens out; one unit for rounding, which may go downwards in each step
    num_px = _tile_sizes(coarse.shape, borders)
    allowed = share * value_range * np.maximum(1, SMALL_TILE_PX / np.sqrt(num_px))
    broken = difference > allowed + (1 if fine.dtype.kind in "iu" else 0)
    if not bool(broken.any()):
        return None
    worst = np.unravel_index(int(np.argmax(np.where(broken, difference, -1))), difference.shape)
    place = tuple(int(a + b[i]) for a, b, i in zip(box.coarse_start, borders, worst, strict=True))
    return Difference(int(broken.sum()), place, float(difference[worst]))


def _tile_borders(size: int) -> npt.NDArray[np.int64]:
    """First pixels of tiles, the last of which takes a rest of less than half a tile.

    >>> _tile_borders(79).tolist(), _tile_borders(80).tolist(), _tile_borders(5).tolist()
    ([0, 32], [0, 32, 64], [0])
    """
    return np.arange(0, max(1, size - TILE_PX // 2 + 1), TILE_PX)


def _tile_sizes(shape: Sequence[int], borders: Sequence[npt.NDArray[np.int64]]) -> Array:
    """Pixels of each tile."""
    lengths = [np.diff(starts, append=n) for starts, n in zip(borders, shape, strict=True)]
    return np.asarray(functools.reduce(np.multiply.outer, lengths))


def _tile_means(block: Array, borders: Sequence[npt.NDArray[np.int64]]) -> Array:
    total: Array = block
    for axis, starts in enumerate(borders):
        total = np.add.reduceat(total, starts, axis=axis, dtype=np.float64)
        lengths = np.diff(starts, append=block.shape[axis])
        total /= lengths.reshape([-1 if a == axis else 1 for a in range(block.ndim)])
    return total


def value_range_of(pyramid: Pyramid) -> float:
    """What tolerances are shares of: 255, or the range of the coarsest level for other types than uint8."""
    last = pyramid.levels[-1]
    if last.dtype == np.uint8:
        return 255.0
    box = next(plan_boxes(last.shape, last.shape, last.chunk_shape, last.chunk_shape, last.dtype.itemsize))
    pixels = read_box(pyramid, last.index, box.start, box.stop)
    if isinstance(pixels, list) or pixels.size == 0:
        return 255.0
    low, high = (float(v) for v in (np.nanmin(pixels), np.nanmax(pixels)))
    return max(high - low, 1e-30)
