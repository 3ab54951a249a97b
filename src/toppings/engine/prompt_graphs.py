"""Steps with prompts, captured for a few numbers of rows: on a GPU, a short prompt is one launch, too.

As `graphs.py`, whose inputs' ways these are, but for any mix of decodes and of prompts, whole or in chunks. A
step is padded with rows whose keys and values go to a page that no sequence owns; sequences, tiles of queries
and chunks of adapters' rows are padded with empty ones. Decodes are the first sequences: the decode kernel
is launched for as many as may run, and finds no keys for the others, whose rows the prompts' kernel then
writes. Steps of more rows than `MAX_ROWS` take the device longer than the host, and are queued operator by
operator.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.core import BatchItem
from toppings.engine.device_lora import DeviceLora
from toppings.engine.graphs import GROUP_SETS, Graph, GraphBackend, GraphSpec
from toppings.engine.pages import pages_for
from toppings.engine.staging import Array, Staging, packed_bytes, unpack
from toppings.engine.step_inputs import Pending, StepRows
from toppings.model.decoder import Decoder
from toppings.ops.attention import AttentionMetadata, KVCache
from toppings.ops.gpu_plan import QUERIES, TILES, AttentionTiles, LoraBatch, lora_chunks, prefill_tiles
from toppings.ops.lora import MAX_RANK, LoraForm, LoraSegments

MAX_ROWS = 512
_SIZES = (64, 128, 256, MAX_ROWS)
_FORM: LoraForm = "sgmv"


def row_counts(max_num_seqs: int, max_num_tokens: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for; none is below the number of sequences that may run."""
    return tuple(size for size in _SIZES if max_num_seqs <= size <= max(max_num_tokens, _SIZES[0]))


class PromptGraphs:
    """To be made as `DecodeGraphs`. `max_num_tokens`: of one step."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        pool: DevicePool,
        spec: GraphSpec,
        staging: Staging,
        backend: GraphBackend,
        *,
        max_num_tokens: int,
    ) -> None:
        self._decoder, self._cache, self._pool, self._spec = decoder, cache, pool, spec
        self._staging = staging
        self._num_pages = pages_for(spec.max_context, cache.page_size)
        self._sizes = row_counts(spec.max_num_seqs, max_num_tokens)
        self.num_replays = 0
        if not self._sizes:
            return
        device = decoder.device
        largest = self._arrays([], None, self._sizes[-1])
        self._inputs = torch.empty(packed_bytes(largest), dtype=torch.uint8, device=device)
        shape = (spec.max_num_seqs, decoder.config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._graphs = {
            (size, groups): self._capture(size, groups, backend)
            for size in reversed(self._sizes)
            for groups in GROUP_SETS
        }

    def can_run(self, items: Sequence[BatchItem]) -> bool:
        """No prompt of theirs is to be read beside what is drawn."""
        num_rows = sum(item.num_tokens for item in items)
        is_small = bool(self._sizes) and num_rows <= self._sizes[-1] and len(items) <= self._spec.max_num_seqs
        return is_small and not any(item.request.sampling.reads_prompt for item in items)

    def run(
        self, items: Sequence[BatchItem], segments: LoraSegments | None, pending: Pending | None = None
    ) -> Tensor:
        """Logits of the items that are drawn from, fp32 [drawn, vocab], until the next run. No adapter of
        theirs is loading."""
        num_rows = sum(item.num_tokens for item in items)
        size = next(size for size in self._sizes if size >= num_rows)
        groups = frozenset() if segments is None else self._pool.groups_of(segments.slots)
        covering = next(captured for captured in GROUP_SETS if groups <= captured)
        arrays = self._arrays(items, segments, size, pending)
        self._staging.copy(arrays, self._inputs)
        if pending is not None:
            token_ids, *_, places = unpack(self._inputs, arrays)
            pending.put_into(token_ids, places[:, : pending.places.shape[1]])
        self._graphs[size, covering].replay()
        self.num_replays += 1
        return self._logits[: sum(item.needs_sample for item in items)]

    def _arrays(
        self,
        items: Sequence[BatchItem],
        segments: LoraSegments | None,
        size: int,
        pending: Pending | None = None,
    ) -> tuple[Array, ...]:
        """`size` rows' token ids, positions and cache rows; of as many sequences as may run, the decodes'
        context lengths, page tables and rows to draw from; tiles of queries, chunks of adapters' rows and
        places of pending tokens."""
        num_seqs, scratch = self._spec.max_num_seqs, self._spec.scratch_page
        token_ids, positions = np.zeros((2, size), np.int64)
        slots = np.full(size, scratch * self._cache.page_size)
        context_lens = np.zeros(num_seqs, np.int32)
        page_tables = np.full((num_seqs, self._num_pages), scratch, np.int32)
        drawn_rows = np.zeros(num_seqs, np.int64)
        tiles = np.zeros((size // QUERIES + num_seqs, 4), np.int32)
        chunks = np.tile(np.array([0, 0, -1], np.int32), (size // TILES[_FORM].rows + num_seqs, 1))
        places = np.zeros((2, num_seqs), np.int64)
        if items:
            rows = StepRows.of(items, self._cache.page_size)
            num, num_decodes = len(rows.token_ids), sum(item.is_decode for item in items)
            token_ids[:num], positions[:num], slots[:num] = rows.token_ids, rows.positions, rows.slot_mapping
            context_lens[:num_decodes] = rows.context_lens[:num_decodes]
            page_tables[: len(items), : rows.page_tables.shape[1]] = rows.page_tables
            ends = accumulate(item.num_tokens for item in items)
            drawn = [end - 1 for end, item in zip(ends, items, strict=True) if item.needs_sample]
            drawn_rows[: len(drawn)] = drawn
            own = prefill_tiles(num_decodes, rows.query_indptr, rows.context_lens)
            tiles[: len(own)] = own
        if segments is not None:
            own = lora_chunks(segments, _FORM)
            chunks[: len(own)] = own
        if pending is not None:
            places[:, : pending.places.shape[1]] = pending.places
        return token_ids, positions, slots, context_lens, page_tables, drawn_rows, tiles, chunks, places

    def _capture(self, size: int, groups: frozenset[str], backend: GraphBackend) -> Graph:
        arrays = self._arrays([], None, size)
        self._staging.copy(arrays, self._inputs)
        token_ids, positions, slots, context_lens, page_tables, drawn_rows, tiles, chunks, _ = unpack(
            self._inputs, arrays
        )
        num_seqs = self._spec.max_num_seqs
        brought = AttentionTiles(context_lens, tiles, context_lens[:0], 0, False, self._spec.max_context)
        indptr = [*range(num_seqs), size]  # the lists say nothing: kernels read what was brought
        meta = AttentionMetadata(
            num_seqs, indptr, [1] * num_seqs, page_tables, slots, self._cache.page_size, brought=brought
        )
        lora = None
        if groups:
            segments = LoraSegments([0, size], [-1])
            segments.batches[chunks.device] = LoraBatch(chunks, _FORM, MAX_RANK)
            lora = DeviceLora(self._pool, segments, self._spec.out_offsets, groups)

        def run() -> None:
            forward = self._decoder.forward
            self._logits.copy_(forward(token_ids, positions, self._cache, meta, drawn_rows, lora))

        return backend.capture(run)
