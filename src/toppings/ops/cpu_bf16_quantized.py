"""numba kernels for products of few bfloat16 rows with a weight of 8 or 4 bits, on CPUs that multiply
bfloat16 (`cpu_tiles.is_supported`; `quantized.py` has the layout, `cpu_quantized.py` what serves elsewhere).

Codes are small integers, which bfloat16 holds exactly: they are widened to it in registers, once for up to
four rows, and the CPU's instruction multiplies pairs and sums in float32. Scales and offsets come on top: of
a row of the weight for 8 bits, of each group for 4, where a register's four quarters are four groups.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from toppings.ops.cpu_bits import (
    Pointer,
    bf16s,
    copy,
    elements,
    floats,
    helper,
    int8s,
    load,
    nibbles,
    prefetch,
    put,
)
from toppings.ops.cpu_kernel import Kernel, claim, integer
from toppings.ops.cpu_stream import TASK_COLUMNS
from toppings.ops.cpu_tiles import LANES, STEP, add_products, data_of, see, total_of
from toppings.ops.quantized import GROUP

Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]

_TILE_ROWS = 4
_BYTES = 64  # of codes, that a register holds
_BLOCK_GROUPS = 4  # int4 groups whose codes these are
_HALF, _EIGHTH = GROUP // 2, GROUP // 4  # elements of a group; of it in a quarter of a register
_LINE, _AHEAD = 64, 4096  # bytes: of a cache line, and how far on codes are asked for

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_FLAGS = ("reassoc", "contract")
_CODES, _PAIRS, _SUMS = ir.VectorType(_I8, _BYTES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_INTEGERS = [int(bits) >> 16 for bits in np.arange(16, dtype=np.float32).view(np.uint32)]  # as bfloat16
_LOWER = [place for lane in range(0, _BYTES, 16) for i in range(8) for place in (lane + i, _BYTES + lane + i)]
_UPPER = [place + 8 for place in _LOWER]


def _some(builder: Any, address: Any, kind: Any, count: Any) -> Any:
    """The first `count` elements at `address` as a vector of `kind`, and zeros; None: all of it."""
    if count is None:
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
    indices = ir.Constant(ir.VectorType(_I32, kind.count), list(range(kind.count)))
    mask = builder.icmp_signed("<", indices, _spread(builder, builder.trunc(count, _I32), kind.count))
    name = f"llvm.masked.load.v{kind.count}i{kind.element.width}.p0"
    signature = ir.FunctionType(kind, [kind.as_pointer(), _I32, mask.type, kind])
    load_some = cgutils.get_or_insert_function(builder.module, signature, name)
    zeros = ir.Constant(kind, [0] * kind.count)
    return builder.call(load_some, [builder.bitcast(address, kind.as_pointer()), _I32(1), mask, zeros])


def _spread(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _mix(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _look_up(builder: Any, table: list[int], codes: Any) -> Any:
    """Of 16 bytes, those that `codes` name."""
    signature = ir.FunctionType(_CODES, [_CODES, _CODES])
    name = "llvm.x86.avx512.pshuf.b.512"
    instruction = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(instruction, [ir.Constant(_CODES, table * (_BYTES // 16)), codes])


def _int4_pairs(builder: Any, codes: Any) -> list[Any]:
    """Four registers of bfloat16: quarter q of the i-th has the elements 8 i on of the q-th group."""
    lower = builder.and_(codes, ir.Constant(_CODES, [15] * _BYTES))
    upper = builder.lshr(codes, ir.Constant(_CODES, [4] * _BYTES))
    pairs = []
    for half in (lower, upper):
        low, high = (_look_up(builder, [bits >> shift & 255 for bits in _INTEGERS], half) for shift in (0, 8))
        pairs += [builder.bitcast(_mix(builder, low, high, places), _PAIRS) for places in (_LOWER, _UPPER)]
    return pairs


def _int8_pairs(builder: Any, codes: Any) -> list[Any]:
    """Two registers of bfloat16, the elements in their order."""
    signature = ir.FunctionType(ir.VectorType(_I16, STEP), [_SUMS, _SUMS])
    name, pairs = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", []
    narrow = cgutils.get_or_insert_function(builder.module, signature, name)
    for start in range(0, _BYTES, STEP):
        first, second = (
            builder.sitofp(_mix(builder, codes, codes, list(range(at, at + LANES))), _SUMS)
            for at in (start, start + LANES)
        )
        pairs.append(builder.bitcast(builder.call(narrow, [second, first]), _PAIRS))
    return pairs


def _widened(builder: Any, bits: Any) -> Any:
    """A vector of bfloat16 as fp32."""
    wide = builder.zext(bits, ir.VectorType(_I32, bits.type.count))
    shifted = builder.shl(wide, ir.Constant(wide.type, [16] * bits.type.count))
    return builder.bitcast(shifted, ir.VectorType(_F32, bits.type.count))


_FOUR = ir.VectorType(_I16, _BLOCK_GROUPS)
_QUARTERS = [quarter for quarter in range(_BLOCK_GROUPS) for _ in range(LANES // _BLOCK_GROUPS)]


def _tile(num_rows: int, bits: int) -> Any:
    """tile(out, x, at, stride, codes, start, n, scales, offsets, first): out[i] = Σ_k x[i, k] · code[k] of
    the n bytes from `start` on, for rows of x from `at` on, `stride` apart. For 4 bits, the sum over groups
    of that times the group's scale, plus x[i]'s sum over the group times its offset; these from `first` on in
    `scales` and `offsets`, and x is as `_read_groups` lays it out."""
    num_vectors = 4 if bits == 4 else 2

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any, out: Any, x: Any, at: Any, stride: Any, codes: Any, start: Any, n: Any,
        scales: Any, offsets: Any, first: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, x, x_start, stride, codes, start, n, scales, offsets, first = args
            word = n.type
            out, x = (data_of(context, builder, signature.args[i], args[i]) for i in (0, 1))
            first_code = builder.gep(codes, [start])
            sums = [
                cgutils.alloca_once_value(builder, ir.Constant(_SUMS, [0.0] * LANES)) for _ in range(num_rows)
            ]
            width = num_vectors * STEP + (2 * _BLOCK_GROUPS if bits == 4 else 0)

            def add_block(index: Any, rest: Any) -> None:
                """`rest`: the bytes that there are, None for all."""
                at = builder.mul(index, word(_BYTES))
                loaded = _some(builder, builder.gep(first_code, [at]), _CODES, rest)
                pairs = (_int4_pairs if bits == 4 else _int8_pairs)(builder, loaded)
                if bits == 4:
                    group = builder.add(first, builder.mul(index, word(_BLOCK_GROUPS)))
                    num_groups = rest and builder.udiv(rest, word(_HALF))
                    scale, offset = (
                        _widened(builder, _some(builder, builder.gep(each, [group]), _FOUR, num_groups))
                        for each in (scales, offsets)
                    )
                    scale = _mix(builder, scale, scale, _QUARTERS)
                for i, total in enumerate(sums):
                    row = builder.add(x_start, builder.mul(stride, word(i)))
                    place = builder.add(row, builder.mul(index, word(width)))
                    values = see(builder, x, place, _PAIRS)
                    part = ir.Constant(_SUMS, [0.0] * LANES) if bits == 4 else builder.load(total)
                    for j, pair in enumerate(pairs):
                        value = builder.load(builder.gep(values, [_I32(j)]), align=2)
                        part = add_products(builder, part, pair, value)
                    if bits == 4:
                        four = see(builder, x, builder.add(place, word(num_vectors * STEP)), offset.type)
                        shifts = builder.fmul(builder.load(four, align=2), offset)
                        zeros = ir.Constant(offset.type, [0.0] * _BLOCK_GROUPS)
                        shifts = _mix(builder, shifts, zeros, [*range(4), *[4] * (LANES - 4)])
                        part = builder.fadd(builder.fmul(part, scale, flags=_FLAGS), shifts, flags=_FLAGS)
                        part = builder.fadd(builder.load(total), part, flags=_FLAGS)
                    builder.store(part, total)

            num_blocks, rest = builder.udiv(n, word(_BYTES)), builder.urem(n, word(_BYTES))
            with cgutils.for_range(builder, num_blocks) as loop:
                add_block(loop.index, None)
            with builder.if_then(cgutils.is_not_null(builder, rest)):
                add_block(num_blocks, rest)
            for i, total in enumerate(sums):
                builder.store(total_of(builder, builder.load(total)), builder.gep(out, [_I32(i)]))
            return context.get_dummy_value()

        word = types.int64
        return types.void(out, x, word, word, codes, word, word, scales, offsets, word), codegen

    return tile


_int8_1, _int8_2, _int8_3, _int8_4 = (_tile(rows, 8) for rows in (1, 2, 3, 4))
_int4_1, _int4_2, _int4_3, _int4_4 = (_tile(rows, 4) for rows in (1, 2, 3, 4))


@helper
def _ask_for(codes: Pointer, start: int, n: int) -> None:
    for k in range(start + _AHEAD, start + _AHEAD + n, _LINE):
        prefetch(codes, k)


@Kernel
def int8_linear(block: Any) -> None:
    """As `cpu_quantized.int8_linear`, for few rows of bfloat16."""
    y = (elements(block, 0), floats(block, 0), integer(block, 10) != 0)
    x, codes, scales = elements(block, 1), int8s(block, 2), floats(block, 3)
    bias, has_bias = elements(block, 5), integer(block, 5) != 0
    num_rows, num_out, num_in = integer(block, 6), integer(block, 7), integer(block, 8)
    stride = (num_in + _BYTES - 1) // _BYTES * _BYTES
    xs, out = np.zeros(num_rows * stride, np.uint16), np.empty(_TILE_ROWS, np.float32)
    task = claim(block)
    if task >= 0:
        for i in range(num_rows):
            for k in range(num_in):
                copy(xs, i * stride + k, x, i * num_in + k)
    while task >= 0:
        for j in range(task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out)):
            start, scale = j * num_in, load(scales, j)
            _ask_for(codes, start, num_in)
            for row in range(0, num_rows, _TILE_ROWS):
                count, at = min(_TILE_ROWS, num_rows - row), row * stride
                if count == 4:
                    _int8_4(out, xs, at, stride, codes, start, num_in, scales, scales, j)
                elif count == 3:
                    _int8_3(out, xs, at, stride, codes, start, num_in, scales, scales, j)
                elif count == 2:
                    _int8_2(out, xs, at, stride, codes, start, num_in, scales, scales, j)
                else:
                    _int8_1(out, xs, at, stride, codes, start, num_in, scales, scales, j)
                for i in range(count):
                    put(y, (row + i) * num_out + j, load(out, i) * scale, bias, has_bias, j)
        task = claim(block)


@helper
def _read_groups(
    xs: Halves, to: int, x: Pointer, start: int, num_in: int, num_blocks: int, width: int
) -> None:
    """A row for int4: for each block of four groups the elements in the order of `_int4_pairs`, and the four
    sums over groups, fp32."""
    for b in range(num_blocks):
        sums = xs[to + b * width + _BLOCK_GROUPS * GROUP : to + (b + 1) * width].view(np.float32)
        for q in range(_BLOCK_GROUPS):
            first = (b * _BLOCK_GROUPS + q) * GROUP
            total = np.float32(0)
            for k in range(min(GROUP, num_in - first)):
                place = k // _EIGHTH * STEP + q * _EIGHTH + k % _EIGHTH
                copy(xs, to + b * width + place, x, start + first + k)
                total += load(x, start + first + k)
            sums[q] = total


@Kernel
def int4_linear(block: Any) -> None:
    """As `cpu_quantized.int4_linear`, for few rows of bfloat16."""
    y = (elements(block, 0), floats(block, 0), integer(block, 10) != 0)
    x, codes, scales, offsets = elements(block, 1), nibbles(block, 2), bf16s(block, 3), bf16s(block, 4)
    bias, has_bias = elements(block, 5), integer(block, 5) != 0
    num_rows, num_out, num_in = integer(block, 6), integer(block, 7), integer(block, 8)
    num_groups = integer(block, 9)
    num_bytes, num_blocks = num_groups * _HALF, (num_groups + _BLOCK_GROUPS - 1) // _BLOCK_GROUPS
    width = _BLOCK_GROUPS * GROUP + 2 * _BLOCK_GROUPS
    stride = num_blocks * width
    xs, out = np.zeros(num_rows * stride, np.uint16), np.empty(_TILE_ROWS, np.float32)
    task = claim(block)
    if task >= 0:
        for i in range(num_rows):
            _read_groups(xs, i * stride, x, i * num_in, num_in, num_blocks, width)
    while task >= 0:
        for j in range(task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out)):
            start, first = j * num_bytes, j * num_groups
            _ask_for(codes, start, num_bytes)
            for row in range(0, num_rows, _TILE_ROWS):
                count, at = min(_TILE_ROWS, num_rows - row), row * stride
                if count == 4:
                    _int4_4(out, xs, at, stride, codes, start, num_bytes, scales, offsets, first)
                elif count == 3:
                    _int4_3(out, xs, at, stride, codes, start, num_bytes, scales, offsets, first)
                elif count == 2:
                    _int4_2(out, xs, at, stride, codes, start, num_bytes, scales, offsets, first)
                else:
                    _int4_1(out, xs, at, stride, codes, start, num_bytes, scales, offsets, first)
                for i in range(count):
                    put(y, (row + i) * num_out + j, load(out, i), bias, has_bias, j)
        task = claim(block)
