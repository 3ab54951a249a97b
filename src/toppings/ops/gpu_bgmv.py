"""Triton kernels for LoRA row by row, every row as if its rank were the largest: the BGMV form of
`gpu_lora.py`.

A shrink program is (row, module, 16 ranks, split of the input), an expand program (row, 128 columns): plain
fp32 sums without tensor cores. Ranks beyond an adapter's own read its last one again, and what they give is
dropped; so a step costs what rows · max rank costs, which is what the published cost model of this form says.
The largest rank is found in the table, since a graph serves batches of any: it is captured with programs for
all ranks that there may be, and those beyond the batch's largest end at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.gpu_launch import (
    ALIGNMENT_BYTES,
    check_aligned,
    chunk_room,
    column_tiles,
    columns_of,
    early_options,
    kernel,
)
from toppings.ops.gpu_plan import LoraBatch


@triton.jit  # type: ignore[untyped-decorator]
def _largest_rank(  # type: ignore[no-untyped-def]
    places, chunks, num_chunks, places_stride, NUM_MODULES: tl.constexpr, MANY_CHUNKS: tl.constexpr
):
    """Of any chunk's adapter, in any module of the group."""
    chunk_ids = tl.arange(0, MANY_CHUNKS)
    slots = tl.load(chunks + chunk_ids * 3 + 2, mask=chunk_ids < num_chunks, other=-1)
    largest = tl.zeros([MANY_CHUNKS], tl.int32)
    for j in tl.static_range(NUM_MODULES):
        rank_places = places + slots.to(tl.int64) * places_stride + j * 3 + 2
        largest = tl.maximum(largest, tl.load(rank_places, mask=slots >= 0, other=0).to(tl.int32))
    return tl.max(largest, axis=0)


_STEP_OPTIONS = {
    "do_not_specialize": ["num_chunks", "places_stride", "max_rank", "h_stride", "h_split_stride"],
    "do_not_specialize_on_alignment": ["places"],
}


