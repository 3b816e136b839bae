# mypy: ignore-errors
# numba infers types by its own rules
"""Encoding of many chunks in one call, compiled by numba, without the interpreter lock.

Imported on first use.

Shape letters: K chunks, D axes, as in :mod:`ats_stream.io.plan`.
"""

from __future__ import annotations

from ats_stream.compiling import cached, jit
from ats_stream.io.memory_numba import call, copy

_COMPARED_BYTES = 4096


@jit()
def _gather(to, source, strides_D, shape_D, row_bytes):
    """Copy a chunk whose rows lie in one piece each to memory in C order."""
    y = len(shape_D) - 2
    num_planes = 1
    for a in range(y):
        num_planes *= shape_D[a]
    for plane in range(num_planes):
        row, rest = source, plane
        for a in range(y - 1, -1, -1):
            row += rest % shape_D[a] * strides_D[a]
            rest //= shape_D[a]
        for _ in range(shape_D[y]):
            copy(to, row, row_bytes)
            to += row_bytes
            row += strides_D[y]


@jit()
def _is_fill(chunk, fill):
    """Whether a chunk is nothing but repetitions of the bytes of the fill value."""
    itemsize = len(fill)
    different = 0
    for i in range(itemsize):
        different |= chunk[i] ^ fill[i]
    # each byte against that of the number before it; mostly the first few thousand tell
    for begin in range(itemsize, len(chunk), _COMPARED_BYTES):
        if different:
            return False
        stop = min(begin + _COMPARED_BYTES, len(chunk))
        values, before = chunk[begin:stop], chunk[begin - itemsize : stop - itemsize]
        for i in range(len(values)):
            different |= values[i] ^ before[i]
    return different == 0


@cached
def encode_row(nbytes_K, row, step, layout, fill, chunk, zstd, out):
    """Encode chunks that follow each other ``step`` bytes apart from the address ``row`` on, as zstd frames
    one after another; note the sizes, 0 for a chunk of nothing but the fill value.

    ``layout`` are the shape of a chunk, its strides and the bytes of its rows; ``fill`` the bytes of the fill
    value; ``chunk`` memory for one chunk, and its address; ``zstd`` the addresses of the encoder and of its
    context; ``out`` the address of the memory for frames, and its size. Returns the bytes of all frames, -1
    when the encoder reports an error.
    """
    shape_D, strides_D, row_bytes = layout
    pixels, address = chunk
    compress, context = zstd
    frame, room = out
    total = 0
    for k in range(len(nbytes_K)):
        _gather(address, row + k * step, strides_D, shape_D, row_bytes)
        nbytes_K[k] = 0
        if _is_fill(pixels, fill):
            continue
        size = call(compress, (context, frame + total, room - total, address, len(pixels)))
        # errors are the largest numbers that there are without a sign
        if size <= 0 or size > room - total:
            return -1
        nbytes_K[k] = size
        total += size
    return total
