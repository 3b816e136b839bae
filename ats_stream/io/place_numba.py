# mypy: ignore-errors
# numba infers types by its own rules
"""Placing of chunks, compiled by numba: the pieces of many chunks in one call, without the interpreter lock.

Imported on first use, because numba takes some tenths of a second. Memory is given by address and strides in
bytes. Every piece is held against the shapes of its chunk and of the result before anything is copied.

Shape letters: K chunks, D axes, P pieces, as in :mod:`ats_stream.io.plan`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ats_stream.compiling import cached, jit
from ats_stream.io.memory_numba import call, copy


def _mover(num_bits: int) -> Any:
    """Copy one number of so many bits between addresses, aligned or not."""

    @intrinsic
    def move(_context: Any, _to: Any, _from: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = ir.IntType(num_bits).as_pointer()
            value = builder.load(builder.inttoptr(arguments[1], pointer), align=1)
            builder.store(value, builder.inttoptr(arguments[0], pointer), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


_move1, _move2, _move4, _move8 = (_mover(num_bits) for num_bits in (8, 16, 32, 64))


# pixels of three channels that are taken apart at once
_SPLIT_PX = 32


@intrinsic
def _split(_context: Any, _to: Any, _plane: Any, _from: Any) -> Any:
    """Take ``_SPLIT_PX`` pixels of three interleaved bytes apart, into planes ``_plane`` bytes apart."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        to, plane, source = arguments
        byte, word = ir.IntType(8), ir.IntType(32)
        pixels = ir.VectorType(byte, 3 * _SPLIT_PX)
        # one load and its three shuffles are what LLVM knows instructions for
        value = builder.load(builder.inttoptr(source, pixels.as_pointer()), align=1)
        for channel in range(3):
            at = ir.Constant(ir.VectorType(word, _SPLIT_PX), [channel + 3 * i for i in range(_SPLIT_PX)])
            part = builder.shuffle_vector(value, ir.Constant(pixels, ir.Undefined), at)
            builder.store(part, builder.inttoptr(to, part.type.as_pointer()), align=1)
            to = builder.add(to, plane)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@jit()
def _copy_row(to, to_stride, source, source_stride, length, itemsize):
    if to_stride == itemsize and source_stride == itemsize:
        copy(to, source, length * itemsize)
    elif itemsize == 1:
        for i in range(length):
            _move1(to + i * to_stride, source + i * source_stride)
    elif itemsize == 2:
        for i in range(length):
            _move2(to + i * to_stride, source + i * source_stride)
    elif itemsize == 4:
        for i in range(length):
            _move4(to + i * to_stride, source + i * source_stride)
    else:
        for i in range(length):
            _move8(to + i * to_stride, source + i * source_stride)


@jit()
def _split_row(to, plane_stride, source, length):
    """Copy pixels of three interleaved bytes into three planes."""
    whole = length // _SPLIT_PX * _SPLIT_PX
    for i in range(0, whole, _SPLIT_PX):
        _split(to + i, plane_stride, source + 3 * i)
    for c in range(3):
        for i in range(whole, length):
            _move1(to + c * plane_stride + i, source + 3 * i + c)


@jit()
def _place_chunk(chunk, strides_D, shape_D, number, plan, out):
    """Copy the pieces of one chunk; False, before any is copied, when one of them does not fit."""
    first_piece, rows_P, source_PD, target_PD, size_PD = plan
    address, out_shape, out_strides, itemsize = out
    num_axes = len(shape_D)
    for p in range(first_piece[number], first_piece[number + 1]):
        if not 0 <= rows_P[p] < out_shape[0]:
            return False
        for a in range(num_axes):
            size, source, target = size_PD[p, a], source_PD[p, a], target_PD[p, a]
            if size < 1 or source < 0 or target < 0:
                return False
            if source + size > shape_D[a] or target + size > out_shape[a + 1]:
                return False
    # rows are counted along the axis before the last; the axes before that are few and small
    y, x = num_axes - 2, num_axes - 1
    # colours as decoders of JPEG put them out
    is_split = num_axes == 3 and itemsize == 1 and strides_D[0] == 1 and strides_D[2] == 3
    is_split = is_split and out_strides[3] == 1
    for p in range(first_piece[number], first_piece[number + 1]):
        source, target = chunk, address + rows_P[p] * out_strides[0]
        num_planes = 1
        for a in range(num_axes):
            source += source_PD[p, a] * strides_D[a]
            target += target_PD[p, a] * out_strides[a + 1]
            if a < y:
                num_planes *= size_PD[p, a]
        if is_split and num_planes == 3:
            for _ in range(size_PD[p, y]):
                _split_row(target, out_strides[1], source, size_PD[p, x])
                source += strides_D[y]
                target += out_strides[y + 1]
            continue
        for plane in range(num_planes):
            from_row, to_row, rest = source, target, plane
            for a in range(y - 1, -1, -1):
                from_row += rest % size_PD[p, a] * strides_D[a]
                to_row += rest % size_PD[p, a] * out_strides[a + 1]
                rest //= size_PD[p, a]
            for _ in range(size_PD[p, y]):
                _copy_row(to_row, out_strides[x + 1], from_row, strides_D[x], size_PD[p, x], itemsize)
                from_row += strides_D[y]
                to_row += out_strides[y + 1]
    return True


@cached
def place(chunks_K, strides_KD, shapes_KD, numbers_K, plan, out):
    """Copy the pieces of decoded chunks; the first chunk whose pieces do not fit, or K."""
    for k in range(len(chunks_K)):
        if not _place_chunk(chunks_K[k], strides_KD[k], shapes_KD[k], numbers_K[k], plan, out):
            return k
    return len(chunks_K)


@cached
def place_zstd(is_done_K, functions, file, data_K2, zstd, layout, numbers_K, plan, out):
    """Decode chunks, each a zstd frame, and copy their pieces; note which of them were what they must be.

    ``functions`` are the addresses of ``pread`` and of the decoder; ``file`` the number of an open file, and
    the address of memory for a frame; ``data_K2`` where each frame begins and its size, below 0 for none.
    With -1 for the file, frames begin at addresses. ``zstd`` are the address of the decoder's context, and
    the address and size of the memory that every chunk is decoded into; ``layout`` its shape and strides.
    """
    pread, decompress = functions
    number, frame = file
    context, chunk, nbytes = zstd
    shape_D, strides_D = layout
    for k in range(len(numbers_K)):
        begin, size = data_K2[k, 0], data_K2[k, 1]
        if size < 0:
            continue
        if number >= 0:
            if call(pread, (number, frame, size, begin)) != size:
                continue
            begin = frame
        if call(decompress, (context, chunk, nbytes, begin, size)) == nbytes:
            is_done_K[k] = _place_chunk(chunk, strides_D, shape_D, numbers_K[k], plan, out)
