"""Sums of weights e^logit that come out the same to the last bit in any order, in pieces of any kind.

Floating point sums depend on their order, so on tiles, batches, threads and devices. Here each weight is
rounded to a multiple of 2^-84 of a unit and counted in whole numbers, on three levels of 28 bits:

    w / unit = a 2^-28 + b 2^-56 + c 2^-84        a, b, c whole, |a|, |b|, |c| <= 2^27
    unit = 2^(28 (j + 1) + 1),  j = floor(round(peak / ln 2) / 28)        peak: the largest logit summed

Whole numbers add up exactly. Units are 28 bits apart, so when the peak rises to the next one, every level
moves down by one and the last is dropped: what remains is what rounding to the new unit would have given, as
each level holds a weight rounded to nearest, and a weight is below half its unit. The sum keeps 55 to 83 bits
below the largest weight. (The idea of Demmel & Nguyen's reproducible sums, 2015.)

Beyond |logit| = 2^30, where float32 logits are 64 apart, only positions that equal the peak count.

Shapes: B rows, P positions, L = 3 levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ats_stream.kernels.arithmetic import (
    FAR,
    LEVEL_BITS,
    LOG2_E,
    NUM_LEVELS,
    REACH,
    ROUNDERS,
    SPARE_BITS,
)
from ats_stream.sampling.logarithm import exp_parts, log, power_of_two

_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Mass:
    """The sum of e^logit over a set of positions of each row."""

    peak: Tensor
    """(B,) float64, the largest logit; -inf where the set is empty."""
    levels: Tensor
    """(B, L) int64."""

    @staticmethod
    def of(logits_BP: Tensor) -> Mass:
        """Sum float64 logits; -inf counts nothing."""
        peak_B = logits_BP.amax(dim=1)
        is_far_B = ~(peak_B.abs() <= FAR)
        # rows that are far or empty go through the arithmetic with a peak of 0, and are answered at the end
        base_B1 = peak_B.masked_fill(is_far_B, 0.0)[:, None]
        lowest_B1 = (base_B1 - REACH).clamp(min=-FAR)
        factor_BP, exponent_BP = exp_parts(logits_BP.maximum(lowest_B1).minimum(base_B1))
        exponent_BP.sub_((_unit(base_B1) + 1) * LEVEL_BITS + SPARE_BITS)
        weight_BP = factor_BP.mul_(power_of_two(exponent_BP))
        weight_BP.masked_fill_(logits_BP < lowest_B1, 0.0)
        sums = []
        for level, rounder in enumerate(ROUNDERS):
            rounded_BP = (weight_BP + rounder).sub_(rounder)
            weight_BP.sub_(rounded_BP)
            # multiples of one unit: any order of this sum is exact up to 2^24 positions
            sums.append(rounded_BP.sum(dim=1) * 2.0 ** (LEVEL_BITS * (level + 1)))
        levels_BL = torch.stack(sums, dim=1).long()
        if bool(is_far_B.any()):
            ties_B = (logits_BP == peak_B[:, None]).sum(dim=1).masked_fill(peak_B == _NEGATIVE_INFINITY, 0)
            alone_BL = torch.stack([ties_B, *[torch.zeros_like(ties_B)] * (NUM_LEVELS - 1)], dim=1)
            levels_BL = torch.where(is_far_B[:, None], alone_BL, levels_BL)
        return Mass(peak=peak_B, levels=levels_BL)

    def plus(self, other: Mass) -> Mass:
        """Sum over both sets, which share no position."""
        peak_B = torch.maximum(self.peak, other.peak)
        return Mass(peak=peak_B, levels=self._levels_under(peak_B) + other._levels_under(peak_B))

    def log(self) -> Tensor:
        """Logarithm of the sum, (B,) float64; -inf for an empty set."""
        is_far_B = ~(self.peak.abs() <= FAR)
        base_B = self.peak.masked_fill(is_far_B, 0.0)
        factor_B, exponent_B = exp_parts(base_B)
        own_B = factor_B * power_of_two(exponent_B - _unit(base_B) * LEVEL_BITS - SPARE_BITS)
        high_B, middle_B, low_B = self.levels.unbind(dim=1)
        middle_B = middle_B + (low_B >> LEVEL_BITS)
        high_B = high_B + (middle_B >> LEVEL_BITS)
        mask = (1 << LEVEL_BITS) - 1
        below_B = ((middle_B & mask) << LEVEL_BITS) | (low_B & mask)
        total_B = high_B.double() + below_B.double() * 2.0 ** (-2 * LEVEL_BITS)
        ratio_B = total_B / own_B.masked_fill(is_far_B, 1.0)
        is_empty_B = self.peak == _NEGATIVE_INFINITY
        return self.peak + log(ratio_B.masked_fill(is_empty_B, 1.0))

    def _levels_under(self, peak_B: Tensor) -> Tensor:
        """Levels in the unit of a peak that is not lower."""
        is_far_B = ~((peak_B.abs() <= FAR) & (self.peak.abs() <= FAR))
        steps_B = _unit(peak_B.masked_fill(is_far_B, 0.0)) - _unit(self.peak.masked_fill(is_far_B, 0.0))
        place_BL = torch.arange(NUM_LEVELS, device=peak_B.device) - steps_B[:, None].long()
        levels_BL = self.levels.gather(1, place_BL.clamp(min=0)).masked_fill(place_BL < 0, 0)
        kept_B = ~is_far_B | (self.peak == peak_B)
        return levels_BL.masked_fill(~kept_B[:, None], 0)


def _unit(peak: Tensor) -> Tensor:
    """Number j of the unit of a peak, a whole float64."""
    return ((peak * LOG2_E).round_() / LEVEL_BITS).floor_()
