"""Tiles of products of bfloat16 rows with codes of 8 or 4 bits, written as LLVM instructions as those of
`cpu_tiles.py` are (`quantized.py` has the codes' layout).

Codes are small integers, which bfloat16 holds exactly: they are widened to it in registers, once for all rows
of the tile. Rows of the weight lie side by side in it: they share what is read of x, and no sum waits for
another. Scales and offsets come on top: of a row of the weight for 8 bits, of each group for 4, where a
register's four quarters are four groups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic

from toppings.ops.cpu_bits import helper
from toppings.ops.cpu_tiles import LANES, STEP, add_products, ask_for, data_of, see, total_of
from toppings.ops.quantized import GROUP

BYTES = 64
"""Of codes, that a register holds: a block."""
BLOCK_GROUPS = 4
"""int4 groups in a block."""
BLOCK = BLOCK_GROUPS * GROUP
"""Elements of those."""
HALF, EIGHTH = GROUP // 2, GROUP // 4
"""Bytes of an int4 group; elements of it in a quarter of a register."""
_AHEAD = 8192
"""Bytes: how far on codes are asked for."""

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_FLAGS = ("reassoc", "contract")
_CODES, _PAIRS, _SUMS = ir.VectorType(_I8, BYTES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_INTEGERS = [int(bits) >> 16 for bits in np.arange(16, dtype=np.float32).view(np.uint32)]  # as bfloat16


def _first(builder: Any, count: Any, lanes: int) -> Any:
    """A mask of the first `count` of `lanes`."""
    indices = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", indices, _spread(builder, builder.trunc(count, _I32), lanes))


def _some(builder: Any, address: Any, kind: Any, mask: Any) -> Any:
    """The elements at `address` that `mask` names as a vector of `kind`, and zeros; None: all of it."""
    if mask is None:
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
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


def _look_up(builder: Any, table: list[int], words: Any) -> Any:
    """bfloat16, of a table of 16 those that the lowest four bits of each word name. (The instruction takes
    five bits, for 32 entries: here both halves are the same.)"""
    signature = ir.FunctionType(words.type, [words.type, words.type])
    name = "llvm.x86.avx512.permvar.hi.512"
    instruction = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.bitcast(builder.call(instruction, [ir.Constant(words.type, table * 2), words]), _PAIRS)


def _int4_pairs(builder: Any, codes: Any) -> list[Any]:
    """Four registers of bfloat16, of which the i-th has the i-th four bits of each word; `int4_place` says
    which elements these are."""
    words = builder.bitcast(codes, ir.VectorType(_I16, STEP))
    shifts = (ir.Constant(words.type, [4 * i] * STEP) for i in range(4))
    return [_look_up(builder, _INTEGERS, builder.lshr(words, shift)) for shift in shifts]


@helper
def int4_place(k: int) -> int:
    """Where element k of a block's first group is in the four registers; the next group's is EIGHTH further
    on."""
    return (k % 2 * 2 + k // HALF) * STEP + k % HALF // 2


def _int8_bytes() -> tuple[list[int], list[int]]:
    """The lower and upper bytes of 0 to 127 as bfloat16; in the place of 0, of 128."""
    sizes = np.arange(2 * BYTES, dtype=np.float32)
    sizes[0] = 2 * BYTES
    bits = [int(each) >> 16 for each in sizes.view(np.uint32)]
    return [each & 255 for each in bits], [each >> 8 for each in bits]


_LOWER, _UPPER = _int8_bytes()


def _look_up_bytes(builder: Any, table: list[int], sizes: Any) -> Any:
    """Of a table of 128 bytes those that the lowest seven bits of each byte name."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    instruction = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_CODES, [_CODES] * 3), name)
    first, second = (ir.Constant(_CODES, half) for half in (table[:BYTES], table[BYTES:]))
    return builder.call(instruction, [first, sizes, second])


def _with_signs(builder: Any, values: Any, codes: Any) -> Any:
    """values | codes & 128, byte by byte, in one instruction."""
    kind = ir.FunctionType(_PAIRS, [_PAIRS, _PAIRS, _PAIRS, _I32])
    name = "llvm.x86.avx512.pternlog.d.512"
    instruction = cgutils.get_or_insert_function(builder.module, kind, name)
    signs = ir.Constant(_CODES, [128] * BYTES)
    words = [builder.bitcast(each, _PAIRS) for each in (values, codes, signs)]
    return builder.bitcast(builder.call(instruction, [*words, _I32(0xF8)]), _CODES)


def _int8_pairs(builder: Any, codes: Any) -> list[Any]:
    """Two registers of bfloat16; `int8_place` says which elements these are. Both bytes are looked up by the
    code's size: 128 is where 0 would be, since its size has the same lowest bits."""
    kind = ir.FunctionType(_CODES, [_CODES, ir.IntType(1)])
    absolute = cgutils.get_or_insert_function(builder.module, kind, f"llvm.abs.v{BYTES}i8")
    sizes, zeros = builder.call(absolute, [codes, ir.IntType(1)(0)]), ir.Constant(_CODES, [0] * BYTES)
    lower, upper = (_look_up_bytes(builder, table, sizes) for table in (_LOWER, _UPPER))
    is_not_zero = builder.icmp_unsigned("!=", codes, zeros)
    upper = _with_signs(builder, builder.select(is_not_zero, upper, zeros), codes)
    return [builder.bitcast(_mix(builder, lower, upper, places), _PAIRS) for places in (_FIRST, _SECOND)]


