"""What numba kernels are made of: elements in and out, dot products, an exponential that vectorises.

Tensors are seen through a typed address (`elements`, `floats`, `words`): indices are the caller's care, and
are not checked for being negative as numba's arrays would be, which would keep LLVM from vectorising.
Arithmetic is in float32 throughout.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from toppings.ops.cpu_kernel import FAST_MATH, integer

Function = TypeVar("Function", bound=Callable[..., Any])
Pointer = Any


def helper(function: Function) -> Function:
    """A function that kernels call; compiled into each of them."""
    compiled: Function = numba.njit(fastmath=FAST_MATH, error_model="numpy")(function)
    return compiled


@intrinsic  # type: ignore[untyped-decorator]
def _as_pointer(typing_context: Any, like: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return like(like, types.int64), codegen


def _typed(element: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def as_typed(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return as_typed


_as_floats, _as_int64, _as_int32 = _typed(types.float32), _typed(types.int64), _typed(types.int32)
_as_int8, _as_uint8, _as_bf16 = _typed(types.int8), _typed(types.uint8), _typed(types.uint16)


@helper
def elements_at(block: Any, address: int) -> Pointer:
    """A tensor of the kernel's format."""
    return _as_pointer(block, address)


@helper
def elements(block: Any, index: int) -> Pointer:
    """Operand `index`: a tensor of the kernel's format."""
    return elements_at(block, integer(block, index))


@helper
def floats(block: Any, index: int) -> Pointer:
    """Operand `index`: an fp32 tensor."""
    return _as_floats(integer(block, index))


@helper
def int64s(block: Any, index: int) -> Pointer:
    return _as_int64(integer(block, index))


@helper
def int32s(block: Any, index: int) -> Pointer:
    return _as_int32(integer(block, index))


@helper
def int8s(block: Any, index: int) -> Pointer:
    """Operand `index`: codes of 8 bits."""
    return _as_int8(integer(block, index))


@helper
def nibbles(block: Any, index: int) -> Pointer:
    """Operand `index`: codes of 4 bits, two a byte."""
    return _as_uint8(integer(block, index))


@helper
def bf16s(block: Any, index: int) -> Pointer:
    return _as_bf16(integer(block, index))


def _place(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    if isinstance(kind, types.Array):
        value = context.make_array(kind)(context, builder, value).data
    return builder.gep(value, [index], inbounds=True)


def _widen(builder: Any, kind: Any, bits: Any) -> Any:
    if kind == types.int16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    if kind == types.uint16:
        wide = builder.zext(bits, ir.IntType(32))
        return builder.bitcast(builder.shl(wide, wide.type(16)), ir.FloatType())
    return builder.sitofp(bits, ir.FloatType()) if kind == types.int8 else bits


def _narrow(builder: Any, kind: Any, value: Any) -> Any:
    if kind == types.int16:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    if kind != types.uint16:
        return value
    bits = builder.bitcast(value, ir.IntType(32))
    upper = builder.lshr(bits, bits.type(16))
    even = builder.add(builder.and_(upper, bits.type(1)), bits.type(0x7FFF))  # ties to even
    rounded = builder.lshr(builder.add(bits, even), bits.type(16))
    quiet_nan = builder.or_(upper, bits.type(0x40))  # rounding would carry a NaN's payload into infinity
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet_nan, rounded), ir.IntType(16))


@intrinsic  # type: ignore[untyped-decorator]
def load(typing_context: Any, source: Any, index: Any) -> Any:
    """`source[index]` of a pointer or a flat array: floats and codes of 8 bits as float32, other integers as
    they are."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        return _widen(builder, kind.dtype, builder.load(_place(context, builder, kind, *args)))

    loaded = source.dtype if source.dtype in (types.int64, types.int32) else types.float32
    return loaded(source, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store(typing_context: Any, target: Any, index: Any, value: Any) -> Any:
    """`target[index] = value`, a float32 rounded to the target's format, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        builder.store(_narrow(builder, kind.dtype, args[2]), _place(context, builder, kind, *args[:2]))
        return context.get_dummy_value()

    return types.void(target, types.intp, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy(typing_context: Any, target: Any, to: Any, source: Any, start: Any) -> Any:
    """`target[to] = source[start]`, of one format, bit by bit."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, signature.args[2], *args[2:]))
        builder.store(value, _place(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), codegen


def _prefetch(locality: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def ask(typing_context: Any, source: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            place = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
            is_write, is_data = number(0), number(1)
            builder.call(instruction, [place, is_write, number(locality), is_data])
            return context.get_dummy_value()

        return types.void(source, types.intp), codegen

    return ask


prefetch, prefetch_far = _prefetch(3), _prefetch(2)
"""prefetch(source, index) asks for the cache line of `source[index]`, which need not exist; `prefetch_far` no
nearer than the second-level cache, where more can be on its way at a time."""


@helper
def put(y: Any, index: int, value: np.float32, bias: Pointer, has_bias: bool, column: int) -> None:
    """y[index] = value + bias[column]; y: its elements, the same as float32, and whether that is what they
    are."""
    if has_bias:
        value += load(bias, column)
    if y[2]:
        store(y[1], index, value)
    else:
        store(y[0], index, value)


@helper
def exp(x: np.float32) -> np.float32:
    """e**x to 2 ulp for |x| < 87, saturating beyond: 2**n times a polynomial on [-ln2/2, ln2/2].

    Plain arithmetic, so that LLVM vectorises a loop over it (a call to libm's expf would not).
    The coefficients are the Taylor series': its first omitted term is below 1.5e-8 on that interval.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    power: np.float32 = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    result: np.float32 = p * power
    return result


@helper
def dot(
    a: Pointer | NDArray[Any], a_start: int, b: Pointer | NDArray[Any], b_start: int, n: int
) -> np.float32:
    total = np.float32(0)
    for i in range(n):
        total += load(a, a_start + i) * load(b, b_start + i)
    return total
