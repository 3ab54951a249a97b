"""numba kernels for bfloat16 on CPUs with an instruction for its products (`cpu_tiles.is_supported`)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import Pointer, elements, elements_at, helper, int32s, int64s, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer
from toppings.ops.cpu_tiles import BLOCK, STEP, dot_tile, outer_tile, packed_tile

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Shrunk = NDArray[np.uint16]

_ROWS = 4  # of a tile: its sums, the weights and a row's elements fill the registers
_WIDE_ONE, _WIDE, _NARROW = 128, 64, 32  # columns of the outer tiles
_CHUNK = 32  # pairs of a packed block that stay in the first-level cache from tile to tile
_LINES = 2  # that each of a chunk's two tiles asks for, of the chunk after it

_dot_one, _dot = dot_tile(1, 4), dot_tile(_ROWS, 4)
_outer_one_wide, _outer_one = outer_tile(1, _WIDE_ONE // 16), outer_tile(1, _NARROW // 16)
_outer_wide, _outer = outer_tile(_ROWS, _WIDE // 16), outer_tile(_ROWS, _NARROW // 16)
_packed_1, _packed_2, _packed_3, _packed_4 = (packed_tile(i) for i in (1, 2, 3, 4))
_chunk_1, _chunk_2, _chunk_3, _chunk_4 = (packed_tile(i, _LINES) for i in (1, 2, 3, 4))


@helper
def _shrink(
    h: Shrunk, stride: int, x: Pointer, x_start: int, x_stride: int, num_rows: int, a: Pointer, a_start: int,
    rank: int, n: int, out: Floats, x_starts: Indices, a_starts: Indices,
) -> None:  # fmt: skip
    """h = x Aᵀ, rounded. A tile that reaches beyond the last row or rank repeats it."""
    for m in range(0, num_rows, _ROWS):
        rows = min(_ROWS, num_rows - m)
        for i in range(_ROWS):
            x_starts[i] = x_start + (m + min(i, rows - 1)) * x_stride
        for r in range(0, rank, 4):
            ranks = min(4, rank - r)
            for j in range(4):
                a_starts[j] = a_start + (r + min(j, ranks - 1)) * n
            if rows == 1:
                _dot_one(out, x, x_starts, a, a_starts, n)
            else:
                _dot(out, x, x_starts, a, a_starts, n)
            for i in range(rows):
                for j in range(ranks):
                    store(h, (m + i) * stride + r + j, load(out, i * 4 + j))
        if rank % 2:
            for i in range(rows):
                h[(m + i) * stride + rank] = 0


@helper
def _add(y: Pointer, start: int, stride: int, out: Floats, num_rows: int, width: int) -> None:
    for i in range(num_rows):
        for j in range(width):
            store(y, start + i * stride + j, load(y, start + i * stride + j) + load(out, i * width + j))


@helper
def _expand(
    y: Pointer, y_start: int, y_stride: int, h: Shrunk, stride: int, num_rows: int, b: Pointer, b_start: int,
    rank: int, n: int, out: Floats,
) -> None:  # fmt: skip
    """y += h B, tile by tile; rows beyond the last are computed and dropped."""
    for m in range(0, num_rows, _ROWS):
        rows = min(_ROWS, num_rows - m)
        to, at = y_start + m * y_stride, m * stride
        wide = _WIDE_ONE if rows == 1 else _WIDE
        column = 0
        while column < n:
            width = wide if column + wide <= n else _NARROW
            from_b = b_start + column
            if rows == 1 and width == wide:
                _outer_one_wide(out, h, at, stride, b, from_b, n, rank)
            elif rows == 1:
                _outer_one(out, h, at, stride, b, from_b, n, rank)
            elif width == wide:
                _outer_wide(out, h, at, stride, b, from_b, n, rank)
            else:
                _outer(out, h, at, stride, b, from_b, n, rank)
            _add(y, to + column, y_stride, out, rows, width)
            column += width


@Kernel
def add_lora(block: Any) -> None:
    """Task: one module for one block of a segment's rows, none where its slot is -1; `lora.py` says what it
    computes. Widths are multiples of 32; no block has more than `max_rows` rows, no adapter a rank above
    `max_rank`."""
    y, x, arena = elements(block, 0), elements(block, 1), elements(block, 2)
    places, slot_stride = int64s(block, 3), integer(block, 4)
    blocks, offsets = int32s(block, 5), int64s(block, 6)  # (start, stop, slot) each; columns of each module
    num_modules, num_in = integer(block, 7), integer(block, 8)
    y_stride, x_stride = integer(block, 9), integer(block, 10)
    max_rows, max_rank = integer(block, 11), integer(block, 12)
    h = np.zeros((max_rows + _ROWS) * (max_rank + 1), np.uint16)
    out = np.empty(_ROWS * _WIDE, np.float32)
    x_starts, a_starts = np.empty(_ROWS, np.int64), np.empty(4, np.int64)
    task = claim(block)
    while task >= 0:
        rows, module = task // num_modules * 3, task % num_modules
        start, slot = load(blocks, rows), load(blocks, rows + 2)
        num_rows = load(blocks, rows + 1) - start
        place = max(slot, 0) * slot_stride + module * 3
        a_start, b_start, rank = load(places, place), load(places, place + 1), load(places, place + 2)
        if slot < 0:
            rank = 0
        column = load(offsets, module)
        num_out = load(offsets, module + 1) - column
        stride = rank + rank % 2
        if rank:
            _shrink(
                h, stride, x, start * x_stride, x_stride, num_rows, arena, a_start, rank, num_in, out,
                x_starts, a_starts,
            )  # fmt: skip
            _expand(
                y,
                start * y_stride + column,
                y_stride,
                h,
                stride,
                num_rows,
                arena,
                b_start,
                rank,
                num_out,
                out,
            )
        task = claim(block)


@helper
def _add_packed(
    sums: Floats, x: Pointer, start: int, num_in: int, num_rows: int, w: Pointer, weights: int, n: int
) -> None:
    """A block's product with at most `_ROWS` rows, n pairs of k."""
    if num_rows == 4:
        _packed_4(sums, x, start, num_in, w, weights, n, weights)
    elif num_rows == 3:
        _packed_3(sums, x, start, num_in, w, weights, n, weights)
    elif num_rows == 2:
        _packed_2(sums, x, start, num_in, w, weights, n, weights)
    else:
        _packed_1(sums, x, start, num_in, w, weights, n, weights)


