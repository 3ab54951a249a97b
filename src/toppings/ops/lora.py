"""Low-rank updates of many adapters in one batch: y += (x Aᵀ) B, each row with its own adapter's A and B."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from toppings.ops.dispatch import bf16_kernels, gpu_kernels, has_matrix_unit, kernels
from toppings.ops.products import is_widened

if TYPE_CHECKING:
    from toppings.ops.gpu_plan import LoraBatch

LoraForm = Literal["sgmv", "mbgmv", "bgmv"]
"""How the GPU's kernels share out a step's rows; `gpu_lora.py` compares them."""

DEFAULT_DECODE_FORM: LoraForm = "mbgmv"

MAX_RANK = 512
"""Adapters' ranks are at most this where nobody knows better."""

_MAX_DECODE_ROWS = 16

MAX_KERNEL_ROWS = 12
"""Segments up to this long go to the kernel, which needs no call per adapter; longer ones to matrix
products."""

_TYPICAL_RANK = 16
_CPU = torch.device("cpu")

_BLOCK_ROWS = 16
"""Of a segment, that one task of the bfloat16 kernel takes."""

_MAX_ROWS_BESIDE_MATRIX_UNIT = 64
"""Steps with a longer segment go to torch's products where the CPU has a unit for them."""

_WIDTH_STEP = 32
"""Widths of inputs and outputs that it serves are multiples of this."""


@dataclass(frozen=True)
class LoraSegments:
    """The rows of a step, grouped by adapter: segment s is rows `indptr[s]` to `indptr[s + 1]`, its adapter
    is in device pool slot `slots[s]`; -1 marks rows of the base model, which are skipped. Built once per
    step.

    `max_rank` (of any module) and `decode_form` matter on a GPU alone; `batches` keeps what a device's
    kernels read of the step, once it is there. In a graph that changes from replay to replay, and the lists
    say nothing."""

    indptr: list[int]
    slots: list[int]
    max_rank: int = MAX_RANK
    decode_form: LoraForm = DEFAULT_DECODE_FORM
    batches: "dict[torch.device, LoraBatch]" = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.indptr) == len(self.slots) + 1, (self.indptr, self.slots)

    @property
    def adapted(self) -> list[tuple[int, int, int]]:
        """(start, stop, slot) of each segment that has an adapter and rows."""
        segments = zip(pairwise(self.indptr), self.slots, strict=True)
        return [(start, stop, slot) for (start, stop), slot in segments if slot >= 0 and stop > start]

    @property
    def form(self) -> LoraForm:
        """`decode_form` where every adapter has few rows."""
        return self.decode_form if self.longest <= _MAX_DECODE_ROWS else "sgmv"

    @cached_property
    def longest(self) -> int:
        """Rows of the longest segment that has an adapter."""
        return max((stop - start for start, stop, _ in self.adapted), default=0)

    @cached_property
    def short(self) -> Tensor:
        """int32 [n, 3]: the segments for the CPU's kernel; slot -1: nothing to do."""
        if (batch := self.batches.get(_CPU)) is not None:
            return batch.chunks
        rows = [segment for segment in self.adapted if segment[1] - segment[0] <= MAX_KERNEL_ROWS]
        return torch.tensor(rows, dtype=torch.int32).view(-1, 3)

    @cached_property
    def blocks(self) -> Tensor:
        """int32 [n, 3]: all segments for the bfloat16 kernel, cut into blocks of few rows; as `short`."""
        if (batch := self.batches.get(_CPU)) is not None:
            return batch.chunks
        rows = [
            (first, min(first + _BLOCK_ROWS, stop), slot)
            for start, stop, slot in self.adapted
            for first in range(start, stop, _BLOCK_ROWS)
        ]
        return torch.tensor(rows, dtype=torch.int32).view(-1, 3)

    @cached_property
    def long(self) -> list[tuple[int, int, int]]:
        if _CPU in self.batches:
            return []
        return [segment for segment in self.adapted if segment[1] - segment[0] > MAX_KERNEL_ROWS]


def lora_shrink(x: Tensor, a: Tensor) -> Tensor:
    """x Aᵀ: x [n, in], a [r, in]; summed in fp32 and rounded to x's dtype, or fp32 where the CPU is slow in
    that; [n, r]."""
    if is_widened(x):
        return torch.mm(x.float(), a.float().t())
    if a.shape[0] == 1 and x.dtype == torch.float32:
        # As a matrix-vector product a row's last bits would depend on how many rows there are.
        return torch.mm(x, a.expand(2, -1).t())[:, :1]
    return torch.mm(x, a.t())


def lora_expand(h: Tensor, b: Tensor) -> Tensor:
    """h B: h [n, r], b [r, out] with the scale folded in; [n, out] of h's dtype, or fp32 as `lora_shrink`."""
    return torch.mm(h.float(), b.float()) if is_widened(b) else torch.mm(h, b)


def lora_expand_add_(y: Tensor, h: Tensor, b: Tensor) -> None:
    """y += h B: y [n, out] (rows may be strided), h [n, r], b [r, out].

    In fp32 the product is complete before y is added, so that one computed elsewhere and added gives the same
    bits.
    """
    if y.dtype == torch.float32 or is_widened(y):
        y += lora_expand(h, b)
    else:
        y.addmm_(h, b)


