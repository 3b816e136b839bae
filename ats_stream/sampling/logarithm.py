"""Logarithms and exponentials written out in IEEE operations, so that every device computes the same bits.

A library's ``log`` may differ in the last place between a CPU and a GPU, or between the vector loop and
its tail. Additions, multiplications and divisions may not. Logarithms use

    log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...)        |s| <= 3 - 2 sqrt 2

with twelve terms, exponentials

    e^x = 2^k e^r        k = round(x / ln 2),  |r| <= ln 2 / 2

with the power series of e^r to r^12 in pairs (Estrin's order, which leaves a processor more to do at once).
Both are good to about two units in the last place of float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ats_stream.kernels.arithmetic import EXP_COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2_E, NUM_LOG_TERMS

_EXPONENT_BIAS = 1023
_MANTISSA_BITS = 52
_LOWEST = -700.0


def _twice_atanh(s: Tensor) -> Tensor:
    square = s * s
    series = torch.full_like(s, 1 / (2 * NUM_LOG_TERMS - 1))
    for term in range(NUM_LOG_TERMS - 2, -1, -1):
        series.mul_(square).add_(1 / (2 * term + 1))
    return s.mul(2).mul_(series)


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
    return exponent * LN2_HIGH + (exponent * LN2_LOW + residue)


def minus_log1m(u: Tensor) -> Tensor:
    """-log(1 - u) of float64 values in (0, 1): the unit exponential of a uniform u, exact where u is tiny."""
    near_zero = _twice_atanh(u / (2 - u))
    return torch.where(u < 0.25, near_zero, -log(1 - u))


def exp_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors e^x = p 2^k of float64 values up to 2^30: p in [0.7, 1.42] and whole k, both float64.

    >>> [part.tolist() for part in exp_parts(torch.zeros(1, dtype=torch.float64))]
    [[1.0], [0.0]]
    """
    k = (x * LOG2_E).round_()
    r = (x - k * LN2_HIGH).sub_(k * LN2_LOW)
    square = r * r

    def pair(power: int) -> Tensor:
        return (r * EXP_COEFFICIENTS[power + 1]).add_(EXP_COEFFICIENTS[power])

    def four(power: int) -> Tensor:
        return pair(power).add_(pair(power + 2).mul_(square))

    fourth = square * square
    high = four(8).add_(fourth * EXP_COEFFICIENTS[12])
    p = four(0).add_(four(4).mul_(fourth)).add_(high.mul_(fourth.mul_(fourth)))
    return p, k


def exp(x: Tensor) -> Tensor:
    """e^x of float64 values up to 700; below -700 nothing is left of it.

    >>> exp(torch.tensor([0.0, float("-inf")], dtype=torch.float64)).tolist()
    [1.0, 0.0]
    """
    p, k = exp_parts(x.clamp(min=_LOWEST))
    return p.mul_(power_of_two(k)).masked_fill_(x < _LOWEST, 0.0)


def power_of_two(k: Tensor) -> Tensor:
    """2^k for whole float64 values from -1022 to 1023."""
    return ((k.long() + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float64)
