"""numba kernels for products of few bfloat16 rows with a weight of 8 or 4 bits, on CPUs that multiply
bfloat16 (`cpu_tiles.is_supported`; `quantized.py` has the layout, `cpu_quantized.py` what serves elsewhere).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import (
    Pointer,
    bf16s,
    copy,
    elements,
    floats,
    helper,
    int8s,
    int32s,
    load,
    nibbles,
    put,
)
from toppings.ops.cpu_code_tiles import (
    BLOCK,
    BLOCK_GROUPS,
    BYTES,
    EIGHTH,
    HALF,
    code_tile,
    int4_place,
    int8_place,
)
from toppings.ops.cpu_kernel import Kernel, claim, integer
from toppings.ops.cpu_stream import COLUMNS, ROWS, TASK_COLUMNS
from toppings.ops.cpu_tiles import LANES
from toppings.ops.quantized import GROUP

Halves = NDArray[np.uint16]

_LINE = 64  # bytes

_tile_1, _tile_2, _tile_3, _tile_4 = (code_tile(rows, COLUMNS) for rows in (1, 2, 3, 4))


@helper
def _rows(size: int) -> Halves:
    """Zeros from the start of a cache line on: registers that are read across two lines take twice as
    long."""
    zeros = np.zeros(size + _LINE // 2, np.uint16)
    start = -zeros.ctypes.data % _LINE // 2
    return zeros[start : start + size]


@helper
def _columns(
    block: Any, task: int, xs: Halves, stride: int, codes: Pointer, num_bytes: int, scales: Pointer,
    offsets: Pointer, num_scales: int, shift: int,
) -> None:  # fmt: skip
    """Tasks from `task` on. `xs`: rows as tiles read them; the weight's rows have `num_bytes` of codes and
    `num_scales` scales each."""
    y = (elements(block, 0), floats(block, 0), integer(block, 10) != 0)
    bias, has_bias = elements(block, 5), integer(block, 5) != 0
    num_rows, num_out = integer(block, 6), integer(block, 7)
    out = np.empty(ROWS * COLUMNS, np.float32)
    while task >= 0:
        for j in range(task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out), COLUMNS):
            last = min(COLUMNS, num_out - j) - 1
            places = (j * num_scales, num_scales, shift)
            weight = (codes, j * num_bytes, num_bytes, last, scales, offsets, *places)
            for row in range(0, num_rows, ROWS):
                count, at = min(ROWS, num_rows - row), row * stride
                if count == 4:
                    _tile_4(out, xs, at, stride, *weight)
                elif count == 3:
                    _tile_3(out, xs, at, stride, *weight)
                elif count == 2:
                    _tile_2(out, xs, at, stride, *weight)
                else:
                    _tile_1(out, xs, at, stride, *weight)
                for i in range(count):
                    for c in range(last + 1):
                        value = load(out, i * COLUMNS + c)
                        put(y, (row + i) * num_out + j + c, value, bias, has_bias, j + c)
        task = claim(block)


@Kernel
def int8_linear(block: Any) -> None:
    """As `cpu_quantized.int8_linear`, for few rows of bfloat16."""
    x, num_rows, num_in = elements(block, 1), integer(block, 6), integer(block, 8)
    stride = (num_in + BYTES - 1) // BYTES * BYTES
    xs, task = _rows(num_rows * stride), claim(block)
    if task >= 0:
        for i in range(num_rows):
            for k in range(num_in):
                place = i * stride + k // BYTES * BYTES + int8_place(k % BYTES)
                copy(xs, place, x, i * num_in + k)
    scales = floats(block, 3)
    _columns(block, task, xs, stride, int8s(block, 2), num_in, scales, scales, 1, 0)


@helper
def _read_groups(xs: Halves, to: int, block: Any, start: int, num_blocks: int) -> None:
    """A row for int4: for each block of four groups the elements in the order of `_int4_pairs`, behind them
    all the sums over what shares a scale, fp32."""
    x, num_in, shift = elements(block, 1), integer(block, 8), integer(block, 12)
    order, has_order = int32s(block, 11), integer(block, 11) != 0
    sums = xs[to + num_blocks * BLOCK :].view(np.float32)
    for g in range(integer(block, 9)):
        total, first = np.float32(0), g * GROUP
        place = to + g // BLOCK_GROUPS * BLOCK + g % BLOCK_GROUPS * EIGHTH
        for k in range(min(GROUP, num_in - first)):
            source = start + (np.int64(load(order, first + k)) if has_order else first + k)
            copy(xs, place + int4_place(k), x, source)
            total += load(x, source)
        sums[g >> shift] += total


@helper
def _int4(block: Any, scales: Pointer, offsets: Pointer) -> None:
    num_rows, num_in, num_groups, shift = (
        integer(block, 6),
        integer(block, 8),
        integer(block, 9),
        integer(block, 12),
    )
    num_blocks = (num_groups + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    num_scales = num_groups >> shift
    stride = num_blocks * BLOCK + 2 * ((num_scales + LANES - 1) // LANES * LANES)
    xs, task = _rows(num_rows * stride), claim(block)
    if task >= 0:
        for i in range(num_rows):
            _read_groups(xs, i * stride, block, i * num_in, num_blocks)
    _columns(
        block, task, xs, stride, nibbles(block, 2), num_groups * HALF, scales, offsets, num_scales, shift
    )


@Kernel
def int4_linear(block: Any) -> None:
    """As `cpu_quantized.int4_linear`, for few rows of bfloat16."""
    _int4(block, bf16s(block, 3), bf16s(block, 4))


@Kernel
def int4_wide_linear(block: Any) -> None:
    """As `cpu_quantized.int4_wide_linear`, for few rows of bfloat16."""
    _int4(block, floats(block, 3), floats(block, 4))
