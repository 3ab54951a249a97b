"""Products of bfloat16 tiles for numba kernels, on the CPU's instruction for them (AVX-512 BF16).

`vdpbf16ps` multiplies 32 pairs of bfloat16 and adds neighbouring pairs to 16 sums in float32. A compiler does
not find it in plain loops, so the tiles are written as LLVM instructions. Sums lie in registers while a tile
runs; every sum is over the same terms in the same order however many rows the tile has, so that a row's
result does not depend on the rows beside it. Starts and strides are in elements.
"""

from functools import cache
from typing import Any

from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic

LANES = 16
"""Sums in a register."""
STEP = 2 * LANES
"""Elements in a register: widths that tiles take are multiples of it."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _PAIRS, _ELEMENTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_I16, STEP)
_MASK = ir.VectorType(_I32, STEP)
_ZEROS = ir.Constant(_SUMS, [0.0] * LANES)


@cache
def is_supported() -> bool:
    """Kernels are compiled for a CPU that has the instruction: this one, or the lesser one that
    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name."""
    return _compiled_for("avx512bf16", "avx512bw")


@cache
def has_byte_tables() -> bool:
    """Kernels are compiled for a CPU that looks bytes up in tables of 128 (AVX-512 VBMI)."""
    return _compiled_for("avx512vbmi")


@cache
def has_matrix_unit() -> bool:
    """This CPU has AMX, which torch's products use: they overtake the tiles where there are many rows."""
    return _compiled_for("amx-bf16")


def _compiled_for(*names: str) -> bool:
    from numba.core.registry import cpu_target

    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{name}" for name in names} <= set(features.split(","))


def add_products(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    kind = ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    instruction = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(instruction, [sums, builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)])


def total_of(builder: Any, sums: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32, _SUMS])
    add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(add, [_F32(0), sums], fastmath=("reassoc",))


def _repeat(builder: Any, pair: Any) -> Any:
    one = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, [0] * LANES))


def _read(builder: Any, address: Any, index: Any) -> Any:
    value = builder.load(builder.gep(address, [index], inbounds=True))
    value.align = 2
    return value


def see(builder: Any, pointer: Any, start: Any, kind: Any) -> Any:
    """`pointer[start]` and what follows as elements of `kind`."""
    return builder.bitcast(builder.gep(pointer, [start], inbounds=True), kind.as_pointer())


def ask_for(builder: Any, address: Any) -> None:
    """To the second-level cache: the first is too small for what another tile will read."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    is_write, locality, is_data = _I32(0), _I32(2), _I32(1)
    builder.call(instruction, [builder.bitcast(address, byte), is_write, locality, is_data])


def data_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


class _Sums:
    """Registers of sums, [rows][columns], that start at zero."""

    def __init__(self, builder: Any, num_rows: int, num_columns: int) -> None:
        self._builder, self._num_columns = builder, num_columns
        self._slots = [cgutils.alloca_once(builder, _SUMS) for _ in range(num_rows * num_columns)]
        for slot in self._slots:
            builder.store(_ZEROS, slot)

    def add(self, row: int, column: int, a: Any, b: Any) -> None:
        slot = self._slots[row * self._num_columns + column]
        self._builder.store(add_products(self._builder, self._builder.load(slot), a, b), slot)

    def load_from(self, address: Any) -> None:
        self._each(address, lambda slot, place: self._builder.store(self._unaligned(place), slot))

    def store_to(self, address: Any) -> None:
        def put(slot: Any, place: Any) -> None:
            self._builder.store(self._builder.load(slot), place).align = 4

        self._each(address, put)

    def totals_to(self, address: Any) -> None:
        """Each register's own sum, as floats side by side."""
        for i, slot in enumerate(self._slots):
            total = total_of(self._builder, self._builder.load(slot))
            self._builder.store(total, self._builder.gep(address, [_I64(i)]))

    def _unaligned(self, place: Any) -> Any:
        value = self._builder.load(place)
        value.align = 4
        return value

    def _each(self, address: Any, action: Any) -> None:
        first = self._builder.bitcast(address, _SUMS.as_pointer())
        for i, slot in enumerate(self._slots):
            action(slot, self._builder.gep(first, [_I64(i)]))


