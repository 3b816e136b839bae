"""Exact means of square blocks of pixels: the step from one pyramid level to the next.

Integers are rounded half to even, so repeated halving has no drift. Blocks cut off at the edge average what
is there. Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]
# the narrowest type that holds four values of the key
_SUM_DTYPES = {
    "uint8": np.uint16,
    "int8": np.int16,
    "uint16": np.uint32,
    "int16": np.int32,
    "uint32": np.uint64,
    "int32": np.int64,
}


def halve(block_CYX: Array) -> Array:
    """Mean of each 2 x 2 block, (C, ceil(Y / 2), ceil(X / 2)); integers of up to 32 bits, or floats.

    >>> halve(np.array([[[0, 1, 5], [1, 0, 6], [3, 4, 7]]], np.uint8)).tolist()
    [[[0, 6], [4, 7]]]
    """
    _, height, width = block_CYX.shape
    even_y, even_x = height // 2 * 2, width // 2 * 2
    out = np.empty((block_CYX.shape[0], -(-height // 2), -(-width // 2)), block_CYX.dtype)
    parts = [
        (slice(0, even_y // 2), slice(0, even_x // 2), slice(0, even_y), slice(0, even_x)),
        (slice(0, even_y // 2), slice(even_x // 2, None), slice(0, even_y), slice(even_x, None)),
        (slice(even_y // 2, None), slice(0, even_x // 2), slice(even_y, None), slice(0, even_x)),
        (slice(even_y // 2, None), slice(even_x // 2, None), slice(even_y, None), slice(even_x, None)),
    ]
    for to_y, to_x, from_y, from_x in parts:
        if out[:, to_y, to_x].size:
            out[:, to_y, to_x] = _mean_of_pairs(block_CYX[:, from_y, from_x])
    return out


def _mean_of_pairs(block_CYX: Array) -> Array:
    """Mean over pairs along each of the last two axes; an axis of length 1 is the cut off edge and stays."""
    dtype = block_CYX.dtype
    exact = np.float64 if dtype.kind == "f" else _SUM_DTYPES[dtype.name]
    total = (
        block_CYX.astype(exact)
        if block_CYX.shape[1] == 1
        else np.add(block_CYX[:, 0::2], block_CYX[:, 1::2], dtype=exact)
    )
    if block_CYX.shape[2] > 1:
        total = total[:, :, 0::2] + total[:, :, 1::2]
    bits = (block_CYX.shape[1] > 1) + (block_CYX.shape[2] > 1)
    if dtype.kind == "f":
        total /= 2**bits
        return total.astype(dtype)
    if bits == 0:
        return block_CYX
    # half to even: a half is added, less one unit of the sum when the quotient is even
    one = total.dtype.type(1)
    half = total.dtype.type(2 ** (bits - 1) - 1)
    odd = (total >> total.dtype.type(bits)) & one
    mean: Array = (total + half + odd) >> total.dtype.type(bits)
    return mean.astype(dtype)


def shrink(block_CYX: Array, factor: int) -> Array:
    """Mean of each ``factor`` x ``factor`` block, (C, ceil(Y / factor), ceil(X / factor)), exact for
    integers.

    >>> shrink(np.arange(9, dtype=np.uint8).reshape(1, 3, 3), 3).tolist()
    [[[4]]]
    """
    return block_means(block_CYX, (1, factor, factor))


def block_means(block: Array, factors: Sequence[int]) -> Array:
    """Mean of each block of ``factors`` pixels, one factor per axis; the plain version of :func:`halve`.

    >>> block_means(np.array([[0, 1, 7], [2, 4, 9]], np.uint8), (2, 2)).tolist()
    [[2, 8]]
    """
    dtype = block.dtype
    exact = np.float64 if dtype.kind == "f" else np.int64
    total: Array = block
    count = np.ones((1,) * block.ndim, np.int64)
    for axis, (size, factor) in enumerate(zip(block.shape, factors, strict=True)):
        starts = np.arange(0, size, factor)
        if factor > 1:
            total = np.add.reduceat(total, starts, axis=axis, dtype=exact)
        lengths = np.minimum(starts + factor, size) - starts
        count = count * lengths.reshape([-1 if a == axis else 1 for a in range(block.ndim)])
    if dtype.kind == "f":
        mean: Array = total / count
        return mean.astype(dtype)
    quotient, rest = np.divmod(total.astype(exact, copy=False), count)
    up = (2 * rest > count) | ((2 * rest == count) & (quotient % 2 == 1))
    rounded: Array = quotient + up
    return rounded.astype(dtype)


def halve_labels(mask_YX: Array) -> Array:
    """The largest value of each 2 x 2 block, (ceil(Y / 2), ceil(X / 2)): of a mask, whether any pixel is set.

    >>> halve_labels(np.array([[0, 0, 1], [0, 2, 0]])).tolist()
    [[2, 1]]
    """
    rows = np.maximum.reduceat(mask_YX, np.arange(0, mask_YX.shape[0], 2), axis=0)
    return np.maximum.reduceat(rows, np.arange(0, mask_YX.shape[1], 2), axis=1)