@kernel(**_STEP_OPTIONS)
def _shrink_rows_kernel(  # type: ignore[no-untyped-def]
    h,
    x,
    arena,
    places,
    chunks,
    num_chunks,
    places_stride,
    x_stride,
    num_in,
    max_rank,
    h_stride,
    h_split_stride,
    NUM_MODULES: tl.constexpr,
    MANY_CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(chunks + tl.program_id(1) * 3 + 2)
    if slot < 0:
        return
    row = tl.load(chunks + tl.program_id(1) * 3).to(tl.int64)
    tiles = (max_rank + RANKS - 1) // RANKS
    split = tl.program_id(0) % SPLITS
    module = tl.program_id(0) // SPLITS // tiles
    place = places + slot.to(tl.int64) * places_stride + module * 3
    rank = tl.load(place + 2).to(tl.int32)
    if rank == 0:
        return
    first = tl.program_id(0) // SPLITS % tiles * RANKS
    if first >= _largest_rank(places, chunks, num_chunks, places_stride, NUM_MODULES, MANY_CHUNKS):
        return
    a_start = tl.multiple_of(tl.load(place), ALIGNMENT)
    ranks = first + tl.arange(0, RANKS)
    a_rows = arena + a_start + tl.minimum(ranks, rank - 1).to(tl.int64)[:, None] * num_in
    part = (num_in + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    total = tl.zeros([RANKS], tl.float32)
    for k in range(split * part, tl.minimum((split + 1) * part, num_in), DEPTH):
        inputs = k + tl.arange(0, DEPTH)
        x_part = tl.load(x + row * x_stride + inputs, mask=inputs < num_in, other=0.0).to(tl.float32)
        a_tile = tl.load(a_rows + inputs[None, :], mask=(inputs < num_in)[None, :], other=0.0)
        total += tl.sum(a_tile.to(tl.float32) * x_part[None, :], axis=1)
    target = h + split * h_split_stride + row * h_stride + module * max_rank + ranks
    tl.store(target, total, mask=ranks < max_rank)


@kernel(**_STEP_OPTIONS)
def _expand_rows_kernel(  # type: ignore[no-untyped-def]
    y,
    h,
    arena,
    places,
    chunks,
    num_chunks,
    places_stride,
    y_stride,
    max_rank,
    h_stride,
    h_split_stride,
    end_0,
    end_1,
    end_2,
    NUM_MODULES: tl.constexpr,
    MANY_CHUNKS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(chunks + tl.program_id(1) * 3 + 2)
    if slot < 0:
        return
    row = tl.load(chunks + tl.program_id(1) * 3).to(tl.int64)
    module, low, high, first = columns_of(tl.program_id(0), end_0, end_1, end_2, COLUMNS)
    place = places + slot.to(tl.int64) * places_stride + module * 3
    rank = tl.load(place + 2).to(tl.int32)
    if rank == 0:
        return
    width = tl.multiple_of(high - low, ALIGNMENT)
    columns = tl.multiple_of(first, ALIGNMENT) + tl.arange(0, COLUMNS)
    mask = columns < high
    b = (
        arena
        + tl.multiple_of(tl.load(place + 1), ALIGNMENT)
        + (columns - tl.multiple_of(low, ALIGNMENT))[None, :]
    )
    total = tl.zeros([COLUMNS], tl.float32)
    largest = _largest_rank(places, chunks, num_chunks, places_stride, NUM_MODULES, MANY_CHUNKS)
    for r in range(0, largest, RANKS):
        ranks = r + tl.arange(0, RANKS)
        h_part = tl.zeros([RANKS], tl.float32)
        for split in tl.static_range(SPLITS):
            source = h + split * h_split_stride + row * h_stride + module * max_rank + ranks
            h_part += tl.load(source, mask=ranks < max_rank, other=0.0)
        h_part = tl.where(ranks < rank, h_part, 0.0)
        b_rows = tl.minimum(ranks, rank - 1).to(tl.int64)[:, None] * width
        b_tile = tl.load(b + b_rows, mask=mask[None, :], other=0.0).to(tl.float32)
        total += tl.sum(h_part[:, None] * b_tile, axis=0)
    target = y + row * y_stride + columns
    total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=mask)


def shrink_rows(x: Tensor, arena: Tensor, places: Tensor, num_modules: int, batch: LoraBatch) -> Tensor:
    """x Aᵀ, fp32 [splits, T, modules · rank room], each module's part as wide as the largest rank."""
    tiles, (num_rows, num_in) = batch.tiles(x.dtype), x.shape
    check_aligned(arena.dtype, num_in)
    assert x.stride(1) == 1
    splits = tiles.splits(num_in)
    h = torch.empty(splits, num_rows, num_modules * batch.rank_room, dtype=torch.float32, device=x.device)
    grid = (splits * num_modules * triton.cdiv(batch.rank_room, tiles.ranks), len(batch.chunks), 1)
    _shrink_rows_kernel(
        grid,
        h,
        x,
        arena,
        places,
        batch.chunks,
        len(batch.chunks),
        places.stride(0),
        x.stride(0),
        num_in,
        batch.rank_room,
        h.stride(1),
        h.stride(0),
        NUM_MODULES=num_modules,
        MANY_CHUNKS=chunk_room(len(batch.chunks)),
        RANKS=tiles.ranks,
        DEPTH=tiles.depth,
        SPLITS=splits,
        ALIGNMENT=ALIGNMENT_BYTES // arena.itemsize,
        IS_EARLY=bool(early_options(x.device)),
        num_warps=tiles.shrink_warps,
        num_stages=tiles.stages,
    )
    return h


def expand_rows(
    y: Tensor, h: Tensor, arena: Tensor, places: Tensor, out_offsets: Sequence[int], batch: LoraBatch
) -> None:
    """y[row] += h B for every module of the group; h as `shrink_rows` returns it."""
    tiles, early = batch.tiles(y.dtype), early_options(y.device)
    grid, ends = column_tiles(y, out_offsets, tiles.columns)
    check_aligned(arena.dtype, *ends)
    _expand_rows_kernel(
        (grid, len(batch.chunks), 1),
        y,
        h,
        arena,
        places,
        batch.chunks,
        len(batch.chunks),
        places.stride(0),
        y.stride(0),
        batch.rank_room,
        h.stride(1),
        h.stride(0),
        *ends,
        NUM_MODULES=len(out_offsets),
        MANY_CHUNKS=chunk_room(len(batch.chunks)),
        RANKS=tiles.expand_ranks,
        COLUMNS=tiles.columns,
        SPLITS=h.shape[0],
        ALIGNMENT=ALIGNMENT_BYTES // arena.itemsize,
        IS_EARLY=bool(early),
        **early,
        num_warps=tiles.expand_warps,
        num_stages=tiles.expand_stages,
    )
