"""Turns a batch into tensors, runs the model on it and draws the next tokens."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch

from toppings.adapters.loader import LoadHandle
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LoadingMode
from toppings.assist.coordinator import AssistLora
from toppings.assist.exchange import AssistStats
from toppings.core import GROUPS, Batch, BatchItem, Request
from toppings.engine.device_lora import DeviceLora, LoraSum
from toppings.engine.draft_rows import kept_rows, with_drafts
from toppings.engine.drawing import Drawing, Sampler, draw_on_host
from toppings.engine.expert_lora import StepExpertLora
from toppings.engine.folded_base import FoldedBase
from toppings.engine.own_layers import OwnHead, OwnLayers
from toppings.engine.pages import pages_for
from toppings.engine.sampling_rows import SamplingRows
from toppings.engine.scoring import Head, Reader, Reading, ReadingPlan, Readings, read_nothing, read_on_host
from toppings.engine.step_inputs import InputBuilder, Pending, StepInputs, lora_segments
from toppings.messages import TokenLogprobs
from toppings.model.decoder import Decoder, LoraContext
from toppings.ops.attention import KVCache
from toppings.ops.lora import DEFAULT_DECODE_FORM, LoraForm, LoraSegments
from toppings.ops.sampling import SamplingRow
from toppings.sampling_params import SamplingParams

ALL_GROUPS = frozenset(GROUPS)
NO_LOGITS = (
    "the model's logits for it are not finite: weights of the adapter or of the base model overflow for this"
    " prompt"
)


@dataclass(slots=True)
class StepResult:
    """What a step drew, and how long it waited for adapter loads. An item that needed a token has an entry,
    and one more for each token of its draft that was drawn."""

    items: list[BatchItem]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    load_wait_s: float
    copy_ms: float  # what the loads of its adapters copied meanwhile
    assist: AssistStats | None
    failed: dict[str, str]  # by request id, why its output cannot go on; its token means nothing
    readings: dict[str, Reading] = field(default_factory=dict)  # by request id, of prompts


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step whose work is queued, and what it draws: `items` has one with a draft once for each row."""

    items: list[BatchItem]
    drawing: Drawing
    load_wait_s: float
    copy_ms: float
    assist: AssistStats | None
    failed: dict[str, str] = field(default_factory=dict)
    readings: Readings = read_nothing
    rows: Sequence[SamplingRow] = ()

    def result(self) -> StepResult:
        """Waits for the tokens. Raises what made them wrong."""
        drawn = self.drawing.wait()
        if self.assist is not None and self.assist.error is not None:
            raise self.assist.error
        kept = kept_rows(self.items, self.rows, drawn)
        return StepResult(
            items=[self.items[i] for i in kept],
            token_ids=[drawn.token_ids[i] for i in kept],
            logprobs=[drawn.logprobs[i] for i in kept],
            load_wait_s=self.load_wait_s,
            copy_ms=self.copy_ms,
            assist=self.assist,
            failed={self.items[i].request.request_id: NO_LOGITS for i in drawn.undrawable if i in kept}
            | self.failed,
            readings=self.readings(),
        )


class StepAssist(Protocol):
    """What computes products of adapters that are still on their way (engine/assist.py)."""

    def step(
        self, segments: LoraSegments, loads: Mapping[int, LoadHandle], num_tokens: Mapping[int, int]
    ) -> AssistLora: ...


class CapturedSteps(Protocol):
    """Steps of one kind that a device replays (graphs.py)."""

    def can_run(self, items: Sequence[BatchItem]) -> bool: ...

    def run(
        self,
        items: Sequence[BatchItem],
        segments: LoraSegments | None,
        pending: Pending | None = None,
        minus: LoraSegments | None = None,
    ) -> torch.Tensor:
        """Logits of the items that are drawn from, fp32 [drawn, vocab], until the next run. No adapter of
        theirs is loading."""


