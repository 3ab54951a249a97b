"""Steps with prompts, captured for a few numbers of rows: on a GPU, a short prompt is one launch, too.

As graphs.py says, for any mix of decodes and of prompts, whole or in chunks. Sequences, tiles of queries and
chunks of adapters' rows are padded with empty ones. Decodes are the first sequences: the decode kernel
is launched for as many as may run, and finds no keys for the others, whose rows the prompts' kernel then
writes. Steps of more rows than `MAX_ROWS` take the device longer than the host, and are queued operator by
operator.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from toppings.core import BatchItem
from toppings.engine.graphs import GraphSpec, Inputs, StepGraphs
from toppings.engine.staging import Array
from toppings.engine.step_inputs import StepRows
from toppings.ops.attention import AttentionMetadata
from toppings.ops.gpu_plan import QUERIES, TILES, AttentionTiles, prefill_tiles
from toppings.ops.lora import LoraForm, LoraSegments

MAX_ROWS = 512
_SIZES = (64, 128, 256, MAX_ROWS)


def row_counts(max_num_seqs: int, max_num_tokens: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for; none is below the number of sequences that may run."""
    return tuple(size for size in _SIZES if max_num_seqs <= size <= max(max_num_tokens, _SIZES[0]))


class PromptGraphs(StepGraphs):
    """`StepGraphs` of any few rows."""

    _form: LoraForm = "sgmv"

    @staticmethod
    def sizes_of(spec: GraphSpec) -> tuple[int, ...]:
        return row_counts(spec.max_num_seqs, spec.max_num_tokens)

    def can_run(self, items: Sequence[BatchItem]) -> bool:
        """No prompt of theirs is to be read beside what is drawn, and none has a draft."""
        num_rows = sum(item.num_tokens for item in items)
        is_small = bool(self._sizes) and num_rows <= self._sizes[-1] and len(items) <= self._spec.max_num_seqs
        return is_small and not any(item.draft or item.request.sampling.reads_prompt for item in items)

    def _room(self, size: int) -> tuple[int, int]:
        num_seqs = self._spec.max_num_seqs
        return num_seqs, size // TILES[self._form].rows + num_seqs

    def _own_inputs(self, items: Sequence[BatchItem], rows: StepRows | None, size: int) -> tuple[Array, ...]:
        """Rows to draw from [sequences], and tiles of queries [tiles, 4]."""
        num_seqs = self._spec.max_num_seqs
        drawn_rows = np.zeros(num_seqs, np.int64)
        tiles = np.zeros((size // QUERIES + num_seqs, 4), np.int32)
        if rows is not None:
            ends = accumulate(item.num_tokens for item in items)
            drawn = [end - 1 for end, item in zip(ends, items, strict=True) if item.needs_sample]
            drawn_rows[: len(drawn)] = drawn
            num_decodes = sum(item.is_decode for item in items)
            own = prefill_tiles(num_decodes, rows.query_indptr, rows.context_lens)
            tiles[: len(own)] = own
        return drawn_rows, tiles

    def _plan(self, inputs: Inputs, size: int) -> tuple[AttentionMetadata, LoraSegments, Tensor]:
        num_seqs = self._spec.max_num_seqs
        drawn_rows, tiles = inputs.own
        lens, decodes = inputs.context_lens, (inputs.splits, inputs.split_indptr)
        brought = AttentionTiles(lens, tiles, lens[:0], *decodes, 0, False, self._spec.max_context)
        indptr = [*range(num_seqs), size]  # the lists say nothing: kernels read what was brought
        page_size = self._cache.page_size
        meta = AttentionMetadata(
            num_seqs, indptr, [1] * num_seqs, inputs.page_tables, inputs.slots, page_size, brought=brought
        )
        return meta, LoraSegments([0, size], [-1]), drawn_rows
