"""numba kernels for products of few rows with a weight of 8 or 4 bits (`quantized.py` has its layout).

Codes are read once, in order, and widened to float32 in registers. A single row's sums are of codes, and get
scale and offset afterwards; for more rows three of the weight's are widened into memory that stays in the
cache, and every tile of x goes over them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import (
    Pointer,
    bf16s,
    dot,
    elements,
    floats,
    helper,
    int8s,
    int32s,
    load,
    nibbles,
    prefetch_far,
    put,
    store,
)
from toppings.ops.cpu_kernel import Kernel, claim, integer
from toppings.ops.cpu_nibbles import dot_groups, widen_group
from toppings.ops.cpu_stream import COLUMNS, ROWS, TASK_COLUMNS, add_tile
from toppings.ops.quantized import GROUP

Floats = NDArray[np.float32]

_HALF = GROUP // 2
_LINE, _CHUNK, _AHEAD = 64, 1024, 8192  # bytes: of a cache line, asked for together, and how far on


@helper
def _ask_for(codes: Pointer, start: int, n: int) -> None:
    for k in range(start + _AHEAD, start + _AHEAD + n, _LINE):
        prefetch_far(codes, k)


@helper
def _read_rows(xs: Floats, block: Any, x: Pointer, width: int, count: int) -> None:
    """`count` rows of `width` elements in the weight's order of inputs, filled up with zeros; beyond the last
    row it is repeated."""
    num_rows, num_in = integer(block, 6), integer(block, 8)
    order, has_order = int32s(block, 11), integer(block, 11) != 0
    for i in range(count):
        row = min(i, num_rows - 1) * num_in
        if has_order:
            for k in range(num_in):
                store(xs, i * width + k, load(x, row + load(order, k)))
        else:
            for k in range(num_in):
                store(xs, i * width + k, load(x, row + k))
        for k in range(num_in, width):
            store(xs, i * width + k, np.float32(0))


@helper
def _padded(num_rows: int) -> int:
    return num_rows if num_rows == 1 else (num_rows + ROWS - 1) // ROWS * ROWS


@helper
def _tiles(y: Any, xs: Floats, wide: Floats, sums: Floats, starts: Any, bias: Pointer, shape: Any) -> None:
    """Up to COLUMNS columns of y, whose weights are in `wide`, for all rows."""
    num_rows, num_out, width, first, num_columns, has_bias = shape
    for row in range(0, num_rows, ROWS):
        sums[:] = 0
        add_tile(sums, xs, row * width, width, wide, starts, 0, width)
        for i in range(min(ROWS, num_rows - row)):
            for j in range(num_columns):
                value = load(sums, i * COLUMNS + j)
                put(y, (row + i) * num_out + first + j, value, bias, has_bias, first + j)


@helper
def _int8_dot(x: Floats, codes: Pointer, start: int, n: int) -> np.float32:
    total = np.float32(0)
    for chunk in range(0, n, _CHUNK):
        size = min(_CHUNK, n - chunk)
        _ask_for(codes, start + chunk, size)
        total += dot(x, chunk, codes, start + chunk, size)
    return total


@helper
def _widen_int8(wide: Floats, to: int, codes: Pointer, start: int, scale: np.float32, n: int) -> None:
    for k in range(n):
        store(wide, to + k, load(codes, start + k) * scale)


@Kernel
def int8_linear(block: Any) -> None:
    """y = x Wᵀ + bias. Task: TASK_COLUMNS columns of y [rows, out] for all rows of x [rows, in], both dense;
    `bias` is 0 or an address; y is fp32 where operand 10 is 1, else as x; operand 11: 0 or the weight's order
    of inputs; 4, 9 and 12 are int4's."""
    y = (elements(block, 0), floats(block, 0), integer(block, 10) != 0)
    x, codes, scales = elements(block, 1), int8s(block, 2), floats(block, 3)
    bias, has_bias = elements(block, 5), integer(block, 5) != 0
    num_rows, num_out, num_in = integer(block, 6), integer(block, 7), integer(block, 8)
    xs, sums = np.empty(_padded(num_rows) * num_in, np.float32), np.empty(ROWS * COLUMNS, np.float32)
    wide, starts = np.empty(COLUMNS * num_in, np.float32), np.arange(COLUMNS) * num_in
    task = claim(block)
    if task >= 0:
        _read_rows(xs, block, x, num_in, _padded(num_rows))
    while task >= 0:
        start, stop = task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out)
        if num_rows == 1:
            for j in range(start, stop):
                value = _int8_dot(xs, codes, j * num_in, num_in) * load(scales, j)
                put(y, j, value, bias, has_bias, j)
            start = stop
        for first in range(start, stop, COLUMNS):
            num_columns = min(COLUMNS, stop - first)
            for j in range(num_columns):
                row = first + j
                _widen_int8(wide, j * num_in, codes, row * num_in, load(scales, row), num_in)
            shape = (num_rows, num_out, num_in, first, num_columns, has_bias)
            _tiles(y, xs, wide, sums, starts, bias, shape)
        task = claim(block)


