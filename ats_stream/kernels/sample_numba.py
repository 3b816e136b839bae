# mypy: ignore-errors
# numba infers types by its own rules
"""The exponential race on the CPU, compiled by numba: one pass over the logits, bit-equal to the torch path.

Imported on first use, because numba takes most of a second. numba's cache looks at the content of this file
alone, so :data:`ARITHMETIC` tells which content of :mod:`ats_stream.kernels.arithmetic` is compiled in.

Per block of positions that fits the innermost cache:

1. the high Philox words of four positions at a time; only the smallest of the four is kept. A position can
   come in only if E <= e^(threshold + logit), and E >= word 2^-32: one comparison with the bound of the
   block's largest logit rejects nearly all of them, before any logarithm;
2. the few others get their exact key, and go into a heap of the first arrivals if they belong there;
3. the weights of all that stayed outside are summed, see :mod:`ats_stream.sampling.mass`.

Letters: n positions of a block, K arrivals kept, four positions are one Philox group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ats_stream.compiling import cached, jit
from ats_stream.kernels import arithmetic

ARITHMETIC = "02ef496e2e808dc3"  # the first digits of its SHA-256
BLOCK = 1024
NUM_GROUPS = BLOCK // 4 + 1  # a block may begin inside a group

_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_2 = np.uint64(2)
_3 = np.uint64(3)
_A0, _A1 = (np.uint64(value) for value in arithmetic.PHILOX_MULTIPLIERS)
_W0, _W1 = (np.uint64(value) for value in arithmetic.PHILOX_WEYL)
_ROUNDS = arithmetic.PHILOX_NUM_ROUNDS
_LARGEST_WORD = 0xFFFFFFFF

_LOG2_E = arithmetic.LOG2_E
_LN2_HIGH = arithmetic.LN2_HIGH
_LN2_LOW = arithmetic.LN2_LOW
_NUM_LOG_TERMS = arithmetic.NUM_LOG_TERMS
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12 = arithmetic.EXP_COEFFICIENTS
_SQRT_HALF = math.sqrt(0.5)
_INTEGER = 1.5 * 2.0**52  # added to a number below 2^51, leaves its nearest integer in the low bits

_BITS = arithmetic.LEVEL_BITS
_SPARE_BITS = arithmetic.SPARE_BITS
_ROUNDER1, _ROUNDER2, _ROUNDER3 = arithmetic.ROUNDERS
_REACH = arithmetic.REACH
_FAR = arithmetic.FAR
_PADDING_INDEX = arithmetic.PADDING_INDEX
_NEVER = -math.inf

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)


@intrinsic
def _bits(_context: Any, _x: Any) -> Any:
    """The bits of a float64 as int64."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic
def _float_of_bits(_context: Any, _x: Any) -> Any:
    """The float64 of given bits."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _float32_of_bits(_context: Any, _x: Any) -> Any:
    """The float32 of given bits."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


# Philox ---------------------------------------------------------------------------------------------------


@jit(forceinline=True)  # a loop around a call is not vectorised
def _philox(group, stream_low, stream_high, purpose, key0, key1):
    c0, c1, c2, c3 = group, stream_low, stream_high, purpose
    for _ in range(_ROUNDS):
        product0 = c0 * _A0
        product1 = c2 * _A1
        c0 = (product1 >> _32) ^ c1 ^ key0
        c1 = product1 & _MASK
        c2 = (product0 >> _32) ^ c3 ^ key1
        c3 = product0 & _MASK
        key0 = (key0 + _W0) & _MASK
        key1 = (key1 + _W1) & _MASK
    return c0, c1, c2, c3


@jit()
def _word(index, stream_low, stream_high, purpose, key0, key1):
    w0, w1, w2, w3 = _philox(index >> _2, stream_low, stream_high, purpose, key0, key1)
    lane = index & _3
    even = w0 if lane == np.uint64(0) else w2
    odd = w1 if lane == np.uint64(1) else w3
    return odd if lane & np.uint64(1) else even


