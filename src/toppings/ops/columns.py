"""The base model's output, column by column, as each row's adapter says: y += gain ∘ y + offset."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toppings.ops.dispatch import gpu_kernels, kernels
from toppings.ops.lora import LoraSegments


def adjust_columns_(
    y: Tensor, *, arena: Tensor, places: Tensor, out_offsets: Sequence[int], segments: LoraSegments
) -> None:
    """y_j += gain_j ∘ y_j + offset_j, y_j being y[rows, columns of j], for every segment's adapter and every
    module j of a projection group; in fp32 and rounded once.

    y: [T, Σ out], rows may be strided; `out_offsets`: the first column of each module, the last one reaches
    to the end of y; `arena`: flat, y's dtype; `places`: int64 [slots, modules or more, 2], from the group's
    first module on: (start of gain [out], start of offset [out]) in elements of the arena, 0 for none.
    """
    assert arena.dtype == y.dtype
    if (gpu := gpu_kernels("columns", y)) is not None:
        gpu.adjust_columns(y, arena, places, out_offsets, segments)
        return
    if (fast := kernels("columns", y)) is None:
        adjust_columns_reference_(y, arena=arena, places=places, out_offsets=out_offsets, segments=segments)
        return
    assert places.dtype == torch.int64
    assert y.stride(1) == 1
    assert places.stride()[1:] == (2, 1)
    if len(segments.blocks):
        columns = torch.tensor((*out_offsets, y.shape[1]), dtype=torch.int64)
        num_modules = len(out_offsets)
        fast.adjust_columns(
            y, len(segments.blocks) * num_modules, y.numel(),
            y, arena, places, places.stride(0), segments.blocks, columns, num_modules, y.stride(0),
        )  # fmt: skip


def adjust_columns_reference_(
    y: Tensor, *, arena: Tensor, places: Tensor, out_offsets: Sequence[int], segments: LoraSegments
) -> None:
    """`adjust_columns_` by torch's operators."""
    for start, stop, slot in segments.adapted:
        for module, (low, high) in enumerate(zip(out_offsets, (*out_offsets[1:], y.shape[1]), strict=True)):
            gain, offset = (
                arena[place : place + high - low] if place else None
                for place in places[slot, module].tolist()
            )
            adjust_rows_(y[start:stop, low:high], gain, offset)


def adjust_rows_(y: Tensor, gain: Tensor | None, offset: Tensor | None) -> None:
    """y += gain ∘ y + offset in fp32, rounded once: y [n, out], gain and offset [out] or None."""
    if gain is None and offset is None:
        return
    wide = y.float()
    if gain is not None:
        wide = wide + wide * gain.float()
    if offset is not None:
        wide = wide + offset.float()
    y.copy_(wide)
