"""numba kernel for products of few rows with a weight as it is stored; `linear.py` says when it runs.

The weight is read once, in order, and widened to float32 in registers: what a product costs is the reading.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import (
    Pointer,
    dot,
    elements,
    floats,
    helper,
    load,
    prefetch,
    prefetch_far,
    put,
    store,
)
from toppings.ops.cpu_kernel import Kernel, claim, integer

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

ROWS = 4  # of x in a tile, and
COLUMNS = 3  # rows of the weight: their sums and elements fill AVX2's registers
_LINE = 32  # elements of two bytes in a cache line
_CHUNK, _AHEAD = 512, 2048  # elements that are asked for together, and how far on, beside a single row,
_TILE_CHUNK = 256  # and beside a tile, of each of its columns
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
def add_tile(
    sums: Floats, x: Floats, x0: int, stride: int, w: Pointer, starts: Indices, k0: int, n: int
) -> None:
    """sums[i, j] += Σ_k x[x0 + i · stride + k] · w[starts[j] + k], ROWS times COLUMNS of them, over the n k
    from k0 on."""
    x0 += k0
    w0, w1, w2 = load(starts, 0) + k0, load(starts, 1) + k0, load(starts, 2) + k0
    x1, x2, x3 = x0 + stride, x0 + 2 * stride, x0 + 3 * stride
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
    totals = (s00, s01, s02, s10, s11, s12, s20, s21, s22, s30, s31, s32)
    for i in range(ROWS * COLUMNS):
        sums[i] += totals[i]


@helper
def _tile(sums: Floats, x: Floats, x0: int, w: Pointer, starts: Indices, n: int, is_first: bool) -> None:
    """The first tile of its columns asks for what the next columns' will read."""
    sums[:] = 0
    for chunk in range(0, n, _TILE_CHUNK):
        size = min(_TILE_CHUNK, n - chunk)
        for j in range(COLUMNS if is_first else 0):
            place = load(starts, j) + COLUMNS * n + chunk
            for k in range(place, place + size, _LINE):
                prefetch_far(w, k)
        add_tile(sums, x, x0, n, w, starts, chunk, size)


@helper
def _one_row(y: Any, x: Floats, w: Pointer, bias: Pointer, has_bias: bool, span: Any, n: int) -> None:
    for j in range(span[0], span[1]):
        value = _dot_one(x, w, j * n, n)
        put(y, j, value, bias, has_bias, j)


@Kernel
def few_rows_linear(block: Any) -> None:
    """y = x Wᵀ + bias. Task: TASK_COLUMNS columns of y [rows, out] for all rows of x [rows, in], both dense;
    w: [out, in] as it is stored; `bias` is 0 or an address; y is fp32 where operand 7 is 1, else as x. Tiles
    that reach beyond the last row or column repeat it."""
    y = (elements(block, 0), floats(block, 0), integer(block, 7) != 0)
    x, w, bias = elements(block, 1), elements(block, 2), elements(block, 3)
    has_bias = integer(block, 3) != 0
    num_rows, num_out, num_in = integer(block, 4), integer(block, 5), integer(block, 6)
    padded = num_rows if num_rows == 1 else (num_rows + ROWS - 1) // ROWS * ROWS
    xs, sums = np.empty(padded * num_in, np.float32), np.empty(ROWS * COLUMNS, np.float32)
    starts = np.empty(COLUMNS, np.int64)
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
        for first in range(start, stop, COLUMNS):
            for j in range(COLUMNS):
                starts[j] = min(first + j, stop - 1) * num_in
            columns = min(COLUMNS, stop - first)
            for row in range(0, num_rows, ROWS):
                _tile(sums, xs, row * num_in, w, starts, num_in, row == 0)
                for i in range(min(ROWS, num_rows - row)):
                    for j in range(columns):
                        value = load(sums, i * COLUMNS + j)
                        put(y, (row + i) * num_out + first + j, value, bias, has_bias, first + j)
        task = claim(block)
