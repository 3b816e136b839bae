"""A mask of where there is something to look at, from a low-resolution view.

Colour slides: Otsu's threshold (N. Otsu, IEEE Trans. SMC 9(1), 1979) on the saturation of HSV, tissue being
the more saturated class. Other images have no saturation: Otsu on the mean intensity of the channels, the
background being the class that holds most of the image's border, which serves bright and dark backgrounds.
Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]
TISSUE_PIXEL_UM = 8.0
# without a pixel size the first level no larger than this; also the limit of what is held in memory
MAX_MASK_PX = 4096
UNSCALED_MASK_PX = 1024
NUM_BINS = 256
DARK = 16


def tissue_level(
    level_shapes: Sequence[Sequence[int]],
    downsamples: Sequence[float],
    pixel_size_um: Sequence[float] | None,
) -> int:
    """The level to look at: nearest to 8 um per pixel, or, without a pixel size, the finest within 1024 px.

    Never one with a side of more than 4096 px, unless there is no smaller.

    >>> tissue_level([(3, 8000, 8000), (3, 4000, 4000), (3, 2000, 2000)], [1, 2, 4], (4.0, 4.0))
    1
    """
    last = len(level_shapes) - 1
    limit = MAX_MASK_PX if pixel_size_um is not None else UNSCALED_MASK_PX
    smallest = next((i for i, s in enumerate(level_shapes) if max(s[-2:]) <= limit), last)
    if pixel_size_um is None:
        return smallest
    size_um = math.sqrt(math.prod(pixel_size_um))
    nearest = min(
        range(len(downsamples)), key=lambda i: abs(math.log(size_um * downsamples[i] / TISSUE_PIXEL_UM))
    )
    return max(nearest, smallest)


def tissue_mask(image_CYX: Array) -> npt.NDArray[np.bool_]:
    """Where there is tissue (Y, X); all False for an image of one value, where nothing can be told apart."""
    if image_CYX.shape[0] == 3 and image_CYX.dtype == np.uint8:
        saturation_YX = saturation(image_CYX)
        threshold = otsu_threshold(saturation_YX)
        if threshold is not None:
            mask: npt.NDArray[np.bool_] = saturation_YX > threshold
            return mask
    intensity_YX = image_CYX.mean(axis=0, dtype=np.float64)
    threshold = otsu_threshold(intensity_YX)
    if threshold is None:
        return np.zeros(intensity_YX.shape, bool)
    bright_YX: npt.NDArray[np.bool_] = intensity_YX > threshold
    border = np.concatenate([bright_YX[0], bright_YX[-1], bright_YX[1:-1, 0], bright_YX[1:-1, -1]])
    return ~bright_YX if 2 * int(border.sum()) > border.size else bright_YX


def saturation(rgb_CYX: Array) -> Array:
    """HSV saturation (Y, X) of 8-bit colours, scaled to 0..255; 0 for near black, where it is noise.

    >>> saturation(np.array([[[200, 7, 0]], [[100, 7, 0]], [[100, 7, 9]]], np.uint8)).tolist()
    [[127, 0, 0]]
    """
    high, low = rgb_CYX.max(axis=0), rgb_CYX.min(axis=0)
    chroma = (high - low).astype(np.uint16) * 255
    result: Array = np.where(high < DARK, 0, chroma // np.maximum(high, 1))
    return result.astype(np.uint8)


def otsu_threshold(values: Array) -> float | None:
    """The value that best splits the values in two: those above it are one class. None when all are equal.

    Maximises the variance between the classes, w0 w1 (m0 - m1)^2, over a histogram of 256 bins.

    >>> otsu_threshold(np.array([0, 1, 1, 200, 201], np.uint8))
    1.0
    """
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return None
    if values.dtype == np.uint8:
        counts = np.bincount(values.reshape(-1), minlength=NUM_BINS).astype(np.float64)
        edges = np.arange(NUM_BINS, dtype=np.float64)
        centres = edges
    else:
        histogram, bounds = np.histogram(values, NUM_BINS, (low, high))
        counts, edges = histogram.astype(np.float64), bounds[1:]
        centres = (bounds[:-1] + bounds[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[int(np.nanargmax(between[:-1]))])
