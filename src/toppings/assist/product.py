"""One slice of a projection group's low-rank product: how it is asked for, and its computation.

The computation is the device path's own (`ops.lora`), on the block where the host store keeps it. So in fp32
a row's result has the device path's bits, given that its product does not depend on the other rows: which
is why a slice never falls below the length at which `ops.lora` changes its method.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import torch
from torch import Tensor

from toppings.adapters.layout import AdapterLayout
from toppings.core import GROUPS
from toppings.ops.lora import MAX_KERNEL_ROWS, LoraSegments, add_lora_, lora_shrink

MIN_SLICE_ROWS = MAX_KERNEL_ROWS + 1
"""Segments are cut into pieces of at least this; shorter segments stay whole."""


class Form(IntEnum):
    """How much of the product is computed."""

    FULL = 0  # shrink and expand: result [rows, Σ out of the targeted modules]
    SHRINK = 1  # x Aᵀ only: result [rows, Σ rank]


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """Where one group's weights lie: per module of the group its rank (0: not targeted), output size (0 there
    too), and the starts of A [rank, in] and B [rank, out] in elements of the host store's arena."""

    num_in: int
    ranks: tuple[int, ...]
    num_outs: tuple[int, ...]
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]

    @classmethod
    def locate(cls, layout: AdapterLayout, layer: int, group: str, layer_offset: int) -> "GroupWeights":
        """`layer_offset`: start of the layer's block in the arena, in elements."""
        modules, block = GROUPS[group], layout.layers[layer]
        ranks = tuple(block.ranks[m] for m in modules)
        return cls(
            num_in=layout.shapes.sizes[modules[0]][0],
            ranks=ranks,
            num_outs=tuple(layout.shapes.sizes[m][1] if block.ranks[m] else 0 for m in modules),
            a_offsets=tuple(layer_offset + block.a_offsets[m] for m in modules),
            b_offsets=tuple(layer_offset + block.b_offsets[m] for m in modules),
        )

    def num_columns(self, form: Form) -> int:
        return sum(self.num_outs) if form is Form.FULL else sum(self.ranks)


@dataclass(frozen=True, slots=True)
class Slice:
    """`num_rows` rows of x at byte `input_offset` of a channel's buffer; the result goes to
    `output_offset`."""

    form: Form
    num_rows: int
    input_offset: int
    output_offset: int
    weights: GroupWeights

    def to_words(self) -> list[int]:
        w = self.weights
        head = [self.form, self.num_rows, self.input_offset, self.output_offset, w.num_in, len(w.ranks)]
        return [*head, *w.ranks, *w.num_outs, *w.a_offsets, *w.b_offsets]

    @classmethod
    def from_words(cls, words: list[int]) -> "Slice":
        form, num_rows, input_offset, output_offset, num_in, n = words[:6]
        ranks, num_outs, a_offsets, b_offsets = (tuple(words[6 + i * n : 6 + (i + 1) * n]) for i in range(4))
        weights = GroupWeights(num_in, ranks, num_outs, a_offsets, b_offsets)
        return cls(Form(form), num_rows, input_offset, output_offset, weights)


def compute(form: Form, weights: GroupWeights, x: Tensor, out: Tensor, arena: Tensor) -> None:
    """out = (x Aᵀ) B, targeted modules side by side, or x Aᵀ. x [n, in] and out [n, columns] are dense."""
    if form is Form.SHRINK:
        a_start = next(a for a, rank in zip(weights.a_offsets, weights.ranks, strict=True) if rank)
        a = arena[a_start : a_start + sum(weights.ranks) * weights.num_in].view(-1, weights.num_in)
        out.copy_(lora_shrink(x, a))
        return
    places = torch.tensor([weights.a_offsets, weights.b_offsets, weights.ranks]).t().contiguous()
    add_lora_(
        out.zero_(),
        x,
        arena=arena,
        table=places.view(1, 1, -1, 3),
        layer=0,
        group=range(len(weights.ranks)),
        out_offsets=[0, *accumulate(weights.num_outs)][:-1],
        segments=LoraSegments([0, x.shape[0]], [0]),
    )
