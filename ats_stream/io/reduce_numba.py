# mypy: ignore-errors
# numba infers types by its own rules
"""Means of 2 x 2 pixels, compiled by numba, without the interpreter lock; imported on first use."""

from __future__ import annotations

from ats_stream.compiling import cached


@cached
def halve_integers(block_CYX, out_CYX):
    """Fill ``out_CYX`` with the means of whole 2 x 2 blocks, rounded half to even."""
    channels, height, width = out_CYX.shape
    for c in range(channels):
        for y in range(height):
            above, below, row = block_CYX[c, 2 * y], block_CYX[c, 2 * y + 1], out_CYX[c, y]
            for x in range(width):
                total = above[2 * x] + above[2 * x + 1] + below[2 * x] + below[2 * x + 1]
                # a half is added, less one unit of the sum when the quotient is even
                row[x] = (total + 1 + ((total >> 2) & 1)) >> 2


@cached
def halve_floats(block_CYX, out_CYX):
    """Fill ``out_CYX`` with the means of whole 2 x 2 blocks, summed in float64."""
    channels, height, width = out_CYX.shape
    for c in range(channels):
        for y in range(height):
            above, below, row = block_CYX[c, 2 * y], block_CYX[c, 2 * y + 1], out_CYX[c, y]
            for x in range(width):
                # 0.0 makes it float64; columns first, as numpy sums them
                first = 0.0 + above[2 * x] + below[2 * x]
                second = 0.0 + above[2 * x + 1] + below[2 * x + 1]
                row[x] = (first + second) / 4
