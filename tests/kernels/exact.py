"""Exact rational arithmetic and its one rounding: a reference that shares nothing with what it judges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

# bits of the significand, exponents of the smallest and of the largest normal number
FORMATS = {torch.float32: (24, -126, 127), torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15)}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """Round to the nearest number of a float format, ties to even, overflow to infinity."""
    precision, min_exponent, max_exponent = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, min_exponent) - precision + 1)
    nearest = round(value / quantum) * quantum  # round() of a Fraction breaks ties to even
    if abs(nearest) >= Fraction(2) ** (max_exponent + 1):
        return float("inf") if value > 0 else float("-inf")
    return float(nearest)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits, so that equal means equal in sign of zero too."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def exact_fma(pixel: int, scale: float, shift: float, dtype: torch.dtype = torch.float32) -> float:
    """The value of the gather: one rounding to float32, one more to ``dtype``."""
    value = rounded(Fraction(pixel) * Fraction(scale) + Fraction(shift), torch.float32)
    return rounded(Fraction(value), dtype) if np.isfinite(value) else value


def exact_gather(
    crops_NCS: torch.Tensor, scale_C: torch.Tensor, shift_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The gather in exact arithmetic, each distinct pixel of a channel once."""
    out_NCS = np.empty(tuple(crops_NCS.shape), np.float64)
    for channel, (scale, shift) in enumerate(zip(scale_C.tolist(), shift_C.tolist(), strict=True)):
        pixels, index = np.unique(crops_NCS[:, channel].numpy(), return_inverse=True)
        table = np.array([exact_fma(pixel, scale, shift, dtype) for pixel in pixels.tolist()])
        out_NCS[:, channel] = table[index].reshape(out_NCS[:, channel].shape)
    return torch.from_numpy(out_NCS).to(dtype)  # exact: every value is one of dtype
