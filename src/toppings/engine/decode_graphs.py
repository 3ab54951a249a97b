"""Decode steps of up to as many sequences as may run, replayed from graphs (graphs.py).

Sequences that pad a batch read one key of a page that no sequence owns, so that no row is without any.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from toppings.core import BatchItem
from toppings.engine.graphs import GraphSpec, Inputs, StepGraphs
from toppings.engine.staging import Array
from toppings.engine.step_inputs import StepRows
from toppings.ops.attention import AttentionMetadata
from toppings.ops.gpu_plan import AttentionTiles
from toppings.ops.lora import LoraForm, LoraSegments

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 8


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sizes that graphs are captured for: 1, 2, 4, 8, then multiples of 8, and `max_num_seqs` itself."""
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, max_num_seqs, _SIZE_STEP), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


class DecodeGraphs(StepGraphs):
    """`StepGraphs` of one token a sequence."""

    _padding_context_len = 1

    @staticmethod
    def sizes_of(spec: GraphSpec) -> tuple[int, ...]:
        return batch_sizes(spec.max_num_seqs)

    @property
    def _form(self) -> LoraForm:
        return self._spec.decode_form

    def can_run(self, items: Sequence[BatchItem]) -> bool:
        """Every item is one token that continues a sequence, with no draft behind it, and is drawn from."""
        return len(items) <= self._sizes[-1] and all(
            item.is_decode and item.needs_sample and not item.draft for item in items
        )

    def _room(self, size: int) -> tuple[int, int]:
        return size, size

    def _own_inputs(self, items: Sequence[BatchItem], rows: StepRows | None, size: int) -> tuple[Array, ...]:
        return ()

    def _plan(self, inputs: Inputs, size: int) -> tuple[AttentionMetadata, LoraSegments, Tensor]:
        context_lens = inputs.context_lens
        nothing = torch.empty(0, 4, dtype=torch.int32, device=context_lens.device)
        decodes = (inputs.splits, inputs.split_indptr)
        most = self._spec.max_context
        tiles = AttentionTiles(context_lens, nothing, nothing[:, 0], *decodes, 0, True, most)
        indptr = list(range(size + 1))
        page_size = self._cache.page_size
        meta = AttentionMetadata(
            size, indptr, [1] * size, inputs.page_tables, inputs.slots, page_size, brought=tiles
        )
        return meta, LoraSegments(indptr, [-1] * size), torch.arange(size, device=context_lens.device)