class ModelRunner:
    """The model, its cache and the adapters on one device. `start` changes no request. `runs_ahead`: a step
    may be started before the tokens of the one before are known."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        adapters: AdapterManager,
        mode: LoadingMode,
        *,
        inputs: InputBuilder,
        sample: Sampler = draw_on_host,
        read: Reader = read_on_host,
        runs_ahead: bool = False,
        decode_form: LoraForm = DEFAULT_DECODE_FORM,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._adapters = adapters
        self._mode = mode
        self._inputs = inputs
        self._sample = sample
        self._read = read
        self._runs_ahead = runs_ahead
        self._decode_form = decode_form
        self.assist: StepAssist | None = None  # set once, before the first batch
        self.graphs: Sequence[CapturedSteps] = ()  # likewise
        self.folded: FoldedBase | None = None  # likewise
        self.rows = SamplingRows(decoder.config.eos_token_ids)
        self.out_offsets = decoder.config.group_out_offsets()

    @torch.inference_mode()
    def start(self, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        """One forward over all items of `batch`, and a token for each item that needs one. Tokens that
        requests of the batch still wait for are drawn by `previous`.

        Raises AdapterLoadError where an adapter's weights could not be brought; the batch may be run again
        without it, for nothing was committed.
        """
        items = batch.items
        self._copy_pages(items)
        drawn_items = [item for item in items if item.needs_sample]
        sampled = [
            (row, item)
            for last, item in zip(_last_rows(items), items, strict=True)
            if item.needs_sample
            for row in range(last - len(item.draft), last + 1)
        ]
        begun = self.rows.begin([item.request for item in drawn_items])
        loads = self._loads(items)
        copied_ms = -sum(load.copy_ms for load in loads.values())
        segments, lora = self._segments(items), None
        minus = None if self.folded is None else self.folded.minus(items)
        own, experts, pending, readings = None, None, None, read_nothing
        if previous is not None:
            pending = Pending.of(items, previous.items, previous.drawing.token_ids)
        has_extras = segments is not None and self._adapters.pool.has_extras(segments.slots)
        may_capture = not loads and not has_extras
        captured = next((g for g in self.graphs if g.can_run(items)), None) if may_capture else None
        if captured is not None:
            logits = captured.run(items, segments, pending, minus)
        else:
            plan = ReadingPlan.of(items)
            rows_wanted = [row for row, _ in sampled] + (plan.rows if plan is not None else [])
            inputs = self._inputs.build(items, rows_wanted, segments, pending, minus)
            own = self._own(segments, rows_wanted, loads)
            experts = self._expert_lora(segments, loads)
            with self._lora(items, segments, loads) as lora:
                hidden = self._hidden(inputs, self._with_minus(lora, minus), own, experts)
                logits = self._head(own).logits(hidden[: len(sampled)])
            if plan is not None:
                readings = self._read(self._head(own, len(sampled)), hidden[len(sampled) :], plan)
        copied_ms += sum(load.copy_ms for load in loads.values())
        if previous is None:
            rows, failed = self.rows.finish(begun, [], None)
        else:
            rows, failed = self.rows.finish(begun, [i.request for i in previous.items], previous.drawing)
        rows = with_drafts(rows, drawn_items)
        return StepInFlight(
            items=[item for _, item in sampled],
            drawing=self._sample(logits, rows),
            load_wait_s=sum(each.wait_s for each in (lora, own, experts) if each is not None),
            copy_ms=copied_ms,
            assist=lora.stats if isinstance(lora, AssistLora) else None,
            failed=failed,
            readings=readings,
            rows=rows,
        )

    def can_run_ahead(self, requests: Sequence[Request]) -> bool:
        """A step of these requests can be started although tokens of theirs are still being drawn: no adapter
        is loading."""
        return self._runs_ahead and not any(
            r.adapter_id is not None and self._adapters.load_of(r.adapter_id) is not None for r in requests
        )

    @property
    def max_dry_run_tokens(self) -> int:
        return self._cache.k[0].shape[0]

    @torch.inference_mode()
    def dry_run(self, num_tokens: int, lora: LoraContext) -> None:
        """One forward over a prompt of zeros, to be timed; overwrites the first pages of the cache."""
        pages = list(range(pages_for(num_tokens, self._cache.page_size)))
        request = Request("dry-run", [0] * num_tokens, SamplingParams(), page_table=pages)
        inputs = self._inputs.build([BatchItem(request, num_tokens)], [num_tokens - 1], None)
        self._decoder.logits(self._hidden(inputs, lora))

    @torch.inference_mode()
    def dry_draw(self) -> None:
        """A draw from zeros, of the kind that has kernels of its own."""
        row = SamplingRow(SamplingParams(top_p=0.9), [0], [])
        shape = (1, self._decoder.config.vocab_size)
        self._sample(torch.zeros(shape, device=self._decoder.device), [row]).wait()

    def _hidden(
        self,
        inputs: StepInputs,
        lora: LoraContext | None,
        own: OwnLayers | None = None,
        experts: StepExpertLora | None = None,
    ) -> torch.Tensor:
        rows, meta, cache = inputs.logit_rows, inputs.meta, self._cache
        return self._decoder.hidden(inputs.token_ids, inputs.positions, cache, meta, rows, lora, own, experts)

    def _copy_pages(self, items: list[BatchItem]) -> None:
        """Before anything that may fail and be run again: by then a page may be another's."""
        places = [
            (item.copy_page, item.request.page_table[index], num_rows)
            for item in items
            if item.copy_page is not None
            for index, num_rows in [divmod(item.request.num_computed_tokens, self._cache.page_size)]
        ]
        if places:
            self._cache.copy(places)

    def _own(
        self, segments: LoraSegments | None, rows: Sequence[int], loads: dict[int, LoadHandle]
    ) -> OwnLayers | None:
        """None where no adapter of the step has anything outside the projections."""
        if segments is None or not self._adapters.pool.has_outer(segments.slots):
            return None
        return OwnLayers(self._adapters.pool, segments, rows, self._by_slot(loads))

    def _expert_lora(
        self, segments: LoraSegments | None, loads: dict[int, LoadHandle]
    ) -> StepExpertLora | None:
        """None where no adapter of the step has anything on experts."""
        if segments is None or not self._adapters.pool.has_experts(segments.slots):
            return None
        return StepExpertLora(self._adapters.pool, segments, self._by_slot(loads))

    def _by_slot(self, loads: dict[int, LoadHandle]) -> dict[int, LoadHandle]:
        return {self._adapters.slot_of(adapter_id): load for adapter_id, load in loads.items()}

    def _head(self, own: OwnLayers | None, first: int = 0) -> Head:
        return self._decoder if own is None else OwnHead(self._decoder, own, first)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self.rows.forget(request)

    def _loads(self, items: list[BatchItem]) -> dict[int, LoadHandle]:
        """By adapter id, the loads under way of the batch's adapters."""
        adapter_ids = {item.adapter_id for item in items}
        return {
            a: load for a in adapter_ids if a is not None and (load := self._adapters.load_of(a)) is not None
        }

    def _segments(self, items: list[BatchItem]) -> LoraSegments | None:
        """None where the base model alone is asked for."""
        adapter_ids = {item.adapter_id for item in items}
        slots = {a: self._adapters.slot_of(a) for a in adapter_ids if a is not None}
        if self.folded is not None:
            slots = self.folded.own_slots(slots)
        if all(slot < 0 for slot in slots.values()):
            return None
        return lora_segments(items, slots, self._adapters.pool.max_rank_of(slots.values()), self._decode_form)

    def _lora(
        self, items: list[BatchItem], segments: LoraSegments | None, loads: dict[int, LoadHandle]
    ) -> AbstractContextManager[DeviceLora | AssistLora | None]:
        if segments is None:
            return nullcontext()
        if loads and self.assist is not None:
            return self.assist.step(segments, loads, {a: _num_tokens_of(items, a) for a in loads})
        pool = self._adapters.pool
        groups, handles = pool.groups_of(segments.slots), list(loads.values())
        return nullcontext(
            DeviceLora(pool, segments, self.out_offsets, groups, loads=handles, mode=self._mode)
        )

    def _with_minus(self, lora: LoraContext | None, minus: LoraSegments | None) -> LoraContext | None:
        """What is in the weights is taken out before anything is made of the base model's output."""
        if minus is None:
            return lora
        first = DeviceLora(self._adapters.pool, minus, self.out_offsets, ALL_GROUPS, adjusts=False)
        return first if lora is None else LoraSum(first, lora)


def _num_tokens_of(items: list[BatchItem], adapter_id: int) -> int:
    return sum(item.num_rows - item.num_base_tokens for item in items if item.adapter_id == adapter_id)


def _last_rows(items: list[BatchItem]) -> list[int]:
    return [end - 1 for end in accumulate(item.num_rows for item in items)]
