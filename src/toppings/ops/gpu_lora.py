"""Triton kernels for LoRA: y += (x Aᵀ) B of many adapters, a shrink and an expand launch per projection
group.

`lora.py` says what is computed. Work comes in chunks: up to `rows` neighbouring rows of one adapter. Kernels
find an adapter through the device pool's table alone, so a CUDA graph stays valid while adapters come and go:
only the chunks, a small tensor, are written anew for a step.

* **Shrink**, h = x Aᵀ. The A's of a group lie side by side in a block, so the modules of a group are one
  matrix of Σ rank rows and x is read once for all of them. A tile is (chunk, `ranks` rows of that matrix, one
  of `splits` parts of the input); how many there are follows from the ranks in the table: each program adds
  up the chunks' tiles and takes every n-th, so ranks 8 and 512 lie side by side without padding and without
  idle programs. Partial sums are fp32, one plane a split; no atomics, so results do not depend on the order
  of programs.
* **Expand**, y += h B. A program is (chunk, `columns` columns of one module); it adds up the splits, goes
  over the adapter's own rank, and reads and writes its part of y once. h is rounded to the weights' dtype, as
  tensor cores want it. On Hopper and later it is launched early, while the shrink runs, and waits for it.

Each form is a choice of tiles (`TILES` of `gpu_plan.py`), the products of all but `bgmv` run on tensor cores:

| form | a chunk | weights are read | for |
|---|---|---|---|
| `sgmv` | 64 rows | once per 64 rows | prefill, and steps that mix prefill and decode |
| `mbgmv` | 16 rows | once per adapter and 16 rows | decode; cost goes with Σ rank |
| `bgmv` | 1 row | once per row, padded to the largest rank | decode; cost goes with rows · max rank |

What a decode step must read beyond the base model: the blocks of its distinct adapters, once. A tile of 16
ranks and a quarter of 4,096 inputs is 32 KiB: 8 distinct adapters of rank 16 on q, k, v are 96 tiles, 32 of
rank 64 are 1,536, for 132 multiprocessors. A row's result does not depend on the other rows of its form's
launch.

Checked with Triton's interpreter and compiled for compute capability 8.0 to 12.0; not yet run on a GPU: the
tiles are first guesses, to be tuned by measurement.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.gpu_bgmv import expand_rows, shrink_rows
from toppings.ops.gpu_launch import (
    ALIGNMENT_BYTES,
    check_aligned,
    chunk_room,
    column_tiles,
    columns_of,
    dot_options,
    early_options,
    kernel,
    num_multiprocessors,
)
from toppings.ops.gpu_plan import RANK_ROOM, LoraBatch
from toppings.ops.lora import LoraSegments

_PROGRAMS_PER_MULTIPROCESSOR = 8


@kernel(
    do_not_specialize=["num_chunks", "places_stride", "h_stride", "h_split_stride"],
    do_not_specialize_on_alignment=["places"],
)
def _shrink_kernel(  # type: ignore[no-untyped-def]
    h,
    x,
    arena,
    places,
    chunks,
    num_chunks,
    places_stride,
    x_stride,
    num_in,
    h_stride,
    h_split_stride,
    NUM_MODULES: tl.constexpr,
    MANY_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    h_stride = tl.multiple_of(h_stride, RANK_ROOM)
    h_split_stride = tl.multiple_of(h_split_stride, RANK_ROOM)
    chunk_ids = tl.arange(0, MANY_CHUNKS)
    slots = tl.load(chunks + chunk_ids * 3 + 2, mask=chunk_ids < num_chunks, other=-1)
    total_ranks = tl.zeros([MANY_CHUNKS], tl.int32)
    for j in tl.static_range(NUM_MODULES):
        rank_places = places + slots.to(tl.int64) * places_stride + j * 3 + 2
        total_ranks += tl.load(rank_places, mask=slots >= 0, other=0).to(tl.int32)
    ends = tl.cumsum((total_ranks + RANKS - 1) // RANKS, axis=0)
    num_tiles = tl.max(ends, axis=0)
    part = (num_in + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    for item in range(tl.program_id(0), num_tiles * SPLITS, tl.num_programs(0)):
        tile = item // SPLITS
        split = item % SPLITS
        chunk = tl.sum((ends <= tile).to(tl.int32), axis=0)
        first = (tile - tl.max(tl.where(ends <= tile, ends, 0), axis=0)) * RANKS
        start = tl.load(chunks + chunk * 3)
        stop = tl.load(chunks + chunk * 3 + 1)
        place = places + tl.load(chunks + chunk * 3 + 2).to(tl.int64) * places_stride
        total_rank = tl.zeros([], tl.int32)
        a_start = tl.zeros([], tl.int64)
        for j in tl.static_range(NUM_MODULES):  # the first targeted module's A begins the group's
            rank = tl.load(place + j * 3 + 2).to(tl.int32)
            a_start = tl.where((total_rank == 0) & (rank > 0), tl.load(place + j * 3), a_start)
            total_rank += rank
        a_start = tl.multiple_of(a_start, ALIGNMENT)
        rows = start + tl.arange(0, ROWS)
        ranks = first + tl.arange(0, RANKS)
        depth = tl.arange(0, DEPTH)
        x_rows = x + rows.to(tl.int64)[:, None] * x_stride
        a_rows = arena + a_start + ranks.to(tl.int64)[:, None] * num_in
        total = tl.zeros([ROWS, RANKS], tl.float32)
        for k in range(split * part, tl.minimum((split + 1) * part, num_in), DEPTH):
            inputs = k + depth[None, :]
            x_tile = tl.load(x_rows + inputs, mask=(rows < stop)[:, None] & (inputs < num_in), other=0.0)
            a_tile = tl.load(
                a_rows + inputs, mask=(ranks < total_rank)[:, None] & (inputs < num_in), other=0.0
            )
            total = tl.dot(x_tile.to(OPERAND), tl.trans(a_tile).to(OPERAND), total, input_precision=PRECISION)
        target = h + split * h_split_stride + rows[:, None] * h_stride + ranks[None, :]
        tl.store(target, total, mask=(rows < stop)[:, None] & (ranks < total_rank)[None, :])


@kernel(
    do_not_specialize=["places_stride", "h_stride", "h_split_stride"],
    do_not_specialize_on_alignment=["places"],
)
def _expand_kernel(  # type: ignore[no-untyped-def]
    y,
    h,
    arena,
    places,
    chunks,
    places_stride,
    y_stride,
    h_stride,
    h_split_stride,
    end_0,
    end_1,
    end_2,
    NUM_MODULES: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RANK_ROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
    h_stride = tl.multiple_of(h_stride, RANK_ROOM)
    h_split_stride = tl.multiple_of(h_split_stride, RANK_ROOM)
    chunk = tl.program_id(1)
    slot = tl.load(chunks + chunk * 3 + 2)
    if slot < 0:
        return
    start = tl.load(chunks + chunk * 3)
    stop = tl.load(chunks + chunk * 3 + 1)
    module, low, high, first = columns_of(tl.program_id(0), end_0, end_1, end_2, COLUMNS)
    place = places + slot.to(tl.int64) * places_stride
    rank = tl.load(place + module * 3 + 2).to(tl.int32)
    if rank == 0:
        return
    h_column = 0
    for j in tl.static_range(NUM_MODULES - 1):
        h_column += tl.where(j < module, tl.load(place + j * 3 + 2).to(tl.int32), 0)
    b_start = tl.multiple_of(tl.load(place + module * 3 + 1), ALIGNMENT)
    width = tl.multiple_of(high - low, ALIGNMENT)
    first = tl.multiple_of(first, ALIGNMENT)
    low = tl.multiple_of(low, ALIGNMENT)
    rows = start + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    row_mask, column_mask = (rows < stop)[:, None], (columns < high)[None, :]
    h_rows = h + rows[:, None] * h_stride + h_column
    b = arena + b_start + (columns - low)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for r in range(0, rank, RANKS):
        ranks = r + tl.arange(0, RANKS)
        h_mask = row_mask & (ranks < rank)[None, :]
        h_tile = tl.load(h_rows + ranks[None, :], mask=h_mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            h_tile += tl.load(h_rows + split * h_split_stride + ranks[None, :], mask=h_mask, other=0.0)
        b_mask = (ranks < rank)[:, None] & column_mask
        b_tile = tl.load(b + ranks.to(tl.int64)[:, None] * width, mask=b_mask, other=0.0)
        total = tl.dot(
            h_tile.to(b_tile.dtype).to(OPERAND), b_tile.to(OPERAND), total, input_precision=PRECISION
        )
    target = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    total += tl.load(target, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=row_mask & column_mask)


def add_lora(
    y: Tensor, x: Tensor, arena: Tensor, places: Tensor, out_offsets: Sequence[int], segments: LoraSegments
) -> None:
    """`lora.add_lora_` for one group. places: int64 [slots, modules or more, 3], the layer's part of the
    table from the group's first module on."""
    batch = segments.batches.get(x.device)
    if batch is None:
        batch = segments.batches[x.device] = LoraBatch.build(segments, x.device)
    if not len(batch.chunks) or not batch.max_rank:
        return
    if batch.form == "bgmv":
        expand_rows(
            y, shrink_rows(x, arena, places, len(out_offsets), batch), arena, places, out_offsets, batch
        )
    else:
        expand(y, shrink(x, arena, places, len(out_offsets), batch), arena, places, out_offsets, batch)


