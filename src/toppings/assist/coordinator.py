"""The decoder's `LoraContext` for a step with cold adapters: rows to the workers, results into the output.

For each cold adapter, layer and projection group, decided as the group is reached: weights that have landed
are used on the device; else the adapter's choice (plan.py) says whether the device waits for them or the
CPU computes. A slice that no worker can take, or whose worker fails, is computed in this process, from the
same host memory.

Where the device works in the order of a stream, a group is reached when it is queued: somewhat earlier than
the device gets there, so that a layer which lands meanwhile is computed on the CPU all the same.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, gain_name, offset_name
from toppings.assist.cost import CostProfile
from toppings.assist.exchange import AssistStats, CpuWork, Exchange, Piece
from toppings.assist.plan import TOKEN_STEP, Choice
from toppings.assist.pool import Worker, WorkerPool
from toppings.assist.pricing import LayerCosts, price_layers
from toppings.assist.product import MIN_SLICE_ROWS, Form, GroupWeights
from toppings.core import GROUPS
from toppings.ops.columns import adjust_columns_, adjust_rows_
from toppings.ops.lora import LoraSegments, add_lora_, lora_expand_add_


class Load(Protocol):
    """How far an adapter's load to the device is (adapters.loader.LoadHandle)."""

    def layer_ready(self, layer: int) -> bool: ...

    def b_ready(self, layer: int) -> bool: ...

    def wait(self, layer: int) -> None: ...

    def wait_b(self, layer: int) -> None: ...


class HostWeights(Protocol):
    """An adapter in the host store, pinned there (adapters.host_store.HostEntry). `offsets`: each
    layer's block in bytes of the arena; layers are there from the first to `num_layers_ready`."""

    offsets: list[int]
    num_layers_ready: int

    @property
    def layout(self) -> AdapterLayout: ...


@dataclass(frozen=True)
class ColdAdapter:
    """An adapter of the step whose load was not done when the step began; it is in device pool slot
    `slot`."""

    adapter_id: int
    slot: int
    load: Load
    weights: HostWeights
    choices: Sequence[Choice]


@dataclass
class Coordinator:
    """Built once per engine; `step` makes the context of one forward.

    `item_bytes`: of the model's dtype; `out_offsets`: per projection group, the column of its fused output
    at which each module begins; `host_arena`: the host store's memory, flat, of the model's dtype.
    """

    pool: DevicePool
    workers: WorkerPool
    exchange: Exchange
    item_bytes: int
    out_offsets: dict[str, tuple[int, ...]]
    profile: CostProfile
    host_arena: Tensor

    def step(self, segments: LoraSegments, cold: Sequence[ColdAdapter]) -> "AssistLora":
        """To be closed (`with`) when the forward is over, however it ends."""
        self.workers.restart_dead()
        return AssistLora(self, segments, cold)


