"""Logarithms written out in IEEE operations, so that every device computes the same bits.

A library's ``log`` may differ in the last place between a CPU and a GPU, or between the vector loop and
its tail. Additions, multiplications and divisions may not. Both functions use

    log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...)        |s| <= 3 - 2 sqrt 2

with twelve terms, good to about two units in the last place of float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NUM_TERMS = 12
# ln 2 in two parts: the first has 32 trailing zero bits, so that exponent * _LN2_HIGH is exact
_LN2_HIGH = 0.6931471803691238
_LN2_LOW = 1.9082149292705877e-10


def _twice_atanh(s: Tensor) -> Tensor:
    square = s * s
    series = torch.full_like(s, 1 / (2 * _NUM_TERMS - 1))
    for term in range(_NUM_TERMS - 2, -1, -1):
        series = series * square + 1 / (2 * term + 1)
    return 2 * s * series


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal float64 values.

    >>> bool(log(torch.tensor([1.0], dtype=torch.float64)) == 0)
    True
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2 * mantissa, mantissa)
    exponent = torch.where(small, exponent - 1, exponent).double()
    residue = _twice_atanh((mantissa - 1) / (mantissa + 1))
    return exponent * _LN2_HIGH + (exponent * _LN2_LOW + residue)


def minus_log1m(u: Tensor) -> Tensor:
    """-log(1 - u) of float64 values in (0, 1): the unit exponential of a uniform u, exact where u is tiny."""
    near_zero = _twice_atanh(u / (2 - u))
    return torch.where(u < 0.25, near_zero, -log(1 - u))