def _interleaved(start: int) -> list[int]:
    """Of each quarter of two registers eight bytes from `start` on, in turn of the one and the other."""
    places = [quarter + start + k for quarter in range(0, BYTES, LANES) for k in range(LANES // 2)]
    return [place + which for place in places for which in (0, BYTES)]


_FIRST, _SECOND = _interleaved(0), _interleaved(LANES // 2)


@helper
def int8_place(k: int) -> int:
    """Where element k of a block is in the two registers."""
    half = LANES // 2
    return k % LANES // half * STEP + k // LANES * half + k % half


def _scales(builder: Any, pointer: Any, index: Any, mask: Any) -> Any:
    """Of bf16 or fp32, from `index` on, those that `mask` names as fp32, and zeros."""
    place, lanes = builder.gep(pointer, [index]), mask.type.count
    if place.type.pointee == _F32:
        loaded = _some(builder, place, ir.VectorType(_I32, lanes), mask)
    else:
        narrow = _some(builder, place, ir.VectorType(_I16, lanes), mask)
        loaded = builder.zext(narrow, ir.VectorType(_I32, lanes))
        loaded = builder.shl(loaded, ir.Constant(loaded.type, [16] * lanes))
    return builder.bitcast(loaded, ir.VectorType(_F32, lanes))


def _at_lanes(builder: Any, values: Any, lanes: Any) -> Any:
    """Of a register, in each lane the value of the lane that `lanes` names."""
    signature = ir.FunctionType(_SUMS, [_SUMS, lanes.type])
    name = "llvm.x86.avx512.permvar.sf.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [values, lanes])


_QUARTERS = [quarter for quarter in range(BLOCK_GROUPS) for _ in range(LANES // BLOCK_GROUPS)]
_FILLED = [*range(BLOCK_GROUPS), *[0] * (LANES - BLOCK_GROUPS)]


class _Tile:
    """What a tile's code is made of. `args` as `code_tile` names them."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, shape: tuple[int, int]) -> None:
        (
            out,
            x,
            x_start,
            stride,
            codes,
            start,
            self.n,
            last,
            self.scales,
            offsets,
            first,
            num_scales,
            shift,
        ) = args
        num_rows, num_columns = shape
        self.builder, self.word = builder, self.n.type
        self.out, x = (data_of(context, builder, signature.args[i], each) for i, each in ((0, out), (1, x)))
        self.offsets, self.num_scales, self.shift = offsets, num_scales, shift
        self.rows = [
            builder.gep(x, [builder.add(x_start, builder.mul(stride, self.word(i)))]) for i in range(num_rows)
        ]
        columns = [self._at_most(last, j) for j in range(num_columns)]
        self.columns = [builder.gep(codes, [builder.add(start, builder.mul(self.n, j))]) for j in columns]
        self.firsts = [builder.add(first, builder.mul(num_scales, j)) for j in columns]
        zeros = ir.Constant(_SUMS, [0.0] * LANES)
        self.sums = [
            [cgutils.alloca_once_value(builder, zeros) for _ in range(num_columns)] for _ in range(num_rows)
        ]

    def _at_most(self, last: Any, j: int) -> Any:
        is_there = self.builder.icmp_signed("<", self.word(j), last)
        return self.builder.select(is_there, self.word(j), last)

    def add(self, i: int, j: int, value: Any) -> None:
        total = self.builder.load(self.sums[i][j])
        self.builder.store(self.builder.fadd(total, value, flags=_FLAGS), self.sums[i][j])

    def of_x(self, i: int, index: Any, kind: Any) -> Any:
        return self.builder.load(see(self.builder, self.rows[i], index, kind), align=2)

    def block_of_x(self, i: int, index: Any, count: int) -> list[Any]:
        """The block `index` of x[i], `count` registers of pairs."""
        first = self.builder.mul(index, self.word(count * STEP))
        return [self.of_x(i, self.builder.add(first, self.word(k * STEP)), _PAIRS) for k in range(count)]

    def each_block(self, add_block: Callable[[Any, Any], None]) -> None:
        """`add_block(index, rest)`; rest: the bytes that there are, None for all."""
        builder, size = self.builder, self.word(BYTES)
        num_blocks, rest = builder.udiv(self.n, size), builder.urem(self.n, size)
        with cgutils.for_range(builder, num_blocks) as loop:
            add_block(loop.index, None)
        with builder.if_then(cgutils.is_not_null(builder, rest)):
            add_block(num_blocks, rest)

    def codes_of(self, j: int, index: Any, rest: Any) -> Any:
        place = self.builder.gep(self.columns[j], [self.builder.mul(index, self.word(BYTES))])
        ask_for(self.builder, self.builder.gep(place, [self.word(_AHEAD)]))
        return _some(self.builder, place, _CODES, None if rest is None else _first(self.builder, rest, BYTES))

    def finish(self, factors: Sequence[Any] | None = None) -> None:
        builder = self.builder
        for i, slots in enumerate(self.sums):
            for j, slot in enumerate(slots):
                total = total_of(builder, builder.load(slot))
                total = total if factors is None else builder.fmul(total, factors[j])
                builder.store(total, builder.gep(self.out, [_I32(i * len(slots) + j)]))


def _products(builder: Any, values: Sequence[Any], pairs: Sequence[Any], total: Any) -> Any:
    for value, pair in zip(values, pairs, strict=True):
        total = add_products(builder, total, pair, value)
    return total


def _int8_tile(tile: _Tile) -> None:
    builder = tile.builder

    def add_block(index: Any, rest: Any) -> None:
        columns = [_int8_pairs(builder, tile.codes_of(j, index, rest)) for j in range(len(tile.columns))]
        for i, slots in enumerate(tile.sums):
            values = tile.block_of_x(i, index, 2)
            for slot, pairs in zip(slots, columns, strict=True):
                builder.store(_products(builder, values, pairs, builder.load(slot)), slot)

    tile.each_block(add_block)
    tile.finish([builder.load(builder.gep(tile.scales, [first])) for first in tile.firsts])


def _int4_tile(tile: _Tile) -> None:
    builder, word = tile.builder, tile.word
    shift = _spread(builder, builder.trunc(tile.shift, _I32), LANES)
    lanes = builder.lshr(ir.Constant(shift.type, _QUARTERS), shift)

    def mask_of(num_groups: Any) -> Any:
        """Of the scales of so many groups of a block."""
        last = builder.lshr(builder.sub(num_groups, word(1)), tile.shift)
        return _first(builder, builder.add(last, word(1)), BLOCK_GROUPS)

    all_scales, nothing = mask_of(word(BLOCK_GROUPS)), ir.Constant(_SUMS, [0.0] * LANES)

    def add_block(index: Any, rest: Any) -> None:
        mask = all_scales if rest is None else mask_of(builder.udiv(rest, word(HALF)))
        group = builder.lshr(builder.mul(index, word(BLOCK_GROUPS)), tile.shift)
        for j, first in enumerate(tile.firsts):
            pairs = _int4_pairs(builder, tile.codes_of(j, index, rest))
            scale = _scales(builder, tile.scales, builder.add(first, group), mask)
            scale = _at_lanes(builder, _mix(builder, scale, scale, _FILLED), lanes)
            for i in range(len(tile.rows)):
                part = _products(builder, tile.block_of_x(i, index, 4), pairs, nothing)
                tile.add(i, j, builder.fmul(part, scale, flags=_FLAGS))

    tile.each_block(add_block)
    num_groups = builder.udiv(tile.n, word(HALF))
    num_blocks = builder.udiv(builder.add(num_groups, word(BLOCK_GROUPS - 1)), word(BLOCK_GROUPS))
    first_sum = builder.mul(num_blocks, word(BLOCK))
    count = builder.udiv(builder.add(tile.num_scales, word(LANES - 1)), word(LANES))
    with cgutils.for_range(builder, count) as loop:
        at = builder.mul(loop.index, word(LANES))
        mask = _first(builder, builder.sub(tile.num_scales, at), LANES)
        place = builder.add(first_sum, builder.mul(at, word(2)))  # in elements of two bytes
        for j, first in enumerate(tile.firsts):
            offsets = _scales(builder, tile.offsets, builder.add(first, at), mask)
            for i in range(len(tile.rows)):
                tile.add(i, j, builder.fmul(tile.of_x(i, place, _SUMS), offsets, flags=_FLAGS))
    tile.finish()


def code_tile(num_rows: int, num_columns: int) -> Any:
    """tile(out, x, at, stride, codes, start, n, last, scales, offsets, first, num_scales, shift): out[i, j] =
    Σ_k x[i, k] · w[j, k] for rows of x from `at` on, `stride` apart, and rows of the weight whose codes begin
    at `start`, n bytes each; of how many bits, the type of `codes` says. Beyond the row `last` that one is
    repeated. Scales and offsets begin at `first`, `num_scales` for each row: for 8 bits one scale; for 4 bits
    one of each for 2^shift groups. x is laid out as `int8_place` says, or as `_read_groups` does."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any, out: Any, x: Any, at: Any, stride: Any, codes: Any, start: Any, n: Any,
        last: Any, scales: Any, offsets: Any, first: Any, num_scales: Any, shift: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            parts = _Tile(context, builder, signature, args, (num_rows, num_columns))
            (_int8_tile if codes.dtype == types.int8 else _int4_tile)(parts)
            return context.get_dummy_value()

        word = types.int64
        counts = (word, word, word)
        return types.void(out, x, word, word, codes, *counts, scales, offsets, *counts), codegen

    return tile
