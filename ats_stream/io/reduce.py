"""Exact means of blocks of pixels: the step from one pyramid level to the next.

Integers are rounded half to even, so repeated halving has no drift. Blocks cut off at the edge average what
is there. Shape letters: C channels, Y rows, X columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ats_stream.compiled import compiled_module

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = npt.NDArray[Any]
# below, calling compiled code costs more than it saves
MIN_COMPILED = 1 << 18
# loading it takes half a second and 120 MiB: not before numpy has halved so many values, in 50 ms
LOADED_AFTER = 1 << 25
# a type that holds the sum of sixteen values of the key
_SUM_DTYPES = {
    "uint8": np.uint16,
    "int8": np.int16,
    "uint16": np.uint32,
    "int16": np.int32,
    "uint32": np.uint64,
    "int32": np.int64,
}


def halve(block: Array) -> Array:
    """Mean of each block of 2 pixels along every axis but the first: (C, *ceil(space / 2)).

    Integers of up to 32 bits, or floats; up to four space axes.

    >>> halve(np.array([[[0, 1, 5], [1, 0, 6], [3, 4, 7]]], np.uint8)).tolist()
    [[[0, 6], [4, 7]]]
    """
    out = np.empty((block.shape[0], *(-(-n // 2) for n in block.shape[1:])), block.dtype)
    # along each axis the pairs, and what is left over at the end
    cuts = [[(0, n // 2 * 2), (n // 2 * 2, n)] for n in block.shape[1:]]
    for box in itertools.product(*cuts):
        if all(a < b for a, b in box):
            place = (slice(None), *(slice(a // 2, -(-b // 2)) for a, b in box))
            part = block[(slice(None), *(slice(*ab) for ab in box))]
            if not _compiled_means(part, out[place]):
                out[place] = _mean_of_pairs(part)
    return out


def _compiled_means(block: Array, out: Array) -> bool:
    """Fill ``out`` with the means of 2 x 2 pixels, in a tenth of the time that numpy takes; False where that
    is not for this block.
    """
    is_plain = block.dtype.isnative and block.dtype.name in {*_SUM_DTYPES, "float32", "float64"}
    if block.ndim != 3 or min(block.shape[1:]) < 2 or block.size < MIN_COMPILED or not is_plain:
        return False
    if not _is_worth_loading(block.size):
        return False
    code = _compiled_code()
    if code is None:
        return False
    (code.halve_floats if block.dtype.kind == "f" else code.halve_integers)(block, out)
    return True


@dataclass
class _Halved:
    """What this process has halved; threads may miss some of each other's, which does not matter."""

    num_values: int = 0


_halved = _Halved()


def _is_worth_loading(num_values: int) -> bool:
    _halved.num_values += num_values
    return _halved.num_values >= LOADED_AFTER


def _compiled_code() -> Any:
    """The compiled way, None where numba cannot be used; numba is imported at the first call."""
    return compiled_module("ats_stream.io.reduce_numba")


def _mean_of_pairs(block: Array) -> Array:
    """Mean over pairs along each axis but the first; an axis of length 1 is the cut off edge and stays."""
    dtype = block.dtype
    exact = np.dtype(np.float64 if dtype.kind == "f" else _SUM_DTYPES[dtype.name])
    total, bits = block, 0
    for axis in range(1, block.ndim):
        if block.shape[axis] > 1:
            lead = (slice(None),) * axis
            first, second = total[(*lead, slice(0, None, 2))], total[(*lead, slice(1, None, 2))]
            total, bits = np.add(first, second, dtype=exact), bits + 1
    if bits == 0:
        return block
    if dtype.kind == "f":
        total /= 2**bits
        return total.astype(dtype)
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
