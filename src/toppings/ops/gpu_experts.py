"""Triton kernel for a projection of all experts, y = x Wᵀ + b with the W and b of its expert for each row: a
grouped product.

A program is (chunk, `columns` outputs): up to `rows` neighbouring rows of one expert, so that its weights are
read once for all of them. How many chunks there are is not known on the host: as many programs start as there
may be, and those without rows end at once. Of few rows for each expert chunks are short, and reading weights
is what counts. LoRA on experts has the kernels of `gpu_lora.py`, over chunks of one expert and one adapter.
Checked with Triton's interpreter and compiled; not yet run on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.experts import GroupedRows
from toppings.ops.gpu_launch import ALIGNMENT_BYTES, check_aligned, dot_options, kernel


@dataclass(frozen=True)
class _Tiles:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_TILES = {True: _Tiles(64, 128, 64, 8, 3), False: _Tiles(16, 64, 128, 4, 4)}
_FP32_TILES = {True: _Tiles(64, 64, 32, 8, 2), False: _Tiles(16, 64, 64, 4, 3)}
"""By whether there are many rows for each expert."""


@kernel()
def _grouped_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    weight,
    bias,
    chunks,
    num_in,
    num_out,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    num_in = tl.multiple_of(num_in, ALIGNMENT)
    num_out = tl.multiple_of(num_out, ALIGNMENT)
    chunk = tl.program_id(1)
    expert = tl.load(chunks + chunk * 3 + 2)
    if expert < 0:
        return
    rows = tl.load(chunks + chunk * 3) + tl.arange(0, ROWS)
    stop = tl.load(chunks + chunk * 3 + 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_rows = x + rows.to(tl.int64)[:, None] * num_in
    w_rows = weight + (expert.to(tl.int64) * num_out + columns[:, None]) * num_in
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, num_in, DEPTH):
        inputs = k + depth[None, :]
        x_tile = tl.load(x_rows + inputs, mask=(rows < stop)[:, None] & (inputs < num_in), other=0.0)
        w_tile = tl.load(w_rows + inputs, mask=(columns < num_out)[:, None] & (inputs < num_in), other=0.0)
        total = tl.dot(x_tile.to(OPERAND), tl.trans(w_tile).to(OPERAND), total, input_precision=PRECISION)
    if HAS_BIAS:
        own = tl.load(bias + expert.to(tl.int64) * num_out + columns, mask=columns < num_out, other=0.0)
        total += own.to(tl.float32)[None, :]
    target = y + rows.to(tl.int64)[:, None] * num_out + columns[None, :]
    mask = (rows < stop)[:, None] & (columns < num_out)[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: GroupedRows) -> Tensor:
    """x: [P, in], dense, as `rows` groups it; weight: [experts, out, in], bias: [experts, out], both dense;
    [P, out] of x's dtype, sums in fp32."""
    (num_rows, num_in), num_out = x.shape, weight.shape[1]
    y = x.new_empty(num_rows, num_out)
    if not num_rows:
        return y
    check_aligned(x.dtype, num_in, num_out)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert bias is None or bias.is_contiguous()
    tiles = (_FP32_TILES if x.dtype == torch.float32 else _TILES)[rows.has_many]
    chunks = rows.chunks(tiles.rows, by_owner=False)
    _grouped_kernel(
        (triton.cdiv(num_out, tiles.columns), len(chunks), 1),
        y,
        x,
        weight,
        y if bias is None else bias,
        chunks,
        num_in,
        num_out,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        ALIGNMENT=ALIGNMENT_BYTES // x.itemsize,
        **dot_options(x.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y
