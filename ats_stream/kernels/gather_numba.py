# mypy: ignore-errors
# numba infers types by its own rules
"""The gather on the CPU, compiled by numba; the bits of gather.cu and of gather_torch.

Imported on first use, because numba takes most of a second. A line of a patch is cut into stretches that lie
in one chunk or outside the image, once for all lines; a stretch whose pixels follow each other is written in
the blocks of gather_blocks. Lines of an image are far apart in memory, so they are asked for early.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ats_stream.compiling import cached, jit
from ats_stream.kernels.gather_blocks import (
    BFLOAT16,
    COLOURS,
    FLOAT32,
    LENGTH,
    ask_for,
    backward,
    forward,
    joined,
    kind_of,
    together,
)

_LINE_BYTES = 64  # of a cache of the processor
_ROWS_AHEAD = 6  # a row of a patch is asked for while so many before it are written


@intrinsic
def _fma(_context: Any, _x: Any, _a: Any, _b: Any) -> Any:
    """``x * a + b`` in float32 with one rounding."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _bits(_context: Any, _x: Any) -> Any:
    """The bits of a float32 as uint32."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float_of_bits(_context: Any, _x: Any) -> Any:
    """The float32 of given bits."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@jit(forceinline=True)  # a loop around a call is not vectorised
def _bfloat16(v):
    u = _bits(v)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16((u >> np.uint32(16)) | np.uint32(0x40) if is_nan else rounded)