@helper
def _add_packed_chunks(
    sums: Floats, x: Pointer, first: int, num_in: int, num_rows: int, w: Pointer, weights: int, n: int
) -> None:
    """The same for up to twice as many rows: every chunk is read by two tiles, and while they compute, what
    comes after it travels from memory, half of it for each. Else memory would rest during the second."""
    half = _LINES * _CHUNK * STEP
    for k in range(0, n, _CHUNK):
        pairs, place = min(_CHUNK, n - k), weights + k * BLOCK * 2
        ahead, start = place + _CHUNK * BLOCK * 2, first + 2 * k
        _chunk_4(sums, x, start, num_in, w, place, pairs, ahead)
        ahead, start, rest = ahead + half, start + _ROWS * num_in, num_rows - _ROWS
        if rest == 4:
            _chunk_4(sums[_ROWS * BLOCK :], x, start, num_in, w, place, pairs, ahead)
        elif rest == 3:
            _chunk_3(sums[_ROWS * BLOCK :], x, start, num_in, w, place, pairs, ahead)
        elif rest == 2:
            _chunk_2(sums[_ROWS * BLOCK :], x, start, num_in, w, place, pairs, ahead)
        else:
            _chunk_1(sums[_ROWS * BLOCK :], x, start, num_in, w, place, pairs, ahead)


@helper
def _block_product(
    sums: Floats, x: Pointer, start: int, num_in: int, num_rows: int, w: Pointer, weights: int
) -> None:
    """sums [rows, BLOCK] = the product of a block, whose weights begin at `weights`, with x's rows from the
    element `start` on."""
    for i in range(num_rows * BLOCK):
        store(sums, i, np.float32(0))
    if num_rows <= _ROWS:
        _add_packed(sums, x, start, num_in, num_rows, w, weights, num_in // 2)
    else:
        _add_packed_chunks(sums, x, start, num_in, num_rows, w, weights, num_in // 2)


@Kernel
def few_rows_linear(block: Any) -> None:
    """y = x Wᵀ + bias. Task: one block of columns of a packed weight [blocks, pairs of k, BLOCK, 2] for all
    rows of x [rows, in] and y [rows, out], both dense; `bias` is 0 or an address."""
    y, x, w, bias = elements(block, 0), elements(block, 1), elements(block, 2), elements(block, 3)
    has_bias = integer(block, 3) != 0
    num_rows, num_out, num_in, num_pairs = (
        integer(block, 4), integer(block, 5), integer(block, 6), integer(block, 7)
    )  # fmt: skip
    sums = np.empty(num_rows * BLOCK, np.float32)
    task = claim(block)
    while task >= 0:
        num_columns = min(BLOCK, num_out - task * BLOCK)
        _block_product(sums, x, 0, num_in, num_rows, w, task * num_pairs * BLOCK * 2)
        for i in range(num_rows):
            for j in range(num_columns):
                value = load(sums, i * BLOCK + j)
                if has_bias:
                    value += load(bias, task * BLOCK + j)
                store(y, i * num_out + task * BLOCK + j, value)
        task = claim(block)


@Kernel
def grouped_linear(block: Any) -> None:
    """y = x Wᵀ, where `groups` [groups, 3] of neighbouring rows, (first, how many, a weight's address) each,
    have weights of their own, packed alike. Task: one block of columns for one group's rows, of which none
    has more than `max_rows`."""
    y, x, groups = elements(block, 0), elements(block, 1), int64s(block, 2)
    num_blocks, num_out, num_in = integer(block, 3), integer(block, 4), integer(block, 5)
    num_pairs, max_rows = integer(block, 6), integer(block, 7)
    sums = np.empty(max_rows * BLOCK, np.float32)
    task = claim(block)
    while task >= 0:
        group, column = task // num_blocks * 3, task % num_blocks * BLOCK
        first, num_rows = load(groups, group), load(groups, group + 1)
        w = elements_at(block, load(groups, group + 2))
        _block_product(sums, x, first * num_in, num_in, num_rows, w, column * num_pairs * 2)
        for i in range(num_rows):
            for j in range(min(BLOCK, num_out - column)):
                store(y, (first + i) * num_out + column + j, load(sums, i * BLOCK + j))
        task = claim(block)