@jit()
def _smallest_words(first, count, stream_low, stream_high, key0, key1, out):
    """The smallest high word of each of ``count`` groups."""
    for j in range(count):
        w0, w1, w2, w3 = _philox(first + np.uint64(j), stream_low, stream_high, np.uint64(0), key0, key1)
        a = min(w0, w1)
        b = min(w2, w3)
        out[j] = np.uint32(min(a, b))


@jit()
def _scattered_words(index, stream_low, stream_high, key0, key1, out):
    for j in range(len(index)):
        out[j] = np.uint32(_word(np.uint64(index[j]), stream_low, stream_high, np.uint64(0), key0, key1))


# Logarithm and exponential, operation by operation those of ats_stream.sampling.logarithm -------------------


@jit()
def _twice_atanh(s):
    square = s * s
    series = 1 / (2 * _NUM_LOG_TERMS - 1)
    for term in range(_NUM_LOG_TERMS - 2, -1, -1):
        series = series * square + 1 / (2 * term + 1)
    return (s * 2) * series


@jit()
def _log(x):
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa = 2 * mantissa
        exponent = exponent - 1
    k = float(exponent)
    residue = _twice_atanh((mantissa - 1) / (mantissa + 1))
    return k * _LN2_HIGH + (k * _LN2_LOW + residue)


@jit()
def _minus_log1m(u):
    if u < 0.25:
        return _twice_atanh(u / (2 - u))
    return -_log(1 - u)


@jit(forceinline=True)  # a loop around a call is not vectorised
def _scaled_exp(x, shift):
    """e^x 2^(shift - 1023) for |x| <= 2^30, where the result is a normal number."""
    z = x * _LOG2_E + _INTEGER
    k = z - _INTEGER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    square = r * r
    fourth = square * square
    low = (r * _C1 + _C0) + (r * _C3 + _C2) * square
    middle = (r * _C5 + _C4) + (r * _C7 + _C6) * square
    high = ((r * _C9 + _C8) + (r * _C11 + _C10) * square) + fourth * _C12
    p = (low + middle * fourth) + high * (fourth * fourth)
    return p * _float_of_bits((_bits(z) + shift) << 52)


# The race ---------------------------------------------------------------------------------------------------


@jit()
def _key(index, high, logit, stream_low, stream_high, key0, key1):
    low = _word(index, stream_low, stream_high, np.uint64(1), key0, key1)
    bits = (np.int64(high) << 21) | (np.int64(low) >> 11)
    u = min((float(bits) + 0.5) * 2.0**-53, 1 - 2.0**-53)
    return _log(_minus_log1m(u)) - logit


@jit()
def _is_before(key, index, other_key, other_index):
    return key < other_key or (key == other_key and index < other_index)


@jit()
def _sift_up(keys, indices, logits, place):
    """Move an entry of the heap, whose last arrival is on top, up to where it belongs."""
    while place > 0:
        parent = (place - 1) >> 1
        if not _is_before(keys[parent], indices[parent], keys[place], indices[place]):
            return
        _swap(keys, indices, logits, parent, place)
        place = parent