@helper
def _sum_groups(group_sums: Floats, xs: Floats, num_groups: int, group: int) -> None:
    for g in range(num_groups):
        total = np.float32(0)
        for k in range(group):
            total += load(xs, g * group + k)
        store(group_sums, g, total)


@helper
def _int4_dot(
    x: Floats, x_sums: Floats, codes: Pointer, scales: Pointer, offsets: Pointer, row: int, num_groups: int,
    shift: int,
) -> np.float32:  # fmt: skip
    """Σ over groups of scale · Σ_k x[k] · code[k] + offset · Σ_k x[k]."""
    first, num_scales = row * num_groups, num_groups >> shift
    _ask_for(codes, first * _HALF, num_groups * _HALF)
    total: np.float32 = dot_groups(x, codes, scales, first, num_groups, shift)
    return total + dot(x_sums, 0, offsets, row * num_scales, num_scales)


@helper
def _widen_int4(
    wide: Floats, to: int, codes: Pointer, scales: Pointer, offsets: Pointer, row: int, num_groups: int,
    shift: int,
) -> None:  # fmt: skip
    for g in range(num_groups):
        index = row * num_groups + g
        scale, offset = load(scales, index >> shift), load(offsets, index >> shift)
        widen_group(wide, to + g * GROUP, codes, index * _HALF, scale, offset)


@helper
def _int4(block: Any, scales: Pointer, offsets: Pointer) -> None:
    y = (elements(block, 0), floats(block, 0), integer(block, 10) != 0)
    x, codes = elements(block, 1), nibbles(block, 2)
    bias, has_bias = elements(block, 5), integer(block, 5) != 0
    num_rows, num_out, num_groups, shift = (
        integer(block, 6),
        integer(block, 7),
        integer(block, 9),
        integer(block, 12),
    )
    width = num_groups * GROUP
    xs, sums = np.empty(_padded(num_rows) * width, np.float32), np.empty(ROWS * COLUMNS, np.float32)
    x_sums = np.empty(num_groups >> shift, np.float32)
    wide, starts = np.empty(COLUMNS * width, np.float32), np.arange(COLUMNS) * width
    task = claim(block)
    if task >= 0:
        _read_rows(xs, block, x, width, _padded(num_rows))
        _sum_groups(x_sums, xs, num_groups >> shift, GROUP << shift)
    while task >= 0:
        start, stop = task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out)
        if num_rows == 1:
            for j in range(start, stop):
                value = _int4_dot(xs, x_sums, codes, scales, offsets, j, num_groups, shift)
                put(y, j, value, bias, has_bias, j)
            start = stop
        for first in range(start, stop, COLUMNS):
            num_columns = min(COLUMNS, stop - first)
            for j in range(num_columns):
                _widen_int4(wide, j * width, codes, scales, offsets, first + j, num_groups, shift)
            shape = (num_rows, num_out, width, first, num_columns, has_bias)
            _tiles(y, xs, wide, sums, starts, bias, shape)
        task = claim(block)


@Kernel
def int4_linear(block: Any) -> None:
    """As `int8_linear`; operand 4: offsets; 9: the times GROUP elements in a row; one scale and offset, bf16,
    for 2^(operand 12) of them."""
    _int4(block, bf16s(block, 3), bf16s(block, 4))


@Kernel
def int4_wide_linear(block: Any) -> None:
    """The same with scales and offsets in fp32."""
    _int4(block, floats(block, 3), floats(block, 4))
