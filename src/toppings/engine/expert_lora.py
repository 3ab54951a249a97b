"""The adapters' part of experts and routers: what a layer's `ops.experts.ExpertLora` is made of.

Which rows an expert gets, the layer's router says. So a segment is what neighbouring rows have of one expert
and one adapter, cut anew in every layer; products are those of any other LoRA (`ops/lora.py`), found through
a table of the segments' own. The device computes all of it, and waits for a layer that has not landed,
whatever the mode: rows that are not known before the layer runs could not go ahead to the CPU.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import EXPERT_MODULES, ROUTER
from toppings.adapters.loader import LoadHandle
from toppings.ops.dispatch import gpu_kernels, kernels
from toppings.ops.experts import GroupedRows
from toppings.ops.gpu_plan import TILES, LoraBatch
from toppings.ops.lora import MAX_KERNEL_ROWS, LoraForm, LoraSegments, add_lora_

_GROUPS = {"gate_up": ((0, 1), (3,)), "down": ((2,),)}
"""Neighbours in `EXPERT_MODULES`, of which the last reaches to the end of the group's output."""
_SAMPLE = torch.empty(0)  # kernels of indices are the same for all types of elements


class StepExpertLora:
    """Of one step, whose adapters that have something on experts are among `segments`. `loads`: those of the
    step's adapters, by slot; `wait_s` adds up what they made it wait."""

    def __init__(self, pool: DevicePool, segments: LoraSegments, loads: dict[int, LoadHandle]) -> None:
        self.runs = [
            (slice(start, stop), slot) for start, stop, slot in segments.adapted if pool.has_experts([slot])
        ]
        self.routed = [(rows, slot) for rows, slot in self.runs if pool.has_routers([slot])]
        self.pool = pool
        self.slots = np.array(list(dict.fromkeys(slot for _, slot in self.runs)))
        self.owners = torch.zeros(segments.indptr[-1], dtype=torch.int64)
        for rows, slot in self.runs:
            self.owners[rows] = int(np.flatnonzero(self.slots == slot)[0]) + 1
        self.owners = self.owners.to(pool.arena.device)
        self.device_slots = torch.from_numpy(self.slots).to(pool.arena.device)
        self.ranks: list[int] = (
            pool.experts_cpu[self.slots, :, :, 2].max(axis=(0, 1)).tolist()
        )  # of each of EXPERT_MODULES
        self.max_rank = max(self.ranks)
        self._loads = [loads[slot] for slot in self.slots.tolist() if slot in loads]
        self._room: _Segments | None = None
        self.wait_s = 0.0

    def room_for(self, num_rows: int) -> "_Segments":
        """Of all layers, one after the other."""
        if self._room is None or self._room.segments.indptr[-1] != num_rows:
            self._room = _Segments.empty(num_rows, self.max_rank)
        return self._room

    def of_layer(self, layer: int) -> "LayerExpertLora":
        """Waits until the layer has landed."""
        started_at = time.perf_counter()
        for load in self._loads:
            load.wait(layer)
        self.wait_s += time.perf_counter() - started_at
        return LayerExpertLora(self, layer)


