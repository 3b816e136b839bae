"""Turning numbers into colours: any image to RGB, values to a colour map, attention laid over a thumbnail.

Shape letters: Y, X space; C channels. A final C of 3 in a result is RGB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ats_stream.errors import InputError

RGBImage = NDArray[np.uint8]
FloatImage = NDArray[np.floating[Any]]

# Eleven anchors of a dark-to-light map whose luminance rises all the way, so it survives grey printing and
# the common colour blindnesses (the course of matplotlib's "inferno").
ANCHORS = np.array(
    [
        (0, 0, 4),
        (22, 11, 57),
        (66, 10, 104),
        (106, 23, 110),
        (147, 38, 103),
        (188, 55, 84),
        (221, 81, 58),
        (243, 120, 25),
        (252, 165, 10),
        (246, 215, 70),
        (252, 255, 164),
    ],
    dtype=np.float64,
)

# share of the tint that stays where attention is zero: enough to let a peak stand out on a white slide
_FLOOR = 0.45


def colour_map(values: FloatImage) -> RGBImage:
    """Map values in 0 to 1, of any shape, to RGB uint8 (..., 3); what is outside is clipped, NaN counts as 0.

    >>> colour_map(np.array([0.0, 1.0])).tolist()
    [[0, 0, 4], [252, 255, 164]]
    """
    clipped = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0), 0.0, 1.0)
    position = np.linspace(0.0, 1.0, len(ANCHORS))
    channels = [np.interp(clipped, position, ANCHORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def to_rgb(image_YXC: NDArray[Any], *, low: float | None = None, high: float | None = None) -> RGBImage:
    """Show an image (Y, X) or (Y, X, C) as RGB uint8 (Y, X, 3).

    One channel becomes grey, two become magenta and green, of more than three the first three are taken.
    uint8 and floats within 0 to 1 keep their values; everything else is stretched from its least to its
    greatest value, or from `low` to `high` where given. NaN and infinities become the least.

    Raises InputError for another number of dimensions or an empty image.
    """
    image = np.asarray(image_YXC)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.size == 0:
        raise InputError(f"an image to show must be (Y, X) or (Y, X, C) and not empty, got {image_YXC.shape}")
    image = _as_uint8(image[..., :3], low, high)
    if image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    if image.shape[-1] == 2:
        return image[..., [0, 1, 0]]
    return np.ascontiguousarray(image)


def value_range(array: NDArray[Any]) -> tuple[float, float]:
    """The values that `to_rgb` shows as black and white for this array: its dtype or its contents decide."""
    if array.dtype == np.uint8:
        return 0.0, 255.0
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if array.dtype == np.bool_ or (array.dtype.kind == "f" and low >= 0.0 and high <= 1.0):
        return 0.0, 1.0
    return low, high


def _as_uint8(image: NDArray[Any], low: float | None, high: float | None) -> NDArray[np.uint8]:
    if image.dtype == np.uint8 and low is None and high is None:
        return image
    own_low, own_high = value_range(image)
    low = own_low if low is None else low
    high = own_high if high is None else high
    span = high - low if high > low else 1.0
    scaled = (np.nan_to_num(image.astype(np.float64), nan=low, posinf=low, neginf=low) - low) / span
    return np.rint(np.clip(scaled, 0.0, 1.0) * 255.0).astype(np.uint8)


def fit_map(map_YX: FloatImage, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a map to `shape` (Y, X): shrinking keeps the maximum of each block, growing interpolates.

    The maximum, not the mean, so that one hot cell of a large map stays visible on a small picture.

    Raises InputError unless the map is 2-D, not empty, finite and not negative.
    """
    array = np.asarray(map_YX)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"an attention map to show must be (Y, X) and not empty, got shape {array.shape}")
    if not np.all(np.isfinite(array)) or array.min() < 0:
        raise InputError("an attention map to show must be finite and not negative")
    array = array.astype(np.float32)
    for axis, size in enumerate(shape):
        if array.shape[axis] > size:
            starts = np.arange(size) * array.shape[axis] // size
            array = np.maximum.reduceat(array, starts, axis=axis)
    resized = Image.fromarray(array).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def attention_overlay(
    thumbnail_YXC: NDArray[Any], attention_map_YX: FloatImage, alpha: float = 0.75
) -> RGBImage:
    """Lay an attention map over a thumbnail; RGB uint8 of the thumbnail's size.

    The map is resized to the thumbnail and shown as t = sqrt(a / max a), so that sparse maps stay visible.
    The tint covers alpha * (0.45 + 0.55 t) of each pixel; the rest is the thumbnail in grey.

    Raises InputError for a map or thumbnail that cannot be shown, or alpha outside 0 to 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha={alpha} must lie in 0 to 1")
    thumbnail = to_rgb(thumbnail_YXC).astype(np.float64)
    attention = fit_map(attention_map_YX, thumbnail.shape[:2])
    peak = float(attention.max())
    level = np.sqrt(attention / peak).astype(np.float64) if peak > 0 else np.zeros(attention.shape)
    cover = (alpha * (_FLOOR + (1.0 - _FLOOR) * level))[..., None]
    grey = (thumbnail @ np.array([0.299, 0.587, 0.114]))[..., None]  # ITU-R BT.601 luma
    mixed: NDArray[np.float64] = (1.0 - cover) * grey + cover * colour_map(level)
    return np.rint(mixed).astype(np.uint8)
