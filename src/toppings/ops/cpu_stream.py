"""numba kernel for products of few rows with a weight as it is stored; `linear.py` says when it runs.

The weight is read once, in order, and widened to float32 in registers: what a product costs is the reading.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import Pointer, dot, elements, helper, load, prefetch, store
from toppings.ops.cpu_kernel import Kernel, claim, integer

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_ROWS = 4  # of x in a tile, and
_COLUMNS = 3  # rows of the weight: their sums and elements fill AVX2's registers
_LINE = 32  # elements of two bytes in a cache line
_CHUNK, _AHEAD = 512, 2048  # elements that are asked for together, and how far on
TASK_COLUMNS = 48
"""Of a product, that a task computes: a multiple of a tile's."""


@helper
def _ask_for(w: Pointer, start: int, n: int) -> None:
    for k in range(start, start + n, _LINE):
        prefetch(w, k)


@helper
def _dot_one(x: Floats, w: Pointer, start: int, n: int) -> np.float32:
    """Σ_k x[k] · w[start + k], chunk by chunk, while a later one travels from memory."""
    total = np.float32(0)
    for chunk in range(0, n, _CHUNK):
        size = min(_CHUNK, n - chunk)
        _ask_for(w, start + chunk + _AHEAD, size)
        total += dot(x, chunk, w, start + chunk, size)
    return total


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


@helper
def _one_row(y: Pointer, x: Floats, w: Pointer, bias: Pointer, has_bias: bool, span: Any, n: int) -> None:
    for j in range(span[0], span[1]):
        value = _dot_one(x, w, j * n, n)
        if has_bias:
            value += load(bias, j)
        store(y, j, value)


@Kernel
def few_rows_linear(block: Any) -> None:
    """y = x Wᵀ + bias. Task: TASK_COLUMNS columns of y [rows, out] for all rows of x [rows, in], both dense;
    w: [out, in] as it is stored; `bias` is 0 or an address. Tiles that reach beyond the last row or column
    repeat it."""
    y, x, w, bias = elements(block, 0), elements(block, 1), elements(block, 2), elements(block, 3)
    has_bias = integer(block, 3) != 0
    num_rows, num_out, num_in = integer(block, 4), integer(block, 5), integer(block, 6)
    padded = num_rows if num_rows == 1 else (num_rows + _ROWS - 1) // _ROWS * _ROWS
    xs, sums = np.empty(padded * num_in, np.float32), np.empty(_ROWS * _COLUMNS, np.float32)
    starts = np.empty(_COLUMNS, np.int64)
    task = claim(block)
    if task >= 0:
        for i in range(padded):
            row = min(i, num_rows - 1) * num_in
            for k in range(num_in):
                store(xs, i * num_in + k, load(x, row + k))
    while task >= 0:
        start, stop = task * TASK_COLUMNS, min((task + 1) * TASK_COLUMNS, num_out)
        if num_rows == 1:
            _one_row(y, xs, w, bias, has_bias, (start, stop), num_in)
            start = stop
        for first in range(start, stop, _COLUMNS):
            for j in range(_COLUMNS):
                starts[j] = min(first + j, stop - 1) * num_in
            _ask_for(w, (first + _COLUMNS) * num_in, _COLUMNS * num_in)
            columns = min(_COLUMNS, stop - first)
            for row in range(0, num_rows, _ROWS):
                _tile(sums, xs, row * num_in, w, starts, num_in)
                for i in range(min(_ROWS, num_rows - row)):
                    for j in range(columns):
                        value = load(sums, i * _COLUMNS + j)
                        if has_bias:
                            value += load(bias, first + j)
                        store(y, (row + i) * num_out + first + j, value)
        task = claim(block)
