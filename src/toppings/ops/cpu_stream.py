"""numba kernel for products of few rows with a weight as it is stored; `linear.py` says when it runs.

The weight is read once, in order, and widened to float32 in registers: what a product costs is the reading.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import Pointer, elements, helper, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_ROWS = 4  # of x in a tile, and
_COLUMNS = 3  # rows of the weight: their sums and elements fill AVX2's registers
_COLUMNS_OF_ONE = 4  # beside a single row of x
TASK_COLUMNS = 48
"""Of a product, that a task computes: a multiple of a tile's."""


@helper
def _tile_of_one(sums: Floats, x: Floats, w: Pointer, starts: Indices, n: int) -> None:
    w0, w1, w2, w3 = load(starts, 0), load(starts, 1), load(starts, 2), load(starts, 3)
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(n):
        value = load(x, k)
        s0 += value * load(w, w0 + k)
        s1 += value * load(w, w1 + k)
        s2 += value * load(w, w2 + k)
        s3 += value * load(w, w3 + k)
    sums[0], sums[1], sums[2], sums[3] = s0, s1, s2, s3


@helper
def _tile(sums: Floats, x: Floats, x0: int, w: Pointer, starts: Indices, n: int) -> None:
    """sums[i, j] = Σ_k x[x0 + i · n + k] · w[starts[j] + k], _ROWS times _COLUMNS of them."""
    w0, w1, w2 = load(starts, 0), load(starts, 1), load(starts, 2)
    x1, x2, x3 = x0 + n, x0 + 2 * n, x0 + 3 * n
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = np.float32(0)
    for k in range(n):
        a, b, c = load(w, w0 + k), load(w, w1 + k), load(w, w2 + k)
        value = load(x, x0 + k)
        s00 += value * a
        s01 += value * b
        s02 += value * c
        value = load(x, x1 + k)
        s10 += value * a
        s11 += value * b
        s12 += value * c
        value = load(x, x2 + k)
        s20 += value * a
        s21 += value * b
        s22 += value * c
        value = load(x, x3 + k)
        s30 += value * a
        s31 += value * b
        s32 += value * c
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5] = s00, s01, s02, s10, s11, s12
    sums[6], sums[7], sums[8], sums[9], sums[10], sums[11] = s20, s21, s22, s30, s31, s32


@Kernel
def few_rows_linear(block: Any) -> None:
    """y = x Wᵀ + bias. Task: TASK_COLUMNS columns of y [rows, out] for all rows of x [rows, in], both dense;
    w: [out, in] as it is stored; `bias` is 0 or an address. Tiles that reach beyond the last row or column
    repeat it."""
    y, x, w, bias = elements(block, 0), elements(block, 1), elements(block, 2), elements(block, 3)
    has_bias = integer(block, 3) != 0
    num_rows, num_out, num_in = integer(block, 4), integer(block, 5), integer(block, 6)
    tile_rows = 1 if num_rows == 1 else _ROWS
    tile_columns = _COLUMNS_OF_ONE if num_rows == 1 else _COLUMNS
    padded = (num_rows + tile_rows - 1) // tile_rows * tile_rows
    xs, sums = np.empty(padded * num_in, np.float32), np.empty(_ROWS * _COLUMNS_OF_ONE, np.float32)
    starts = np.empty(_COLUMNS_OF_ONE, np.int64)
    task = claim(block)
    if task >= 0:
        for i in range(padded):
            row = min(i, num_rows - 1) * num_in
            for k in range(num_in):
                store(xs, i * num_in + k, load(x, row + k))
    while task >= 0:
        stop = min((task + 1) * TASK_COLUMNS, num_out)
        for first in range(task * TASK_COLUMNS, stop, tile_columns):
            for j in range(tile_columns):
                starts[j] = min(first + j, stop - 1) * num_in
            columns = min(tile_columns, stop - first)
            for row in range(0, num_rows, tile_rows):
                if num_rows == 1:
                    _tile_of_one(sums, xs, w, starts, num_in)
                else:
                    _tile(sums, xs, row * num_in, w, starts, num_in)
                for i in range(min(tile_rows, num_rows - row)):
                    for j in range(columns):
                        value = load(sums, i * tile_columns + j)
                        if has_bias:
                            value += load(bias, first + j)
                        store(y, (row + i) * num_out + first + j, value)
        task = claim(block)
