"""Turns a batch into tensors, runs the model on it and draws the next tokens."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from toppings.adapters.loader import LoadHandle
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LoadingMode
from toppings.assist.coordinator import AssistLora, AssistStats
from toppings.core import Batch, BatchItem, Request, SamplingParams, TokenLogprobs
from toppings.engine.device_lora import DeviceLora
from toppings.engine.pages import pages_for
from toppings.model.decoder import Decoder, LoraContext
from toppings.ops.attention import AttentionMetadata, KVCache
from toppings.ops.lora import LoraSegments
from toppings.ops.sampling import SamplingRow, sample


@dataclass(slots=True)
class StepResult:
    """What a step drew, one entry per item that needed a token, and how long it waited for adapter loads."""

    items: list[BatchItem]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    load_wait_s: float
    copy_ms: float  # what the loads of its adapters copied meanwhile
    assist: AssistStats | None


class StepAssist(Protocol):
    """What computes products of adapters that are still on their way (engine/assist.py)."""

    def step(self, segments: LoraSegments, num_tokens: Mapping[int, int]) -> AssistLora: ...


class ModelRunner:
    """The model, its cache and the adapters on one device. `run` changes no request."""

    def __init__(self, decoder: Decoder, cache: KVCache, adapters: AdapterManager, mode: LoadingMode) -> None:
        self._decoder = decoder
        self._cache = cache
        self._adapters = adapters
        self._mode = mode
        self.assist: StepAssist | None = None  # set once, before the first batch
        self._generators: dict[str, torch.Generator] = {}
        self.out_offsets = decoder.config.group_out_offsets()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """One forward over all items of `batch`, and a token for each item that needs one.

        Raises AdapterLoadError where an adapter's weights could not be brought; the batch may be run again
        without it, for nothing was committed.
        """
        items = batch.items
        sampled = [(row, item) for row, item in zip(_last_rows(items), items) if item.needs_sample]
        loads = self._loads(items)
        copied_ms = -sum(load.copy_ms for load in loads.values())
        with self._lora(items, loads) as lora:
            logits = self._forward(items, [row for row, _ in sampled], lora)
        copied_ms += sum(load.copy_ms for load in loads.values())
        drawn = sample(logits, [self._sampling_row(item.request) for _, item in sampled])
        return StepResult(
            items=[item for _, item in sampled],
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            load_wait_s=lora.wait_s if lora is not None else 0.0,
            copy_ms=copied_ms,
            assist=lora.stats if isinstance(lora, AssistLora) else None,
        )

    @property
    def max_dry_run_tokens(self) -> int:
        return self._cache.k[0].shape[0]

    @torch.inference_mode()
    def dry_run(self, num_tokens: int, lora: LoraContext) -> None:
        """One forward over a prompt of zeros, to be timed; overwrites the first pages of the cache."""
        pages = list(range(pages_for(num_tokens, self._cache.page_size)))
        request = Request("dry-run", [0] * num_tokens, SamplingParams(), page_table=pages)
        self._forward([BatchItem(request, num_tokens)], [num_tokens - 1], lora)

    def _forward(
        self, items: list[BatchItem], logit_rows: list[int], lora: LoraContext | None
    ) -> torch.Tensor:
        return self._decoder.forward(
            torch.tensor([t for item in items for t in _token_ids(item)]),
            torch.from_numpy(np.concatenate([_positions(item) for item in items])),
            self._cache,
            self._attention_metadata(items),
            torch.tensor(logit_rows, dtype=torch.int64),
            lora,
        )

    def forget(self, request: Request) -> None:
        """The request has ended: drop its random generator."""
        self._generators.pop(request.request_id, None)

    def _loads(self, items: list[BatchItem]) -> dict[int, LoadHandle]:
        """By adapter id, the loads under way of the batch's adapters."""
        adapter_ids = {item.request.adapter_id for item in items}
        return {
            a: load for a in adapter_ids if a is not None and (load := self._adapters.load_of(a)) is not None
        }

    def _lora(
        self, items: list[BatchItem], loads: dict[int, LoadHandle]
    ) -> AbstractContextManager[DeviceLora | AssistLora | None]:
        adapter_ids = {item.request.adapter_id for item in items} - {None}
        if not adapter_ids:
            return nullcontext()
        segments = _lora_segments(items, {a: self._adapters.slot_of(a) for a in adapter_ids if a is not None})
        if loads and self.assist is not None:
            return self.assist.step(segments, {a: _num_tokens_of(items, a) for a in loads})
        pool, handles = self._adapters.pool, list(loads.values())
        return nullcontext(DeviceLora(pool, segments, self.out_offsets, handles, self._mode))

    def _attention_metadata(self, items: list[BatchItem]) -> AttentionMetadata:
        tables = [item.request.page_table for item in items]
        page_tables = np.zeros((len(items), max(map(len, tables))), dtype=np.int32)
        for row, table in zip(page_tables, tables):
            row[: len(table)] = table
        page_size = self._cache.page_size
        return AttentionMetadata(
            num_decodes=sum(item.is_decode for item in items),
            query_indptr=_indptr(items),
            context_lens=[item.request.num_computed_tokens + item.num_tokens for item in items],
            page_tables=torch.from_numpy(page_tables),
            slot_mapping=torch.from_numpy(_slot_mapping(items, page_tables, page_size)),
            page_size=page_size,
        )

    def _sampling_row(self, request: Request) -> SamplingRow:
        seed = request.sampling.seed
        if seed is not None and request.request_id not in self._generators:
            self._generators[request.request_id] = torch.Generator().manual_seed(seed)
        return SamplingRow(
            params=request.sampling,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            generator=self._generators.get(request.request_id),
            eos_token_ids=self._decoder.config.eos_token_ids,
        )


def _num_tokens_of(items: list[BatchItem], adapter_id: int) -> int:
    return sum(item.num_tokens for item in items if item.request.adapter_id == adapter_id)


def _token_ids(item: BatchItem) -> list[int]:
    start = item.request.num_computed_tokens
    return item.request.token_ids(start, start + item.num_tokens)


def _positions(item: BatchItem) -> np.ndarray:
    start = item.request.num_computed_tokens
    return np.arange(start, start + item.num_tokens, dtype=np.int64)


def _indptr(items: list[BatchItem]) -> list[int]:
    indptr = [0]
    for item in items:
        indptr.append(indptr[-1] + item.num_tokens)
    return indptr


def _last_rows(items: list[BatchItem]) -> list[int]:
    return [end - 1 for end in _indptr(items)[1:]]


def _slot_mapping(items: list[BatchItem], page_tables: np.ndarray, page_size: int) -> np.ndarray:
    slots = []
    for item, table in zip(items, page_tables):
        positions = _positions(item)
        slots.append(table[positions // page_size].astype(np.int64) * page_size + positions % page_size)
    return np.concatenate(slots)


def _lora_segments(items: list[BatchItem], slots: dict[int, int]) -> LoraSegments:
    """Neighbouring rows of one adapter become one segment; rows of the base model get slot -1."""
    indptr: list[int] = [0]
    segment_slots: list[int] = []
    for item in items:
        adapter_id = item.request.adapter_id
        slot = -1 if adapter_id is None else slots[adapter_id]
        end = indptr[-1] + item.num_tokens
        if segment_slots and segment_slots[-1] == slot:
            indptr[-1] = end
        else:
            segment_slots.append(slot)
            indptr.append(end)
    return LoraSegments(indptr=indptr, slots=segment_slots)
