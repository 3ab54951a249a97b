"""A step's inputs: what the model, the attention and the adapters read of a batch, in host memory and on the
device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toppings.core import BatchItem
from toppings.engine.staging import Array, Staging
from toppings.ops.attention import AttentionMetadata
from toppings.ops.gpu_plan import AttentionTiles, LoraBatch, attention_arrays, lora_chunks
from toppings.ops.lora import LoraForm, LoraSegments

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """In host memory. `token_ids`, `positions`, `slot_mapping`: int64 [T]; `page_tables`: int32 [S, pages];
    `context_lens` [S] and `query_indptr` [S + 1] as in `AttentionMetadata`."""

    token_ids: Longs
    positions: Longs
    slot_mapping: Longs
    page_tables: npt.NDArray[np.int32]
    context_lens: list[int]
    query_indptr: list[int]

    @classmethod
    def of(cls, items: Sequence[BatchItem], page_size: int, num_pages: int = 0) -> "StepRows":
        """`num_pages`: columns of the page tables, by default as many as the longest needs."""
        tables = [item.request.page_table for item in items]
        counts = np.array([item.num_tokens for item in items])
        starts = np.array([item.request.num_computed_tokens for item in items])
        if any(item.draft for item in items):
            tables, starts, counts = _with_drafts(items, tables, starts, counts)
        page_tables = np.zeros((len(tables), num_pages or max(map(len, tables))), np.int32)
        for row, table in zip(page_tables, tables, strict=True):
            row[: len(table)] = table
        query_indptr = [0, *accumulate(counts.tolist())]
        sequences = np.repeat(np.arange(len(tables)), counts)
        positions = np.arange(query_indptr[-1]) + np.repeat(starts - query_indptr[:-1], counts)
        pages = page_tables[sequences, positions // page_size].astype(np.int64)
        return cls(
            token_ids=np.array(list(chain.from_iterable(map(_token_ids, items))), np.int64),
            positions=positions,
            slot_mapping=pages * page_size + positions % page_size,
            page_tables=page_tables,
            context_lens=(starts + counts).tolist(),
            query_indptr=query_indptr,
        )


@dataclass(frozen=True, slots=True)
class StepInputs:
    """On the device. `token_ids`, `positions`: int64 [T]; `logit_rows`: int64 [R], the rows to draw from."""

    token_ids: Tensor
    positions: Tensor
    logit_rows: Tensor
    meta: AttentionMetadata


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens of this step that the step before is still drawing: `drawn`, int64 [R], on the device, in the
    order of its stream. `places`: int64 [2, n], (rows of this step, of `drawn`)."""

    drawn: Tensor
    places: Longs

    @classmethod
    def of(
        cls, items: Sequence[BatchItem], drawn_items: Sequence[BatchItem], drawn: Tensor
    ) -> "Pending | None":
        """None where all of the items' tokens are known. `drawn_items`: whose tokens `drawn` are."""
        order = {id(item.request): i for i, item in enumerate(drawn_items)}
        last_rows = accumulate(item.num_tokens for item in items)
        places = [
            (end - 1, order[id(item.request)])
            for item, end in zip(items, last_rows, strict=True)
            if item.request.num_pending_tokens and item.needs_sample
        ]
        return cls(drawn, np.array(places, np.int64).T) if places else None

    def put_into(self, token_ids: Tensor, places: Tensor) -> None:
        """`places`: this object's, on the device."""
        rows, sources = places
        token_ids.index_copy_(0, rows, self.drawn.index_select(0, sources))