def dot_tile(num_rows: int, num_columns: int) -> Any:
    """tile(out, x, x_starts, a, a_starts, n): out[i, j] = Σ_k x[x_starts[i] + k] · a[a_starts[j] + k] over
    n elements, a multiple of STEP."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing_context: Any, out: Any, x: Any, x_starts: Any, a: Any, a_starts: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            out, x, x_starts, a, a_starts, n = args

            def vectors(pointer: Any, kind: Any, starts: Any, count: int) -> list[Any]:
                first = data_of(context, builder, kind, starts)
                offsets = [builder.load(builder.gep(first, [_I64(i)])) for i in range(count)]
                return [see(builder, pointer, offset, _ELEMENTS) for offset in offsets]

            xs, columns = (
                vectors(x, kinds[2], x_starts, num_rows),
                vectors(a, kinds[4], a_starts, num_columns),
            )
            sums = _Sums(builder, num_rows, num_columns)
            with cgutils.for_range(builder, builder.udiv(n, ir.Constant(n.type, STEP))) as loop:
                values = [_read(builder, column, loop.index) for column in columns]
                for i, row in enumerate(xs):
                    part = _read(builder, row, loop.index)
                    for j, value in enumerate(values):
                        sums.add(i, j, value, part)
            sums.totals_to(data_of(context, builder, kinds[0], out))
            return context.get_dummy_value()

        return types.void(out, x, x_starts, a, a_starts, n), codegen

    return tile


_LOW = [i for k in range(LANES) for i in (k, STEP + k)]
_HIGH = [i + LANES for i in _LOW]


def outer_tile(num_rows: int, num_vectors: int) -> Any:
    """tile(out, h, h_start, h_stride, b, b_start, b_stride, n): out[i, c] = Σ_r h[i, r] · b[r, c] for
    LANES · `num_vectors` (an even number) columns. h's rows hold n elements, and a zero after them where n
    is odd."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any,
        out: Any,
        h: Any,
        h_start: Any,
        h_stride: Any,
        b: Any,
        b_start: Any,
        b_stride: Any,
        n: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, h, h_start, h_stride, b, b_start, b_stride, n = args
            h = data_of(context, builder, signature.args[1], h)
            starts = [
                builder.add(h_start, builder.mul(h_stride, ir.Constant(h_stride.type, i)))
                for i in range(num_rows)
            ]
            rows = [see(builder, h, start, _I32) for start in starts]
            sums = _Sums(builder, num_rows, num_vectors)
            one = ir.Constant(n.type, 1)
            with cgutils.for_range(builder, builder.lshr(builder.add(n, one), one)) as loop:
                first = builder.shl(loop.index, one)
                second = builder.add(first, one)
                second = builder.select(builder.icmp_signed("<", second, n), second, first)
                upper, lower = (
                    see(builder, b, builder.add(b_start, builder.mul(r, b_stride)), _ELEMENTS)
                    for r in (first, second)
                )
                pairs = []
                for j in range(num_vectors // 2):
                    both = [_read(builder, row, _I64(j)) for row in (upper, lower)]
                    pairs += [builder.shuffle_vector(*both, ir.Constant(_MASK, m)) for m in (_LOW, _HIGH)]
                for i, row in enumerate(rows):
                    pair = _repeat(builder, _read(builder, row, loop.index))
                    for j, value in enumerate(pairs):
                        sums.add(i, j, value, pair)
            sums.store_to(data_of(context, builder, signature.args[0], out))
            return context.get_dummy_value()

        return types.void(out, h, h_start, h_stride, b, b_start, b_stride, n), codegen

    return tile


BLOCK = 64
"""Output columns that `packed_tile` computes: the packed weights' own block."""


def packed_tile(num_rows: int, lines_ahead: int = 0) -> Any:
    """tile(sums, x, x_start, x_stride, w, w_start, n, ahead): sums[i, c] += Σ_k x[i, k] · w[k, c] over n
    pairs of k and the BLOCK columns c of a packed weight, in which a pair's columns [BLOCK, 2] lie side by
    side. With each pair, `lines_ahead` cache lines of w are asked for, the first from `w[ahead]` on."""
    num_vectors = BLOCK // LANES

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any,
        sums: Any,
        x: Any,
        x_start: Any,
        x_stride: Any,
        w: Any,
        w_start: Any,
        n: Any,
        ahead: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, x, x_start, x_stride, w, w_start, n, ahead = args
            out = data_of(context, builder, signature.args[0], out)
            weights = see(builder, w, w_start, _PAIRS)
            later = builder.bitcast(builder.gep(w, [ahead]), _ELEMENTS.as_pointer())
            starts = [
                builder.add(x_start, builder.mul(x_stride, ir.Constant(x_stride.type, i)))
                for i in range(num_rows)
            ]
            rows = [see(builder, x, start, _I32) for start in starts]
            sums = _Sums(builder, num_rows, num_vectors)
            sums.load_from(out)
            with cgutils.for_range(builder, n) as loop:
                base = builder.mul(loop.index, ir.Constant(loop.index.type, num_vectors))
                columns = [
                    _read(builder, weights, builder.add(base, ir.Constant(base.type, j)))
                    for j in range(num_vectors)
                ]
                first = builder.mul(loop.index, ir.Constant(loop.index.type, lines_ahead))
                for j in range(lines_ahead):
                    line = builder.add(first, ir.Constant(first.type, j))
                    ask_for(builder, builder.gep(later, [line]))
                for i, row in enumerate(rows):
                    pair = _repeat(builder, _read(builder, row, loop.index))
                    for j, column in enumerate(columns):
                        sums.add(i, j, column, pair)
            sums.store_to(out)
            return context.get_dummy_value()

        return types.void(sums, x, x_start, x_stride, w, w_start, n, ahead), codegen

    return tile