def shrink(x: Tensor, arena: Tensor, places: Tensor, num_modules: int, batch: LoraBatch) -> Tensor:
    """x Aᵀ of every module of the group, fp32 [splits, T, modules · rank room]: a row's parts stand one
    after another as wide as its adapter's ranks, what follows is not written."""
    tiles, (num_rows, num_in) = batch.tiles(x.dtype), x.shape
    check_aligned(arena.dtype, num_in)
    assert x.stride(1) == 1
    assert arena.dtype == x.dtype
    splits, num_chunks = tiles.splits(num_in), len(batch.chunks)
    h = torch.empty(splits, num_rows, num_modules * batch.rank_room, dtype=torch.float32, device=x.device)
    most_tiles = num_chunks * triton.cdiv(num_modules * batch.max_rank, tiles.ranks) * splits
    num_programs = min(most_tiles, _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(x.device))
    _shrink_kernel(
        (num_programs, 1, 1),
        h,
        x,
        arena,
        places,
        batch.chunks,
        num_chunks,
        places.stride(0),
        x.stride(0),
        num_in,
        h.stride(1),
        h.stride(0),
        NUM_MODULES=num_modules,
        MANY_CHUNKS=chunk_room(num_chunks),
        ROWS=tiles.rows,
        RANKS=tiles.ranks,
        DEPTH=tiles.depth,
        SPLITS=splits,
        ALIGNMENT=ALIGNMENT_BYTES // arena.itemsize,
        RANK_ROOM=RANK_ROOM,
        IS_EARLY=bool(early_options(x.device)),
        **dot_options(x.dtype),
        num_warps=tiles.shrink_warps,
        num_stages=tiles.stages,
    )
    return h


def expand(
    y: Tensor, h: Tensor, arena: Tensor, places: Tensor, out_offsets: Sequence[int], batch: LoraBatch
) -> None:
    """y[rows] += h B for every module of the group; h as `shrink` returns it."""
    tiles, early = batch.tiles(y.dtype), early_options(y.device)
    grid, ends = column_tiles(y, out_offsets, tiles.columns)
    check_aligned(arena.dtype, *ends)
    _expand_kernel(
        (grid, len(batch.chunks), 1),
        y,
        h,
        arena,
        places,
        batch.chunks,
        places.stride(0),
        y.stride(0),
        h.stride(1),
        h.stride(0),
        *ends,
        NUM_MODULES=len(out_offsets),
        ROWS=tiles.rows,
        RANKS=tiles.expand_ranks,
        COLUMNS=tiles.columns,
        SPLITS=h.shape[0],
        ALIGNMENT=ALIGNMENT_BYTES // arena.itemsize,
        RANK_ROOM=RANK_ROOM,
        IS_EARLY=bool(early),
        **early,
        **dot_options(y.dtype),
        num_warps=tiles.expand_warps,
        num_stages=tiles.expand_stages,
    )
