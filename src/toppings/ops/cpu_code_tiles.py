"""Tiles of products of bfloat16 rows with codes of 8 or 4 bits, written as LLVM instructions as those of
`cpu_tiles.py` are (`quantized.py` has the codes' layout).

Codes are small integers, which bfloat16 holds exactly: they are widened to it in registers, once for all rows
of the tile. Scales and offsets come on top: of a row of the weight for 8 bits, of each group for 4, where a
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
from toppings.ops.cpu_tiles import LANES, STEP, add_products, data_of, see, total_of
from toppings.ops.quantized import GROUP

BYTES = 64
"""Of codes, that a register holds: a block."""
BLOCK_GROUPS = 4
"""int4 groups in a block."""
BLOCK = BLOCK_GROUPS * GROUP
"""Elements of those."""
HALF, EIGHTH = GROUP // 2, GROUP // 4
"""Bytes of an int4 group; elements of it in a quarter of a register."""

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


def _int8_pairs(builder: Any, codes: Any) -> list[Any]:
    """Two registers of bfloat16, the elements in their order."""
    signature = ir.FunctionType(ir.VectorType(_I16, STEP), [_SUMS, _SUMS])
    name, pairs = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", []
    narrow = cgutils.get_or_insert_function(builder.module, signature, name)
    for start in range(0, BYTES, STEP):
        first, second = (
            builder.sitofp(_mix(builder, codes, codes, list(range(at, at + LANES))), _SUMS)
            for at in (start, start + LANES)
        )
        pairs.append(builder.bitcast(builder.call(narrow, [second, first]), _PAIRS))
    return pairs


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

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, num_rows: int) -> None:
        out, x, x_start, stride, codes, start, self.n, self.scales, self.offsets, self.first, shift = args
        self.builder, self.word = builder, self.n.type
        self.out, x = (data_of(context, builder, signature.args[i], each) for i, each in ((0, out), (1, x)))
        self.codes, self.shift = builder.gep(codes, [start]), shift
        self.rows = [
            builder.gep(x, [builder.add(x_start, builder.mul(stride, self.word(i)))]) for i in range(num_rows)
        ]
        zeros = ir.Constant(_SUMS, [0.0] * LANES)
        self.sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(num_rows)]

    def add(self, i: int, value: Any) -> None:
        total = self.builder.load(self.sums[i])
        self.builder.store(self.builder.fadd(total, value, flags=_FLAGS), self.sums[i])

    def of_x(self, i: int, index: Any, kind: Any) -> Any:
        return self.builder.load(see(self.builder, self.rows[i], index, kind), align=2)

    def products(self, i: int, index: Any, pairs: Sequence[Any], total: Any) -> Any:
        """`total` + x[i]'s elements from the block `index` on times the codes in `pairs`."""
        for j, pair in enumerate(pairs):
            place = self.builder.add(
                self.builder.mul(index, self.word(len(pairs) * STEP)), self.word(j * STEP)
            )
            total = add_products(self.builder, total, pair, self.of_x(i, place, _PAIRS))
        return total

    def each_block(self, add_block: Callable[[Any, Any], None]) -> None:
        """`add_block(index, rest)`; rest: the bytes that there are, None for all."""
        builder, size = self.builder, self.word(BYTES)
        num_blocks, rest = builder.udiv(self.n, size), builder.urem(self.n, size)
        with cgutils.for_range(builder, num_blocks) as loop:
            add_block(loop.index, None)
        with builder.if_then(cgutils.is_not_null(builder, rest)):
            add_block(num_blocks, rest)

    def codes_of(self, index: Any, rest: Any) -> Any:
        place = self.builder.gep(self.codes, [self.builder.mul(index, self.word(BYTES))])
        return _some(self.builder, place, _CODES, None if rest is None else _first(self.builder, rest, BYTES))

    def finish(self, factor: Any = None) -> None:
        for i, slot in enumerate(self.sums):
            total = total_of(self.builder, self.builder.load(slot))
            total = total if factor is None else self.builder.fmul(total, factor)
            self.builder.store(total, self.builder.gep(self.out, [_I32(i)]))


def _int8_tile(tile: _Tile) -> None:
    builder = tile.builder

    def add_block(index: Any, rest: Any) -> None:
        pairs = _int8_pairs(builder, tile.codes_of(index, rest))
        for i, slot in enumerate(tile.sums):
            builder.store(tile.products(i, index, pairs, builder.load(slot)), slot)

    tile.each_block(add_block)
    tile.finish(builder.load(builder.gep(tile.scales, [tile.first])))


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
        pairs = _int4_pairs(builder, tile.codes_of(index, rest))
        mask = all_scales if rest is None else mask_of(builder.udiv(rest, word(HALF)))
        group = builder.lshr(builder.mul(index, word(BLOCK_GROUPS)), tile.shift)
        scale = _scales(builder, tile.scales, builder.add(tile.first, group), mask)
        scale = _at_lanes(builder, _mix(builder, scale, scale, _FILLED), lanes)
        for i in range(len(tile.rows)):
            part = tile.products(i, index, pairs, nothing)
            tile.add(i, builder.fmul(part, scale, flags=_FLAGS))

    tile.each_block(add_block)
    num_groups = builder.udiv(tile.n, word(HALF))
    num_blocks = builder.udiv(builder.add(num_groups, word(BLOCK_GROUPS - 1)), word(BLOCK_GROUPS))
    num_scales, first_sum = builder.lshr(num_groups, tile.shift), builder.mul(num_blocks, word(BLOCK))
    count = builder.udiv(builder.add(num_scales, word(LANES - 1)), word(LANES))
    with cgutils.for_range(builder, count) as loop:
        at = builder.mul(loop.index, word(LANES))
        mask = _first(builder, builder.sub(num_scales, at), LANES)
        offsets = _scales(builder, tile.offsets, builder.add(tile.first, at), mask)
        place = builder.add(first_sum, builder.mul(at, word(2)))  # in elements of two bytes
        for i in range(len(tile.rows)):
            tile.add(i, builder.fmul(tile.of_x(i, place, _SUMS), offsets, flags=_FLAGS))
    tile.finish()


def code_tile(num_rows: int) -> Any:
    """tile(out, x, at, stride, codes, start, n, scales, offsets, first, shift): out[i] = Σ_k x[i, k] · w[k]
    for rows of x from `at` on, `stride` apart, and the weight whose n bytes of codes begin at `start`; of how
    many bits, the type of `codes` says. Scales and offsets begin at `first`: for 8 bits one scale; for 4 bits
    one of each for 2^shift groups, and x is as `_read_groups` lays it out."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any, out: Any, x: Any, at: Any, stride: Any, codes: Any, start: Any, n: Any,
        scales: Any, offsets: Any, first: Any, shift: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            parts = _Tile(context, builder, signature, args, num_rows)
            (_int8_tile if codes.dtype == types.int8 else _int4_tile)(parts)
            return context.get_dummy_value()

        word = types.int64
        return types.void(out, x, word, word, codes, word, word, scales, offsets, word, word), codegen

    return tile
