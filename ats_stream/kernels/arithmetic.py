"""Numbers that every path of the sampling kernels shares: torch, compiled CPU code and CUDA.

Equal bits everywhere come from the same IEEE operations on the same constants, in the same order.
"""

from __future__ import annotations

import math

# Philox4x32-10, see ats_stream.sampling.philox
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_NUM_ROUNDS = 10

# Logarithms and exponentials, see ats_stream.sampling.logarithm
LOG2_E = 1 / math.log(2)
# ln 2 in two parts: the first has 21 bits, so that exponent * LN2_HIGH is exact for exponents of 32 bits
LN2_HIGH = 0.6931471824645996
LN2_LOW = -1.904654299957768e-09
NUM_LOG_TERMS = 12
EXP_COEFFICIENTS = tuple(1 / math.factorial(power) for power in range(13))

# Sums of e^logit that do not depend on the order, see ats_stream.sampling.mass
LEVEL_BITS = 28
NUM_LEVELS = 3
SPARE_BITS = 1  # every weight is below half a unit, so nothing of it is left once the unit has risen past it
# adding and subtracting 1.5 * 2^(52 - b) rounds a number below 2^50 to a multiple of 2^-b
ROUNDERS = tuple(1.5 * 2.0 ** (52 - LEVEL_BITS * (level + 1)) for level in range(NUM_LEVELS))
REACH = 120.0  # e^-120 of the peak is below the last level
FAR = float(1 << 30)  # beyond it ln 2 in two parts is not enough

PADDING_INDEX = 1 << 62  # above every position, and exact where torch passes it through a float
