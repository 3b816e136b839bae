# mypy: ignore-errors
# numba infers types by its own rules
"""Memory by address and C functions by address, for functions compiled by numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def copy(_context: Any, _to: Any, _from: Any, _nbytes: Any) -> Any:
    """``memcpy`` between addresses."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, ir.IntType(64)])
        to, source = (builder.inttoptr(address, pointer) for address in arguments[:2])
        builder.call(memcpy, [to, source, arguments[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def call(_context: Any, _function: Any, _arguments: Any) -> Any:
    """Call the C function at an address with integers as wide as addresses; it gives back one of them."""
    if not isinstance(_arguments, types.UniTuple):
        return None

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        values = cgutils.unpack_tuple(builder, arguments[1])
        function = ir.FunctionType(word, [word] * len(values)).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), values)

    return types.int64(types.int64, types.UniTuple(types.int64, len(_arguments))), generate