@jit(forceinline=True)
def _float16(v):
    u = _bits(v)
    sign = (u >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = u & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = (magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13)
    small = _bits(_float_of_bits(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    half = normal if magnitude >= np.uint32(0x38800000) else small
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
    half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
    return np.uint16(sign | half)


@jit(forceinline=True)
def _adjusted(x, top, gain, offset):
    changed = x * gain + offset  # not contracted: two roundings, as two operations of torch
    if top > 0:
        return min(max(np.rint(changed) + np.float32(0), np.float32(0)), top)  # an integer knows no -0
    return changed


@jit(forceinline=True)
def _put(v, out, place):
    if kind_of(out) == FLOAT32:
        out[place] = v
    elif kind_of(out) == BFLOAT16:
        out[place] = _bfloat16(v)
    else:
        out[place] = _float16(v)


@jit(forceinline=True)
def _blocks(pixels, start, step, n, out, to, a, b):
    """Pixels side by side to places side by side, a block at a time; the last ends with the stretch."""
    for number in range((n + LENGTH - 1) // LENGTH):
        done = min(number * LENGTH, n - LENGTH)
        if step == 1:
            forward(pixels, start + done, out, to + done, a, b)
        else:
            backward(pixels, start - done, out, to + done, a, b)


@jit(forceinline=True)
def _colours(is_together, pixels, starts, n, out, to, scale, shift):
    """Pixels of three channels from elements ``starts`` on to channels last, in blocks as :func:`_blocks`."""
    r, g, b = starts[0], starts[1], starts[2]
    scales, shifts = (scale[0], scale[1], scale[2]), (shift[0], shift[1], shift[2])
    for number in range((n + LENGTH - 1) // LENGTH):
        done = min(number * LENGTH, n - LENGTH)
        place = to + COLOURS * done
        if is_together:
            together(pixels, r + COLOURS * done, out, place, scales, shifts)
        else:
            joined(pixels, (r + done, g + done, b + done), out, place, scales, shifts)


@jit(forceinline=True)
def _ask_for_line(pixels, start, step, n):
    """Let the processor begin to read a stretch that is needed soon."""
    first = min(start, start + (n - 1) * step)
    last = max(start, start + (n - 1) * step)
    for element in range(first, last + 1, _LINE_BYTES // pixels.itemsize):
        ask_for(pixels, element)
    ask_for(pixels, last)


@jit(forceinline=True)
def _stretch(pixels, start, step, n, out, to, to_step, a, b, is_adjusted, top, gain, offset):
    """``n`` pixels, ``step`` apart from element ``start`` on, to places ``to_step`` apart."""
    # unsigned: an index that could mean one from the end would cost the vectors; a step back wraps around
    first, next_first, count = np.uint64(start), np.uint64(step), np.uint64(n)
    place, next_place = np.uint64(to), np.uint64(to_step)
    if is_adjusted:
        for j in range(count):
            x = _adjusted(np.float32(pixels[first + j * next_first]), top, gain, offset)
            _put(_fma(x, a, b), out, place + j * next_place)
    elif to_step == 1 and n >= LENGTH and (step == 1 or step == -1):
        _blocks(pixels, start, step, n, out, to, a, b)
    else:
        for j in range(count):
            x = np.float32(pixels[first + j * next_first])
            _put(_fma(x, a, b), out, place + j * next_place)


@jit(forceinline=True)
def _fill(value, out, to, to_step, n):
    for j in range(n):
        _put(value, out, to + j * to_step)


@jit()
def _places(out, size, is_flipped, begin, space, chunk, next_chunk, next_pixel):
    """For each pixel along an axis, the entry of its chunk, or -1 outside, and its element in the chunk."""
    for o in range(size):
        p = begin + (size - 1 - o if is_flipped else o)
        out[0, o] = -1
        if 0 <= p < space:
            k = p // chunk
            out[0, o] = k * next_chunk
            out[1, o] = (p - k * chunk) * next_pixel


@jit()
def _cut(out, size, is_flipped, begin, space, chunk, next_chunk, next_pixel):
    """Cut a line where it changes chunks or leaves the image; return how many stretches there are.

    Of each the entry of its chunk, or -1 outside, the element of its first pixel, its begin, its length.
    """
    count = 0
    o = 0
    while o < size:
        left = size - o
        p = begin + (left - 1 if is_flipped else o)
        out[0, count] = -1
        out[2, count] = o
        if p < 0:
            n = left if is_flipped else min(-p, left)
        elif p >= space:
            n = min(p - space + 1, left) if is_flipped else left
        else:
            k = p // chunk
            rest = p - k * chunk
            n = min(left, rest + 1 if is_flipped else min(chunk - rest, space - p))
            out[0, count] = k * next_chunk
            out[1, count] = rest * next_pixel
        out[3, count] = n
        count += 1
        o += n
    return count


@cached
def run(
    pixels,
    starts,
    images,
    image_of,
    offsets,
    sources,
    flips,
    intensity,
    scale,
    shift,
    out,
    first,
    stop,
    chunk_channels,
    chunk,
    next_element,
    size,
    to_pixel,
    to_channel,
    fill,
    absent,
    top,
):
    """Gather patches ``first`` to ``stop``.

    ``images`` (I, 7), ``starts`` (T,), ``image_of`` (N,) and ``offsets`` (N, 3) are int64; ``sources`` and
    ``flips`` (N, 3), or of no rows where no patch is moved; ``intensity`` (N, 2) float32, or of no rows.
    ``next_element`` (4,) are the strides in a chunk of channel, z, y, x; ``size`` (3,) the patch. A patch has
    prod(size) * C places in ``out``: float32, or the bits of bfloat16 as uint16, of float16 as int16;
    ``to_pixel`` and ``to_channel`` are the strides there. ``top`` is the largest value of integer pixels, 0
    for float32.
    """
    num_channels = len(scale)
    num_pixels = size[0] * size[1] * size[2]
    is_adjusted = len(intensity) > 0
    gain, shift_by = np.float32(1), np.float32(0)
    value_outside, value_absent = np.empty(num_channels, np.float32), np.empty(num_channels, np.float32)
    for channel in range(num_channels):
        value_outside[channel] = _fma(np.float32(fill), scale[channel], shift[channel])
    channel_starts = np.empty(num_channels, np.int64)
    stretches = [np.empty((4, size[a]), np.int64) for a in range(3)]
    for patch in range(first, stop):
        row = images[image_of[patch]]
        next_part = row[4] * row[5] * row[6]
        step = next_element[3]
        num_stretches = 0
        is_there = True
        for a in range(3):
            along = sources[patch, a] if len(sources) else a
            begin, space = offsets[patch, along], row[1 + along]
            # far outside, where sums of positions could overflow
            if not -size[a] < begin < space:
                is_there = False
                break
            is_flipped = flips[patch, a] if len(flips) else False
            next_chunk = row[6] * row[5] if along == 0 else (row[6] if along == 1 else 1)
            next_pixel = next_element[1 + along]
            if a < 2:
                _places(stretches[a], size[a], is_flipped, begin, space, chunk[along], next_chunk, next_pixel)
            else:
                num_stretches = _cut(
                    stretches[a], size[a], is_flipped, begin, space, chunk[along], next_chunk, next_pixel
                )
                step = -next_pixel if is_flipped else next_pixel
        if is_adjusted:
            gain, shift_by = intensity[patch, 0], intensity[patch, 1]
        blank = np.float32(absent)
        if is_adjusted:
            blank = _adjusted(blank, top, gain, shift_by)
        for channel in range(num_channels):
            value_absent[channel] = _fma(blank, scale[channel], shift[channel])
        base = patch * num_pixels * num_channels
        if not is_there:
            for channel in range(num_channels):
                to = base + channel * to_channel
                _fill(value_outside[channel], out, to, to_pixel, num_pixels)
            continue
        along_z, along_y, along_x = stretches
        for oz in range(size[0]):
            for oy in range(size[1]):
                is_inside = along_z[0, oz] >= 0 and along_y[0, oy] >= 0
                line_entry = row[0] + along_z[0, oz] + along_y[0, oy]
                line_element = along_z[1, oz] + along_y[1, oy]
                line = base + (oz * size[1] + oy) * size[2] * to_pixel
                ahead = min(oy + _ROWS_AHEAD, size[1] - 1)
                further = along_y[1, ahead] - along_y[1, oy]
                is_asked = ahead > oy and along_y[0, ahead] == along_y[0, oy] and abs(step) <= num_channels
                for number in range(num_stretches):
                    n = along_x[3, number]
                    place = line + along_x[2, number] * to_pixel
                    if not is_inside or along_x[0, number] < 0:
                        for channel in range(num_channels):
                            to = place + channel * to_channel
                            _fill(value_outside[channel], out, to, to_pixel, n)
                        continue
                    entry = line_entry + along_x[0, number]
                    element = line_element + along_x[1, number]
                    is_stored = True
                    for channel in range(num_channels):
                        part = channel // chunk_channels if chunk_channels < num_channels else 0
                        start = starts[entry + part * next_part]
                        if start < 0:
                            is_stored = False
                            channel_starts[channel] = -1
                            continue
                        start += (channel - part * chunk_channels) * next_element[0] + element
                        channel_starts[channel] = start
                        if is_asked and (channel == 0 or next_element[0] != 1):
                            _ask_for_line(pixels, start + further, step, n)
                    is_together = step == COLOURS and next_element[0] == 1 and chunk_channels == COLOURS
                    if (
                        to_pixel == COLOURS
                        and num_channels == COLOURS
                        and is_stored
                        and not is_adjusted
                        and n >= LENGTH
                        and (step == 1 or is_together)
                    ):
                        _colours(is_together, pixels, channel_starts, n, out, place, scale, shift)
                        continue
                    for channel in range(num_channels):
                        to = place + channel * to_channel
                        if channel_starts[channel] < 0:
                            _fill(value_absent[channel], out, to, to_pixel, n)
                            continue
                        _stretch(
                            pixels,
                            channel_starts[channel],
                            step,
                            n,
                            out,
                            to,
                            to_pixel,
                            scale[channel],
                            shift[channel],
                            is_adjusted,
                            top,
                            gain,
                            shift_by,
                        )
