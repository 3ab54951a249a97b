"""What numba kernels do with a group of int4 codes (`quantized.py`), written as vectors: LLVM finds none by
itself in loops over half a byte."""

from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic

from toppings.ops.cpu_kernel import FAST_MATH
from toppings.ops.quantized import GROUP

_HALF, _LANES = GROUP // 2, 8
_BYTES = ir.VectorType(ir.IntType(8), _LANES)
_WORDS, _FLOATS = ir.VectorType(ir.IntType(32), _LANES), ir.VectorType(ir.FloatType(), _LANES)
_FLAGS = tuple(FAST_MATH)


def _vector(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


def _codes(builder: Any, codes: Any, place: Any) -> tuple[Any, Any]:
    """Of _LANES bytes: the codes in their lower and upper halves, fp32."""
    loaded = builder.load(_vector(builder, codes, place, _BYTES), align=1)
    words = builder.zext(loaded, _WORDS)
    lower = builder.and_(words, ir.Constant(_WORDS, [15] * _LANES))
    upper = builder.lshr(words, ir.Constant(_WORDS, [4] * _LANES))
    return builder.sitofp(lower, _FLOATS), builder.sitofp(upper, _FLOATS)


def _spread(builder: Any, value: Any) -> Any:
    """The scalar in every lane."""
    empty = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(empty, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, empty, ir.Constant(_WORDS, [0] * _LANES))


def _widened(builder: Any, value: Any) -> Any:
    """A bfloat16 as fp32; fp32 as it is."""
    if value.type == ir.FloatType():
        return value
    wide = builder.zext(value, ir.IntType(32))
    return builder.bitcast(builder.shl(wide, wide.type(16)), ir.FloatType())


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


@intrinsic  # type: ignore[untyped-decorator]
def dot_groups(
    typing_context: Any, x: Any, codes: Any, scales: Any, first: Any, num_groups: Any, shift: Any
) -> Any:
    """Σ over `num_groups` groups from `first` on of scale · Σ_k x[k] · code[k]; x: fp32 array of the groups'
    elements; scales: bf16 or fp32, one for 2^shift groups."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _data(context, builder, signature.args[0], args[0])
        _, code_bytes, scale_bits, first, count, shift = args
        word = count.type
        total = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * _LANES))
        with cgutils.for_range(builder, count) as loop:
            group = builder.add(first, loop.index)
            at, place = builder.mul(loop.index, word(GROUP)), builder.mul(group, word(_HALF))
            part = None
            for k in range(0, _HALF, _LANES):
                halves = _codes(builder, code_bytes, builder.add(place, word(k)))
                for start, half in zip((k, k + _HALF), halves, strict=True):
                    pointer = _vector(builder, data, builder.add(at, word(start)), _FLOATS)
                    product = builder.fmul(builder.load(pointer, align=4), half, flags=_FLAGS)
                    part = product if part is None else builder.fadd(part, product, flags=_FLAGS)
            scale_place = builder.gep(scale_bits, [builder.lshr(group, shift)])
            scale = _spread(builder, _widened(builder, builder.load(scale_place)))
            scaled = builder.fmul(scale, part, flags=_FLAGS)
            builder.store(builder.fadd(builder.load(total), scaled, flags=_FLAGS), total)
        vector, result = builder.load(total), None
        for lane in range(_LANES):
            each = builder.extract_element(vector, ir.IntType(32)(lane))
            result = each if result is None else builder.fadd(result, each, flags=_FLAGS)
        return result

    return types.float32(x, codes, scales, types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def widen_group(
    typing_context: Any, wide: Any, to: Any, codes: Any, place: Any, scale: Any, offset: Any
) -> Any:
    """code · scale + offset of the group whose bytes begin at `place`, into `wide` (an fp32 array) from `to`
    on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _data(context, builder, signature.args[0], args[0])
        _, to, code_bytes, place, scale, offset = args
        factor, shift = _spread(builder, scale), _spread(builder, offset)
        for k in range(0, _HALF, _LANES):
            halves = _codes(builder, code_bytes, builder.add(place, place.type(k)))
            for start, half in zip((k, k + _HALF), halves, strict=True):
                value = builder.fadd(builder.fmul(half, factor, flags=_FLAGS), shift, flags=_FLAGS)
                builder.store(
                    value, _vector(builder, data, builder.add(to, to.type(start)), _FLOATS), align=4
                )
        return context.get_dummy_value()

    counts = (types.int64, codes, types.int64, types.float32, types.float32)
    return types.void(wide, *counts), codegen