class InputBuilder:
    """Without `staging` the device is the host itself."""

    def __init__(self, page_size: int, staging: Staging | None) -> None:
        self._page_size = page_size
        self._staging = staging

    def build(
        self,
        items: Sequence[BatchItem],
        logit_rows: Sequence[int],
        segments: LoraSegments | None,
        pending: Pending | None = None,
        minus: LoraSegments | None = None,
    ) -> StepInputs:
        """What kernels read of `segments` and `minus` is brought along with the rest."""
        rows = StepRows.of(items, self._page_size)
        meta = AttentionMetadata(
            num_decodes=sum(item.num_rows for item in items if item.is_decode),
            query_indptr=rows.query_indptr,
            context_lens=rows.context_lens,
            page_tables=torch.from_numpy(rows.page_tables),
            slot_mapping=torch.from_numpy(rows.slot_mapping),
            page_size=self._page_size,
        )
        model_inputs: list[Array] = [rows.token_ids, rows.positions, np.array(logit_rows, np.int64)]
        if self._staging is None:
            token_ids, positions, row_ids = map(torch.from_numpy, model_inputs)
            if pending is not None:
                pending.put_into(token_ids, torch.from_numpy(pending.places))
            return StepInputs(token_ids, positions, row_ids, meta)
        model_inputs.append(_NO_PLACES if pending is None else pending.places)
        arrays = [*model_inputs, rows.slot_mapping, rows.page_tables, *attention_arrays(meta)]
        plans = [each for each in (segments, minus) if each is not None]
        # Whoever decodes is served in the same form alone and in any company, as in a graph.
        forms = [each.decode_form if meta.num_decodes == len(items) else each.form for each in plans]
        arrays += [lora_chunks(each, form) for each, form in zip(plans, forms, strict=True)]
        token_ids, positions, row_ids, places, slots, tables, *brought = self._staging.bring(arrays)
        if pending is not None:
            pending.put_into(token_ids, places)
        for each, form in zip(plans[::-1], forms[::-1], strict=True):
            each.batches[self._staging.device] = LoraBatch(brought.pop(), form, each.max_rank)
        meta = replace(meta, slot_mapping=slots, page_tables=tables, brought=AttentionTiles.of(meta, brought))
        return StepInputs(token_ids, positions, row_ids, meta)


def lora_segments(
    items: Sequence[BatchItem], slots: dict[int, int], max_rank: int, decode_form: LoraForm
) -> LoraSegments:
    """Neighbouring rows of one adapter become one segment; rows of the base model get slot -1. `slots`: by
    adapter id."""
    runs: list[tuple[int, int]] = []
    for item in items:
        adapter_id = item.adapter_id
        if adapter_id is None:
            runs.append((-1, item.num_rows))
            continue
        num_base = item.num_base_tokens if item.request.adapter_start else 0
        if num_base:
            runs.append((-1, num_base))
        runs.append((slots[adapter_id], item.num_rows - num_base))
    return joined_segments(runs, max_rank, decode_form)


def joined_segments(runs: Sequence[tuple[int, int]], max_rank: int, decode_form: LoraForm) -> LoraSegments:
    """`runs`: (slot, rows), of which neighbours with one slot are one segment."""
    indptr: list[int] = [0]
    slots: list[int] = []
    for slot, num_rows in runs:
        end = indptr[-1] + num_rows
        if slots and slots[-1] == slot:
            indptr[-1] = end
        else:
            slots.append(slot)
            indptr.append(end)
    return LoraSegments(indptr, slots, max_rank, decode_form)


_NO_PLACES = np.empty((2, 0), np.int64)


def _with_drafts(
    items: Sequence[BatchItem], tables: list[list[int]], starts: Longs, counts: Longs
) -> tuple[list[list[int]], Longs, Longs]:
    """To attention each token of a draft is a sequence of its own on the same pages, so that it is computed
    as if it had been drawn: with them, the sequences' pages, first places and lengths."""
    nums = [1 + len(item.draft) for item in items]
    index = np.repeat(np.arange(len(items)), nums)
    place = np.concatenate([np.arange(num) for num in nums])  # in the draft, 0 is before it
    starts = starts[index] + np.where(place > 0, counts[index] + place - 1, 0)
    return [tables[i] for i in index], starts, np.where(place > 0, 1, counts[index])


def _token_ids(item: BatchItem) -> list[int]:
    """0 stands for one that is being drawn."""
    start = item.request.num_computed_tokens
    known = item.request.token_ids(start, start + item.num_tokens)
    return [*known, *[0] * (item.num_tokens - len(known)), *item.draft]
