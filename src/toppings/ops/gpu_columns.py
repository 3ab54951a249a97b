"""Triton kernel for columns' gains and offsets; `columns.py` says what it computes.

A program is (chunk, `COLUMNS` columns of one module), as in the expand kernel of `gpu_lora.py`: gain and
offset are read once for all of the chunk's rows, and y is read and written once. Adapters are found through
the pool's table alone. Checked with Triton's interpreter and compiled; not yet run on a GPU.
"""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from toppings.ops.gpu_launch import ALIGNMENT_BYTES, check_aligned, column_tiles, columns_of, kernel
from toppings.ops.gpu_plan import TILES, LoraBatch
from toppings.ops.lora import LoraSegments

_COLUMNS = 128
_NUM_WARPS = 4


@kernel(do_not_specialize=["places_stride"], do_not_specialize_on_alignment=["places"])
def _adjust_kernel(  # type: ignore[no-untyped-def]
    y,
    arena,
    places,
    chunks,
    places_stride,
    y_stride,
    end_0,
    end_1,
    end_2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    chunk = tl.program_id(1)
    slot = tl.load(chunks + chunk * 3 + 2)
    if slot < 0:
        return
    module, low, high, first = columns_of(tl.program_id(0), end_0, end_1, end_2, COLUMNS)
    place = places + slot.to(tl.int64) * places_stride + module * 2
    gain = tl.load(place)
    offset = tl.load(place + 1)
    if gain + offset == 0:
        return
    gain = tl.multiple_of(gain, ALIGNMENT)
    offset = tl.multiple_of(offset, ALIGNMENT)
    columns = tl.multiple_of(first, ALIGNMENT) + tl.arange(0, COLUMNS)
    low = tl.multiple_of(low, ALIGNMENT)
    mask = columns < high
    gains = tl.load(arena + gain + columns - low, mask=mask & (gain > 0), other=0.0).to(tl.float32)
    offsets = tl.load(arena + offset + columns - low, mask=mask & (offset > 0), other=0.0).to(tl.float32)
    rows = tl.load(chunks + chunk * 3) + tl.arange(0, ROWS)
    row_mask = (rows < tl.load(chunks + chunk * 3 + 1))[:, None] & mask[None, :]
    target = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    values = tl.load(target, mask=row_mask, other=0.0).to(tl.float32)
    values += values * gains[None, :] + offsets[None, :]
    tl.store(target, values.to(y.dtype.element_ty), mask=row_mask)


def adjust_columns(
    y: Tensor, arena: Tensor, places: Tensor, out_offsets: Sequence[int], segments: LoraSegments
) -> None:
    """`columns.adjust_columns_` for one group."""
    batch = segments.batches.get(y.device)
    if batch is None:
        batch = segments.batches[y.device] = LoraBatch.build(segments, y.device)
    if not len(batch.chunks):
        return
    grid, ends = column_tiles(y, out_offsets, _COLUMNS)
    check_aligned(arena.dtype, *ends)
    _adjust_kernel(
        (grid, len(batch.chunks), 1),
        y,
        arena,
        places,
        batch.chunks,
        places.stride(0),
        y.stride(0),
        *ends,
        ROWS=TILES[batch.form].rows,
        COLUMNS=_COLUMNS,
        ALIGNMENT=ALIGNMENT_BYTES // arena.itemsize,
        num_warps=_NUM_WARPS,
    )