def add_lora_(
    y: Tensor,
    x: Tensor,
    *,
    arena: Tensor,
    table: Tensor,
    layer: int,
    group: Sequence[int],
    out_offsets: Sequence[int],
    segments: LoraSegments,
) -> None:
    """y[rows, columns of j] += (x[rows] A_jᵀ) B_j for every segment's adapter and every module j of
    `group` (neighbouring `core.MODULES` indices, a value of `core.GROUPS`).

    x: [T, in] and y: [T, Σ out], rows may be strided; `out_offsets`: the first column of each module of the
    group, the last one reaches to the end of y; `arena`: flat, x's dtype; `table`: int64 [slots, layers, 7,
    3] of (start of A [r, in], start of B [r, out], rank) in elements of the arena, rank 0 where a module has
    none.

    Sums are fp32. A row's result does not depend on the other rows, except that long segments round the
    shrunk row to x's dtype where the CPU has products of that (where there is a bfloat16 kernel, all do).
    """
    if (gpu := gpu_kernels("lora", x)) is not None:
        gpu.add_lora(y, x, arena, table[:, layer, group[0] :], out_offsets, segments)
        return
    if (bf16 := _bf16_kernels(x, y, out_offsets, segments)) is not None:
        if len(segments.blocks):
            places, limits = table[:, layer, group[0] :], (_BLOCK_ROWS, MAX_RANK)
            _run(bf16, y, x, arena, places, out_offsets, segments.blocks, x.shape[0], *limits)
        return
    fast = kernels("lora", x)
    long = segments.adapted if fast is None else segments.long
    if fast is not None and len(segments.short):
        places = table[:, layer, group[0] :]
        _run(fast, y, x, arena, places, out_offsets, segments.short, len(segments.short))
    for start, stop, slot in long:
        triples = table[slot, layer, list(group)].tolist()
        _add_long(y[start:stop], x[start:stop], arena, triples, out_offsets)


def _bf16_kernels(x: Tensor, y: Tensor, out_offsets: Sequence[int], segments: LoraSegments) -> Any:
    """Those that serve these tensors best, or None. In a graph, whose segments are not in the lists, an
    adapter has few rows."""
    bf16 = bf16_kernels(x)
    if bf16 is None or any(width % _WIDTH_STEP for width in (x.shape[1], y.shape[1], *out_offsets)):
        return None
    return None if has_matrix_unit() and segments.longest > _MAX_ROWS_BESIDE_MATRIX_UNIT else bf16


def _run(
    kernels: Any,
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    places: Tensor,
    out_offsets: Sequence[int],
    segments: Tensor,
    num_rows: int,
    *limits: int,
) -> None:
    """The kernel `add_lora` of a module over `segments`, [n, 3], which have `num_rows` rows."""
    assert arena.dtype == y.dtype == x.dtype
    assert places.dtype == torch.int64
    assert x.stride(1) == y.stride(1) == 1
    assert places.stride()[1:] == (3, 1)
    num_modules, num_in = len(out_offsets), x.shape[1]
    columns = torch.tensor((*out_offsets, y.shape[1]), dtype=torch.int64)
    kernels.add_lora(
        x,
        len(segments) * num_modules,
        num_rows * (num_in + y.shape[1]) * _TYPICAL_RANK,
        y,
        x,
        arena,
        places,
        places.stride(0),
        segments,
        columns,
        num_modules,
        num_in,
        y.stride(0),
        x.stride(0),
        *limits,
    )


def _add_long(
    y: Tensor, x: Tensor, arena: Tensor, places: list[list[int]], out_offsets: Sequence[int]
) -> None:
    num_in, ranks = x.shape[1], [rank for _, _, rank in places]
    if not any(ranks):
        return
    a_start = next(a for a, _, rank in places if rank)
    a = arena[a_start : a_start + sum(ranks) * num_in].view(-1, num_in)  # the group's A lie side by side
    shrunk = lora_shrink(x, a).tensor_split(tuple(accumulate(ranks[:-1])), dim=1)
    for (_, b_start, rank), h, low, high in zip(
        places, shrunk, out_offsets, (*out_offsets[1:], y.shape[1]), strict=True
    ):
        if rank:
            b = arena[b_start : b_start + rank * (high - low)].view(rank, -1)
            lora_expand_add_(y[:, low:high], h, b)


def add_lora_reference_(
    y: Tensor,
    x: Tensor,
    *,
    arena: Tensor,
    table: Tensor,
    layer: int,
    group: Sequence[int],
    out_offsets: Sequence[int],
    segments: LoraSegments,
) -> None:
    """`add_lora_` in fp32, one module at a time, each sum rounded once into y."""
    ends = (*out_offsets[1:], y.shape[1])
    for start, stop, slot in segments.adapted:
        for module, low, high in zip(group, out_offsets, ends, strict=True):
            a_start, b_start, rank = table[slot, layer, module].tolist()
            a = arena[a_start : a_start + rank * x.shape[1]].view(rank, x.shape[1]).float()
            b = arena[b_start : b_start + rank * (high - low)].view(rank, high - low).float()
            y[start:stop, low:high] += x[start:stop].float() @ a.t() @ b