@jit()
def _sift_down(keys, indices, logits, count):
    """Move the top entry of a heap of ``count`` down to where it belongs."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= count:
            return
        if child + 1 < count and _is_before(keys[child], indices[child], keys[child + 1], indices[child + 1]):
            child += 1
        if not _is_before(keys[place], indices[place], keys[child], indices[child]):
            return
        _swap(keys, indices, logits, place, child)
        place = child


@jit()
def _swap(keys, indices, logits, a, b):
    keys[a], keys[b] = keys[b], keys[a]
    indices[a], indices[b] = indices[b], indices[a]
    logits[a], logits[b] = logits[b], logits[a]


@jit()
def _unit(peak):
    return math.floor(np.rint(peak * _LOG2_E) / _BITS)


@jit()
def _is_far(peak):
    return not abs(peak) <= _FAR


@jit()
def _raise_peak(levels, peak, new_peak):
    """Bring the sums under the unit of a peak that is higher."""
    if _is_far(peak) or _is_far(new_peak):
        levels[:] = 0
        return
    steps = np.int64(_unit(new_peak) - _unit(peak))
    for level in range(len(levels) - 1, -1, -1):
        levels[level] = levels[level - steps] if level >= steps else 0


@jit()
def _add_one(levels, peak, logit):
    """Add the weight of one logit that is not above the peak."""
    if _is_far(peak):
        if logit == peak:
            levels[0] += 1
        return
    if logit < max(peak - _REACH, -_FAR):
        return
    w = _scaled_exp(logit, np.int64(1023 - _BITS - _SPARE_BITS) - np.int64(_unit(peak)) * _BITS)
    for level, rounder in enumerate((_ROUNDER1, _ROUNDER2, _ROUNDER3)):
        rounded = w + rounder
        levels[level] += _bits(rounded) - _bits(rounder)
        w = w - (rounded - rounder)


@jit()
def _scaled_exps(x, lowest, shift, out):
    for j in range(len(x)):
        out[j] = _scaled_exp(max(x[j], lowest), shift)


@jit()
def _add_many(levels, w):
    sum1, sum2, sum3 = np.int64(0), np.int64(0), np.int64(0)
    for j in range(len(w)):
        rest = w[j]
        rounded = rest + _ROUNDER1
        sum1 += _bits(rounded) - _bits(_ROUNDER1)
        rest = rest - (rounded - _ROUNDER1)
        rounded = rest + _ROUNDER2
        sum2 += _bits(rounded) - _bits(_ROUNDER2)
        rest = rest - (rounded - _ROUNDER2)
        rounded = rest + _ROUNDER3
        sum3 += _bits(rounded) - _bits(_ROUNDER3)
    levels[0] += sum1
    levels[1] += sum2
    levels[2] += sum3


@jit()
def _add_block(levels, peak, x, largest, w):
    """Add the weights of a block, whose largest logit is given, and return the peak."""
    if largest == _NEVER:
        return peak
    if largest > peak:
        _raise_peak(levels, peak, largest)
        peak = largest
    if _is_far(peak) or peak - _REACH < -_FAR:
        for j in range(len(x)):
            _add_one(levels, peak, x[j])
    elif largest >= peak - _REACH:
        shift = np.int64(1023 - _BITS - _SPARE_BITS) - np.int64(_unit(peak)) * _BITS
        _scaled_exps(x, peak - _REACH, shift, w)
        _add_many(levels, w)
    return peak


@jit(fastmath={"nnan", "nsz"})
def _largest(x):
    largest = _NEVER
    for j in range(len(x)):
        largest = max(largest, x[j])
    return largest


@jit()
def _load(kind, float64s, float32s, words, start, out):
    """Read a block as float64, from whichever of the three arrays ``kind`` says."""
    n = len(out)
    if kind == FLOAT64:
        source = float64s[start : start + n]
        for j in range(n):
            out[j] = source[j]
    elif kind == FLOAT32:
        source32 = float32s[start : start + n]
        for j in range(n):
            out[j] = source32[j]
    elif kind == BFLOAT16:
        source16 = words[start : start + n]
        for j in range(n):
            out[j] = _float32_of_bits(np.uint32(np.uint32(source16[j]) << np.uint32(16)))
    else:
        source16 = words[start : start + n]
        for j in range(n):
            word = np.uint32(source16[j])
            magnitude = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13))
            # a float32 of the same bits is 2^112 too small, subnormals included
            value = np.float64(_float32_of_bits(magnitude)) * 2.0**112
            value = math.inf if magnitude >= np.uint32(0x7C00 << 13) else value
            out[j] = -value if word & np.uint32(0x8000) else value


@jit()
def _word_limit(threshold, largest):
    """The largest high word with which a logit of at most ``largest`` can arrive before ``threshold``."""
    if threshold == math.inf:
        return np.int64(_LARGEST_WORD)
    # the margin covers every rounding in keys and here
    reach = threshold + largest + 1e-9 + 1e-15 * (abs(threshold) + abs(largest))
    if not reach < 0:  # or NaN, where a sum overflows
        return np.int64(_LARGEST_WORD)
    return np.int64(math.exp(reach) * 4294967296.0) + 1


@jit()
def _enter(keys, indices, logits, count, key, index, logit, levels, peak):
    """Let a position into the heap if it belongs there; return the count, the peak, and if it entered."""
    if count < len(keys):
        keys[count], indices[count], logits[count] = key, index, logit
        _sift_up(keys, indices, logits, count)
        return count + 1, peak, True
    if not _is_before(key, index, keys[0], indices[0]):
        return count, peak, False
    out = logits[0]
    keys[0], indices[0], logits[0] = key, index, logit
    _sift_down(keys, indices, logits, count)
    if out > peak:
        _raise_peak(levels, peak, out)
        peak = out
    _add_one(levels, peak, out)
    return count, peak, True


@jit()
def _sort(keys, indices, logits, count):
    for last in range(count - 1, 0, -1):
        _swap(keys, indices, logits, 0, last)
        _sift_down(keys, indices, logits, last)


@cached
def run(
    kind,
    float64s,
    float32s,
    words,
    row_stride,
    global_index,
    index_stride,
    streams,
    seed,
    by_logit,
    first_row,
    first,
    stop,
    keys,
    indices,
    logits,
    peaks,
    levels,
):
    """Race the positions ``first`` to ``stop`` of rows ``first_row`` and following; one row of output each.

    The logits are in the flat array that ``kind`` names, rows ``row_stride`` apart, and their global indices,
    unless that array is empty, in ``global_index``, rows ``index_stride`` apart. ``streams`` and ``seed`` are
    uint64. Fills keys, indices, logits (rows, K), peaks (rows,) and levels (rows, 3).
    """
    x_all = np.empty(BLOCK, np.float64)
    w_all = np.empty(BLOCK, np.float64)
    smallest_all = np.empty(NUM_GROUPS, np.uint32)
    scattered_all = np.empty(BLOCK, np.uint32)
    key0, key1 = seed & _MASK, seed >> _32
    for row in range(len(keys)):
        stream_low, stream_high = streams[first_row + row] & _MASK, streams[first_row + row] >> _32
        heap, heap_index, heap_logit = keys[row], indices[row], logits[row]
        row_levels = levels[row]
        row_levels[:] = 0
        peak = _NEVER
        count = 0
        num_kept = len(heap)
        for block in range(first, stop, BLOCK):
            n = min(BLOCK, stop - block)
            x = x_all[:n]
            _load(kind, float64s, float32s, words, (first_row + row) * row_stride + block, x)
            largest = _largest(x)
            if largest == _NEVER:
                continue
            start = np.int64(block)
            is_run = True
            names = global_index[:0]
            if len(global_index) > 0:
                at = (first_row + row) * index_stride + block
                names = global_index[at : at + n]
                start = names[0]
                for j in range(n):
                    is_run &= names[j] == start + j
            has_changed = False
            if by_logit and count == num_kept and -largest > heap[0]:
                pass
            elif by_logit:
                for j in range(n):
                    if x[j] > _NEVER and (count < num_kept or -x[j] <= heap[0]):
                        index = start + j if is_run else names[j]
                        count, peak, entered = _enter(
                            heap, heap_index, heap_logit, count, -x[j], index, x[j], row_levels, peak
                        )
                        if entered:
                            x[j] = _NEVER
                            has_changed = True
            else:
                threshold = heap[0] if count == num_kept else math.inf
                limit = _word_limit(threshold, largest)
                group = start >> 2
                num_groups = ((start + n + 3) >> 2) - group
                if is_run:
                    smallest = smallest_all[:num_groups]
                    _smallest_words(
                        np.uint64(group), num_groups, stream_low, stream_high, key0, key1, smallest
                    )
                else:
                    num_groups = n
                    smallest = scattered_all[:n]
                    _scattered_words(names, stream_low, stream_high, key0, key1, smallest)
                for g in range(num_groups):
                    if np.int64(smallest[g]) > limit:
                        continue
                    begin = max((group + g) * 4 - start, 0) if is_run else g
                    end = min((group + g) * 4 + 4 - start, n) if is_run else g + 1
                    first_index = start + begin if is_run else names[g]
                    w0, w1, w2, w3 = _philox(
                        np.uint64(first_index >> 2), stream_low, stream_high, np.uint64(0), key0, key1
                    )
                    for j in range(begin, end):
                        index = start + j if is_run else first_index
                        lane = index & 3
                        high = (w0 if lane == 0 else w1) if lane < 2 else (w2 if lane == 2 else w3)
                        logit = x[j]
                        if np.int64(high) > limit or logit == _NEVER:
                            continue
                        if np.int64(high) > _word_limit(threshold, logit):
                            continue
                        key = _key(np.uint64(index), high, logit, stream_low, stream_high, key0, key1)
                        count, peak, entered = _enter(
                            heap, heap_index, heap_logit, count, key, index, logit, row_levels, peak
                        )
                        if entered:
                            x[j] = _NEVER
                            has_changed = True
                            threshold = heap[0] if count == num_kept else math.inf
                            limit = _word_limit(threshold, largest)
            if has_changed:
                largest = _largest(x)
            peak = _add_block(row_levels, peak, x, largest, w_all[:n])
        _sort(heap, heap_index, heap_logit, count)
        heap[count:] = math.inf
        heap_index[count:] = _PADDING_INDEX
        heap_logit[count:] = _NEVER
        peaks[row] = peak


# Several ranges of columns, and logarithms of sums ----------------------------------------------------------


@jit()
def _log_sum(levels, peak):
    """Logarithm of a sum: of (high + middle 2^-28 + low 2^-56) / (e^peak / unit), and the peak beside it."""
    if peak == _NEVER:
        return _NEVER
    own = 1.0
    if not _is_far(peak):
        own = _scaled_exp(peak, np.int64(1023 - _SPARE_BITS) - np.int64(_unit(peak)) * _BITS)
    middle = levels[1] + (levels[2] >> _BITS)
    high = levels[0] + (middle >> _BITS)
    mask = (np.int64(1) << _BITS) - 1
    below = ((middle & mask) << _BITS) | (levels[2] & mask)
    total = float(high) + float(below) * 2.0 ** (-2 * _BITS)
    return peak + _log(total / own)


@jit()
def _add_any(levels, peak, logit):
    """Add the weight of a logit that may be above the peak, or nothing; return the peak."""
    if logit > peak:
        _raise_peak(levels, peak, logit)
        peak = logit
    if logit > _NEVER:
        _add_one(levels, peak, logit)
    return peak


@cached
def join(keys, indices, logits, peaks, levels, logs):
    """Join T ranges (T, rows, K), (T, rows) and (T, rows, 3) into the first; fill ``logs`` (2, rows).

    ``logs`` are the log-sum-exps of all logits, and of those behind the first K - 1 arrivals.
    """
    num_ranges, num_rows, num_kept = keys.shape
    sums = np.zeros(3, np.int64)
    for row in range(num_rows):
        key, index, logit = keys[0, row], indices[0, row], logits[0, row]
        own_levels, peak = levels[0, row], peaks[0, row]
        for other in range(1, num_ranges):
            old_key, old_index, old_logit = key.copy(), index.copy(), logit.copy()
            next_key, next_index, next_logit = keys[other, row], indices[other, row], logits[other, row]
            a = b = 0
            for i in range(num_kept):
                if _is_before(next_key[b], next_index[b], old_key[a], old_index[a]):
                    key[i], index[i], logit[i] = next_key[b], next_index[b], next_logit[b]
                    b += 1
                else:
                    key[i], index[i], logit[i] = old_key[a], old_index[a], old_logit[a]
                    a += 1
            for i in range(a, num_kept):
                peak = _add_any(own_levels, peak, old_logit[i])
            for i in range(b, num_kept):
                peak = _add_any(own_levels, peak, next_logit[i])
            sums[:] = levels[other, row]
            other_peak = peaks[other, row]
            if other_peak > peak:
                _raise_peak(own_levels, peak, other_peak)
                peak = other_peak
            elif other_peak < peak:
                _raise_peak(sums, other_peak, peak)
            own_levels += sums
        peaks[0, row] = peak
        sums[:] = own_levels
        peak = _add_any(sums, peak, logit[num_kept - 1])
        logs[1, row] = _log_sum(sums, peak)
        for i in range(num_kept - 1):
            peak = _add_any(sums, peak, logit[i])
        logs[0, row] = _log_sum(sums, peak)