class LayerExpertLora:
    """Of one layer; not to be used twice."""

    def __init__(self, step: StepExpertLora, layer: int) -> None:
        self.owners, self.num_owners = step.owners, len(step.slots) + 1
        self._step = step
        self._layer = layer
        self._segments: _Segments | None = None

    def add_to_routes_(self, logits: Tensor, x: Tensor) -> None:
        for rows, slot in self._step.routed:
            a, b = (self._step.pool.find_extra(slot, self._layer, f"{ROUTER}.{half}") for half in "AB")
            if a is not None and b is not None:
                logits[rows] += (x[rows].float() @ a.float().t()) @ b.float()

    def add_(self, group: str, y: Tensor, x: Tensor, rows: GroupedRows) -> None:
        if self._segments is None:
            half = (x.shape[1], y.shape[1] // 2) if group == "gate_up" else (y.shape[1], x.shape[1])
            self._segments = _Segments.of(rows, self._step, self._layer, *half)
        for modules in _GROUPS[group]:
            if any(self._step.ranks[module] for module in modules):
                self._add(modules, y, x, self._segments)

    def _add(self, modules: tuple[int, ...], y: Tensor, x: Tensor, cut: "_Segments") -> None:
        width = y.shape[1] // len(modules)
        if cut.places is not None:
            parts = [(modules, y)]
        else:  # a module's weights of a later expert do not lie beside another module's
            parts = [((module,), y[:, i * width : (i + 1) * width]) for i, module in enumerate(modules)]
        for neighbours, out in parts:
            add_lora_(
                out,
                x,
                arena=self._step.pool.arena,
                table=self._table(neighbours[0], out, x, cut) if cut.places is None else cut.places,
                layer=0,
                group=(0,) if cut.places is None else neighbours,
                out_offsets=tuple(width * i for i in range(len(neighbours))),
                segments=cut.segments,
            )

    def _table(self, module: int, y: Tensor, x: Tensor, cut: "_Segments") -> Tensor:
        pool = self._step.pool
        places = (pool.experts_cpu if isinstance(cut.slots, np.ndarray) else pool.experts)[
            cut.slots, self._layer, module
        ]  # [cuts, 3], a copy: of the first expert
        before = cut.experts * places[:, 2]
        places[:, 0] += before * x.shape[1]
        places[:, 1] += before * y.shape[1]
        return torch.as_tensor(places)[:, None, None]


@dataclass(frozen=True)
class _Segments:
    """Rows cut where the expert or the adapter changes: each cut has a row of its own in a table, which is
    its slot in `segments`. `places`: that table, int64 [cuts, 1, 4, 3], for all of `EXPERT_MODULES`; where it
    is None, `experts` and `slots` (of the pool) say what it is made of: int64 [cuts], of any value where
    there is no adapter; in host memory numpy's, which is faster with a few numbers."""

    segments: LoraSegments
    experts: Any = None
    slots: Any = None
    places: Tensor | None = None

    @classmethod
    def of(
        cls, rows: GroupedRows, step: StepExpertLora, layer: int, hidden: int, expert_size: int
    ) -> "_Segments":
        if gpu_kernels("experts", step.pool.arena) is not None:
            return cls._on_device(rows, step)
        num = len(rows.keys)
        is_few = num <= MAX_KERNEL_ROWS * rows.num_experts  # then all of them are for the kernels of LoRA
        if not is_few or (fast := kernels("experts", step.pool.arena)) is None:
            return cls._on_host(rows, step)
        cut, experts = step.room_for(num), step.pool.experts
        fast.cut_rows(
            _SAMPLE, 1, num, cut.segments.short, cut.places, rows.keys, step.device_slots, experts[:, layer],
            experts.stride(0), hidden, expert_size, num, rows.num_owners, MAX_KERNEL_ROWS,
        )  # fmt: skip
        return cut

    @classmethod
    def empty(cls, num_rows: int, max_rank: int) -> "_Segments":
        """Room in host memory for as many cuts as there may be."""
        cuts = torch.empty(num_rows, 3, dtype=torch.int32)
        places = torch.empty(num_rows, 1, len(EXPERT_MODULES), 3, dtype=torch.int64)
        batches = {cuts.device: LoraBatch(cuts, "mbgmv", max_rank)}
        return cls(LoraSegments([0, num_rows], [-1], max_rank, batches=batches), places=places)

    @classmethod
    def _on_host(cls, rows: GroupedRows, step: StepExpertLora) -> "_Segments":
        keys = rows.keys.numpy(force=True)
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        experts, owners = np.divmod(keys[starts], rows.num_owners)
        numbers = np.where(owners > 0, np.arange(len(starts)), -1).tolist()
        segments = LoraSegments([*starts.tolist(), len(keys)], numbers, step.max_rank)
        slots = step.slots[owners - 1]
        if step.device_slots.device.type == "cpu":
            return cls(segments, experts, slots)
        device = step.device_slots.device
        return cls(segments, torch.from_numpy(experts).to(device), torch.from_numpy(slots).to(device))

    @classmethod
    def _on_device(cls, rows: GroupedRows, step: StepExpertLora) -> "_Segments":
        """Of so many rows at most, so that nothing is asked of the device."""
        form: LoraForm = "sgmv" if rows.has_many else "mbgmv"
        chunks = rows.chunks(TILES[form].rows, by_owner=True)
        keys = chunks[:, 2].long().clamp(min=0)
        owners = keys % rows.num_owners  # 0 where there is no chunk
        numbers = torch.arange(len(keys), device=keys.device)
        chunks[:, 2] = torch.where(owners > 0, numbers, -1)
        batches = {chunks.device: LoraBatch(chunks, form, step.max_rank)}
        segments = LoraSegments([0, len(rows.keys)], [-1], step.max_rank, batches=batches)
        return cls(segments, keys // rows.num_owners, step.device_slots[owners - 1])
