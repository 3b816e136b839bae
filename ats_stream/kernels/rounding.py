"""Float32 arithmetic on the CPU with the bits that a GPU gives."""

from __future__ import annotations

import torch


def fma_float32(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Compute ``x * scale + shift`` with one rounding to float32, as ``fmaf`` does on every device.

    ``x`` is uint8 or uint16, ``scale`` and ``shift`` are float32; they broadcast. The result is float32.

    Computing in float64 and then rounding to float32 is almost this, but can round twice. Why the steps here
    round once:

    1. ``x`` has at most 16 significant bits and ``scale`` at most 24, so their product p has at most 40 and
       is exact in float64 (53 bits, and an exponent range that holds it).
    2. The float64 sum s = fl(p + b) with the shift b is inexact where p and b lie far apart. Its error
       e = p + b - s is a float64, and the TwoSum sequence gives it exactly (Knuth, The Art of Computer
       Programming, vol. 2, section 4.2.2). If every e is 0, the conversion to float32 is the only rounding.
    3. Elsewhere s can have been rounded onto the midpoint of two float32 values, where the tie is broken
       without knowing on which side the exact value lies: p = 1 + 2^-24, b = 2^-60. So s is rounded to odd
       instead: of the two float64 values around the exact one, the one whose last bit is 1. A midpoint has
       last bit 0, and as 53 >= 24 + 2, rounding that value to float32 rounds the exact one (Boldo and
       Melquiond, Emulation of FMA and correctly rounded sums, IEEE Transactions on Computers 57(4), 2008).

    The exact value here is 1 + 2^-24 + 2^-60, just above a midpoint:

    >>> x = torch.tensor([97], dtype=torch.uint8)
    >>> scale, shift = torch.tensor([172961 * 2.0**-24]), torch.tensor([2.0**-60])
    >>> fma_float32(x, scale, shift).item() == 1 + 2**-23
    True
    >>> (x.double() * scale.double() + shift.double()).float().item()
    1.0
    """
    product = x.to(torch.float64) * scale.to(torch.float64)
    shift = shift.to(torch.float64)
    total = product + shift
    shift_part = total - product
    error = (product - (total - shift_part)) + (shift - shift_part)
    if error.any():
        is_even = total.view(torch.int64) & 1 == 0
        towards_exact = torch.nextafter(total, error * torch.inf)
        # infinities and NaN leave a NaN as error and stay as they are
        total = torch.where(is_even & (error != 0) & error.isfinite(), towards_exact, total)
    return total.to(torch.float32)
