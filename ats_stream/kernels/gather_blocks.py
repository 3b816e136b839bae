# mypy: ignore-errors
# numba infers types by its own rules
"""Blocks of pixels of a constant length, in vectors of LLVM: the inner step of gather_numba.

A loop that the compiler makes vectors of has a slow rest and begins with questions of overlap, which rows of
a few hundred pixels do not repay. A block has neither: a row is as many as fit, and one that ends with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

FLOAT32, BFLOAT16, FLOAT16 = range(3)
_KINDS = {types.float32: FLOAT32, types.uint16: BFLOAT16, types.int16: FLOAT16}  # of an output's elements
LENGTH = 32
"""Pixels of a block."""
COLOURS = 3
"""Channels of pixels that are read or written side by side."""

_FLOAT, _WORD, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def _all(value: int | float, like: Any) -> ir.Constant:
    return ir.Constant(like, [value] * like.count)


def _spread(builder: Any, scalars: list[Any], count: int) -> Any:
    """A vector that repeats scalars."""
    kind = ir.VectorType(scalars[0].type, len(scalars))
    few = ir.Constant(kind, ir.Undefined)
    for number, scalar in enumerate(scalars):
        few = builder.insert_element(few, scalar, _WORD(number))
    return _chosen(builder, few, few, [lane % len(scalars) for lane in range(count)])


def _chosen(builder: Any, one: Any, two: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes))


def _loaded(context: Any, builder: Any, array_type: Any, array: Any, element: Any, count: int) -> Any:
    """``count`` pixels from an element on, as float32."""
    made = context.make_array(array_type)(context, builder, array)
    vector = ir.VectorType(context.get_data_type(array_type.dtype), count)
    place = builder.bitcast(builder.gep(made.data, [element]), vector.as_pointer())
    pixels = builder.load(place)
    pixels.align = array_type.dtype.bitwidth // 8
    if array_type.dtype == types.float32:
        return pixels
    return builder.uitofp(pixels, ir.VectorType(_FLOAT, count))


def _fma(builder: Any, x: Any, a: Any, b: Any) -> Any:
    name = f"llvm.fma.v{x.type.count}f32"
    kind = ir.FunctionType(x.type, [x.type] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [x, a, b])


def _bfloat16(builder: Any, v: Any) -> Any:
    u = builder.bitcast(v, ir.VectorType(_WORD, v.type.count))
    kind = u.type
    high = builder.lshr(u, _all(16, kind))
    odd = builder.and_(high, _all(1, kind))
    rounded = builder.lshr(builder.add(builder.add(u, _all(0x7FFF, kind)), odd), _all(16, kind))
    magnitude = builder.and_(u, _all(0x7FFFFFFF, kind))
    is_nan = builder.icmp_unsigned(">", magnitude, _all(0x7F800000, kind))
    return builder.select(is_nan, builder.or_(high, _all(0x40, kind)), rounded)


def _float16(builder: Any, v: Any) -> Any:
    u = builder.bitcast(v, ir.VectorType(_WORD, v.type.count))
    kind = u.type
    sign = builder.and_(builder.lshr(u, _all(16, kind)), _all(0x8000, kind))
    magnitude = builder.and_(u, _all(0x7FFFFFFF, kind))
    odd = builder.and_(builder.lshr(magnitude, _all(13, kind)), _all(1, kind))
    # rounds the mantissa half to even and moves the exponent; the carry of one goes into the other
    moved = builder.add(builder.add(magnitude, odd), _all((0xFFF - (112 << 23)) % (1 << 32), kind))
    normal = builder.lshr(moved, _all(13, kind))
    # the last place of a float32 from 0.5 to 1 is that of the smallest float16
    sum_ = builder.fadd(builder.bitcast(magnitude, v.type), _all(0.5, v.type))
    small = builder.sub(builder.bitcast(sum_, kind), _all(0x3F000000, kind))
    half = builder.select(builder.icmp_unsigned(">=", magnitude, _all(0x38800000, kind)), normal, small)
    is_too_large = builder.icmp_unsigned(">=", magnitude, _all(0x47800000, kind))
    half = builder.select(is_too_large, _all(0x7C00, kind), half)
    is_nan = builder.icmp_unsigned(">", magnitude, _all(0x7F800000, kind))
    half = builder.select(is_nan, _all(0x7E00, kind), half)
    return builder.or_(sign, half)


def _rounded(builder: Any, kind: int, v: Any) -> Any:
    """float32 values as the elements of an output, of two bytes as their bits."""
    if kind == FLOAT32:
        return v
    bits = _bfloat16(builder, v) if kind == BFLOAT16 else _float16(builder, v)
    return builder.trunc(bits, ir.VectorType(_HALF, v.type.count))


def _store(context: Any, builder: Any, array_type: Any, array: Any, place: Any, v: Any) -> None:
    """Round values, and write them from a place on."""
    made = context.make_array(array_type)(context, builder, array)
    value = _rounded(builder, _KINDS[array_type.dtype], v)
    to = builder.bitcast(builder.gep(made.data, [place]), value.type.as_pointer())
    builder.store(value, to, align=array_type.dtype.bitwidth // 8)


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Three vectors side by side, lane after lane: r g b r g b ..."""
    one, two, three = parts
    n = one.type.count
    pairs = _chosen(builder, one, two, list(range(2 * n)))
    longer = _chosen(builder, three, three, [*range(n), *([0] * n)])
    lanes = [(lane % COLOURS) * n + lane // COLOURS for lane in range(COLOURS * n)]
    return _chosen(builder, pairs, longer, lanes)


@intrinsic
def kind_of(_context: Any, _out: Any) -> Any:
    """What the elements of an output are; a constant, so that the compiler drops the other cases."""
    kind = _KINDS[_out.dtype]
    return types.int64(_out), lambda *_: ir.IntType(64)(kind)


def _line(context: Any, builder: Any, signature: Any, arguments: Any, *, is_backward: bool) -> Any:
    pixels, element, out, place, a, b = arguments
    if is_backward:
        element = builder.sub(element, element.type(LENGTH - 1))
    x = _loaded(context, builder, signature.args[0], pixels, element, LENGTH)
    if is_backward:
        x = _chosen(builder, x, x, list(range(LENGTH - 1, -1, -1)))
    v = _fma(builder, x, _spread(builder, [a], LENGTH), _spread(builder, [b], LENGTH))
    _store(context, builder, signature.args[2], out, place, v)
    return context.get_dummy_value()


@intrinsic
def forward(_context: Any, _pixels: Any, _element: Any, _out: Any, _place: Any, _a: Any, _b: Any) -> Any:
    """``out[place + j] = fma(pixels[element + j], a, b)`` for the j of a block."""
    return types.void(_pixels, types.int64, _out, types.int64, types.float32, types.float32), partial(
        _line, is_backward=False
    )


@intrinsic
def backward(_context: Any, _pixels: Any, _element: Any, _out: Any, _place: Any, _a: Any, _b: Any) -> Any:
    """``out[place + j] = fma(pixels[element - j], a, b)`` for the j of a block."""
    return types.void(_pixels, types.int64, _out, types.int64, types.float32, types.float32), partial(
        _line, is_backward=True
    )


@intrinsic
def joined(_context: Any, _pixels: Any, _elements: Any, _out: Any, _place: Any, _a: Any, _b: Any) -> Any:
    """``out[place + 3 j + c] = fma(pixels[elements[c] + j], a[c], b[c])`` for the j of a block, c below 3."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, elements, out, place, a, b = arguments
        parts = []
        for element, a_c, b_c in zip(*(_parts(builder, three) for three in (elements, a, b)), strict=True):
            x = _loaded(context, builder, signature.args[0], pixels, element, LENGTH)
            parts.append(_fma(builder, x, _spread(builder, [a_c], LENGTH), _spread(builder, [b_c], LENGTH)))
        _store(context, builder, signature.args[2], out, place, _joined(builder, parts))
        return context.get_dummy_value()

    three = types.UniTuple(types.float32, COLOURS)
    elements = types.UniTuple(types.int64, COLOURS)
    return types.void(_pixels, elements, _out, types.int64, three, three), generate


@intrinsic
def together(_context: Any, _pixels: Any, _element: Any, _out: Any, _place: Any, _a: Any, _b: Any) -> Any:
    """``out[place + 3 j + c] = fma(pixels[element + 3 j + c], a[c], b[c])``, as :func:`joined`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, element, out, place, a, b = arguments
        count = COLOURS * LENGTH
        x = _loaded(context, builder, signature.args[0], pixels, element, count)
        v = _fma(builder, x, *(_spread(builder, _parts(builder, three), count) for three in (a, b)))
        _store(context, builder, signature.args[2], out, place, v)
        return context.get_dummy_value()

    three = types.UniTuple(types.float32, COLOURS)
    return types.void(_pixels, types.int64, _out, types.int64, three, three), generate


def _parts(builder: Any, three: Any) -> list[Any]:
    return [builder.extract_value(three, number) for number in range(COLOURS)]


@intrinsic
def ask_for(_context: Any, _array: Any, _element: Any) -> Any:
    """Let the processor begin to read the line of an element, which may lie anywhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _WORD, _WORD, _WORD])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(prefetch, [place, _WORD(0), _WORD(3), _WORD(1)])  # to read, to all caches, data
        return context.get_dummy_value()

    return types.void(_array, types.int64), generate