class AssistLora:
    """The adapters' part of one forward. Not to be used twice."""

    def __init__(self, owner: Coordinator, segments: LoraSegments, cold: Sequence[ColdAdapter]) -> None:
        self.stats = AssistStats()
        self._owner = owner
        self._exchange = owner.exchange
        self._segments = segments
        self._cold = [(adapter, _rows_of(segments, adapter.slot)) for adapter in cold]
        self._adjusts = owner.pool.has_columns(segments.slots)
        self._masked: dict[frozenset[int], LoraSegments] = {frozenset(): segments}
        self._session = ExitStack()
        self._workers: list[Worker] | None = None  # None until the first slice: no session yet
        self._pieces: list[tuple[Piece, Load]] = []
        self._work: list[CpuWork] = []  # of the group that is under way
        self._prices: dict[tuple[int, int], Sequence[LayerCosts]] = {}  # by slot and rows

    @property
    def wait_s(self) -> float:
        return self.stats.wait_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    # --- LoraContext ---

    def start(self, layer: int, group: str, x: Tensor) -> None:
        self._pieces, self._work = [], []
        self._exchange.begin_group(self._workers or [])
        for adapter, rows in self._cold:
            num_rows = sum(stop - start for start, stop in rows)
            form = self._form(adapter, layer, group, num_rows)
            if form is None:
                continue
            self._note_work(adapter, layer)
            weights = self._locate(adapter, layer, group)
            num_workers = self._num_workers(adapter, layer, num_rows)
            for start, stop in rows:
                is_short = stop - start < MIN_SLICE_ROWS
                # ops.lora keeps the shrunk rows of short segments in fp32, which the channel does not carry.
                whole = Piece(start, stop, Form.FULL if is_short else form, weights, adapter.slot)
                self._send(x, whole, adapter.load, num_workers)

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        on_cpu = frozenset(piece.slot for piece, _ in self._pieces)
        self._await_loads(layer, group, on_cpu)
        owner = self._owner
        if self._adjusts:
            self._adjust(y, layer, group, on_cpu)
        add_lora_(
            y,
            x,
            arena=owner.pool.arena,
            table=owner.pool.table,
            layer=layer,
            group=GROUPS[group],
            out_offsets=owner.out_offsets[group],
            segments=self._without(on_cpu),
        )
        for piece, load in self._pieces:
            result = self._exchange.take(piece, x)
            if piece.form is Form.SHRINK:
                load.wait_b(layer)
            self._add(piece, result, y, layer, group)
        for work in self._work:
            work.ended_at = time.perf_counter()

    # --- deciding ---

    def _form(self, adapter: ColdAdapter, layer: int, group: str, num_rows: int) -> Form | None:
        """What the CPU computes of this product, or None where the device does all of it."""
        if not _is_targeted(adapter, layer, group):
            return None
        self.stats.num_cold_products += 1
        choice = adapter.choices[layer]
        if (
            choice is Choice.DEVICE
            or adapter.load.layer_ready(layer)
            or adapter.weights.num_layers_ready <= layer
            or not self._exchange.has_room(self._awake_workers(), num_rows)
        ):
            return None
        is_b_there = self._exchange.is_ordered or adapter.load.b_ready(layer)
        is_shrink = choice is Choice.CPU_SHRINK and is_b_there
        self.stats.num_cpu_products += 1
        return Form.SHRINK if is_shrink else Form.FULL

    def _awake_workers(self) -> list[Worker]:
        if self._workers is None:
            self._workers = self._session.enter_context(self._exchange.session(self.stats))
        return self._workers

    def _note_work(self, adapter: ColdAdapter, layer: int) -> None:
        key, works = (adapter.adapter_id, layer), self.stats.cpu_work
        if key not in works:
            works[key] = CpuWork(time.perf_counter())
        works[key].num_products += 1
        self._work.append(works[key])

    # --- sending ---

    def _locate(self, adapter: ColdAdapter, layer: int, group: str) -> GroupWeights:
        start = adapter.weights.offsets[layer] // self._owner.item_bytes
        return GroupWeights.locate(adapter.weights.layout, layer, group, start)

    def _num_workers(self, adapter: ColdAdapter, layer: int, num_rows: int) -> int:
        key = adapter.slot, -(-num_rows // TOKEN_STEP) * TOKEN_STEP
        if key not in self._prices:
            self._prices[key] = price_layers(self._owner.profile, adapter.weights.layout, key[1])
        return self._prices[key][layer].num_workers

    def _send(self, x: Tensor, whole: Piece, load: Load, num_workers: int) -> None:
        workers = self._awake_workers()
        for low, high in split_rows(whole.start, whole.stop, min(num_workers, len(workers))):
            worker = min(workers, key=lambda worker: worker.num_rows_sent)
            piece = replace(whole, start=low, stop=high)
            self._exchange.post(worker, piece, x)
            self._work[-1].num_slices += 1
            self._pieces.append((piece, load))

    # --- taking in ---

    def _await_loads(self, layer: int, group: str, on_cpu: frozenset[int]) -> None:
        started_at = time.monotonic()
        for adapter, _ in self._cold:
            if adapter.slot not in on_cpu and _is_targeted(adapter, layer, group):
                adapter.load.wait(layer)
        self.stats.wait_s += time.monotonic() - started_at

    def _without(self, slots: frozenset[int]) -> LoraSegments:
        if slots not in self._masked:
            kept = [-1 if slot in slots else slot for slot in self._segments.slots]
            whole = self._segments
            self._masked[slots] = LoraSegments(whole.indptr, kept, whole.max_rank, whole.decode_form)
        return self._masked[slots]

    def _adjust(self, y: Tensor, layer: int, group: str, on_cpu: frozenset[int]) -> None:
        """Gains and offsets, of rows that the CPU computes from where the host store has them: what the
        workers send back knows nothing of the base model's output."""
        owner = self._owner
        adjust_columns_(
            y,
            arena=owner.pool.arena,
            places=owner.pool.columns[:, layer, GROUPS[group][0] :],
            out_offsets=owner.out_offsets[group],
            segments=self._without(on_cpu),
        )
        lows = owner.out_offsets[group]
        for adapter, rows in self._cold:
            if adapter.slot not in on_cpu:
                continue
            for module, low, high in zip(GROUPS[group], lows, (*lows[1:], y.shape[1]), strict=True):
                gain, offset = (
                    self._extra_on_host(adapter, layer, name, y.device)
                    for name in (gain_name(module), offset_name(module))
                )
                for start, stop in rows:
                    adjust_rows_(y[start:stop, low:high], gain, offset)

    def _extra_on_host(
        self, adapter: ColdAdapter, layer: int, name: str, device: torch.device
    ) -> Tensor | None:
        if (found := adapter.weights.layout.layers[layer].find_extra(name)) is None:
            return None
        start = adapter.weights.offsets[layer] // self._owner.item_bytes + found[0]
        return self._owner.host_arena[start : start + found[1][0]].to(device, non_blocking=True)

    def _add(self, piece: Piece, result: Tensor, y: Tensor, layer: int, group: str) -> None:
        rows = y[piece.start : piece.stop]
        lows = self._owner.out_offsets[group]
        is_full = piece.form is Form.FULL
        widths = piece.weights.num_outs if is_full else piece.weights.ranks
        for module, low, high, part in zip(
            GROUPS[group],
            lows,
            (*lows[1:], y.shape[1]),
            torch.split(result, list(widths), dim=1),
            strict=True,
        ):
            if not part.shape[1]:
                continue
            if is_full:
                rows[:, low:high] += part
            else:
                lora_expand_add_(
                    rows[:, low:high], part, self._b_on_device(piece.slot, layer, module, high - low)
                )

    def _b_on_device(self, slot: int, layer: int, module: int, num_out: int) -> Tensor:
        _, start, rank = self._owner.pool.table_cpu[slot, layer, module].tolist()
        return self._owner.pool.arena[start : start + rank * num_out].view(rank, num_out)


def split_rows(start: int, stop: int, num_parts: int) -> list[tuple[int, int]]:
    """[start, stop) in at most `num_parts` ranges whose lengths differ by one; at least one range, and none
    shorter than MIN_SLICE_ROWS unless it is all there is."""
    num_rows = stop - start
    num_parts = max(1, min(num_parts, num_rows // MIN_SLICE_ROWS))
    edges = [start + num_rows * i // num_parts for i in range(num_parts + 1)]
    return list(pairwise(edges))


def _rows_of(segments: LoraSegments, slot: int) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, owner in segments.adapted if owner == slot]


def _is_targeted(adapter: ColdAdapter, layer: int, group: str) -> bool:
    ranks = adapter.weights.layout.layers[layer].ranks
    return any(ranks[module] for module in GROUPS[group])
