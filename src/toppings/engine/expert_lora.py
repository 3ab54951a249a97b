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
from toppings.ops.dispatch import gpu_kernels
from toppings.ops.experts import GroupedRows
from toppings.ops.gpu_plan import TILES, LoraBatch
from toppings.ops.lora import LoraForm, LoraSegments, add_lora_

_GROUPS = {"gate_up": ("gate_proj", "up_proj", "gate_up_proj"), "down": ("down_proj",)}


class StepExpertLora:
    """Of one step, whose adapters that have something on experts are among `segments`. `loads`: those of the
    step's adapters, by slot; `wait_s` adds up what they made it wait."""

    def __init__(self, pool: DevicePool, segments: LoraSegments, loads: dict[int, LoadHandle]) -> None:
        self.runs = [
            (slice(start, stop), slot) for start, stop, slot in segments.adapted if pool.has_experts([slot])
        ]
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
        self.wait_s = 0.0

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
        for rows, slot in self._step.runs:
            a, b = (self._step.pool.find_extra(slot, self._layer, f"{ROUTER}.{half}") for half in "AB")
            if a is not None and b is not None:
                logits[rows] += (x[rows].float() @ a.float().t()) @ b.float()

    def add_(self, group: str, y: Tensor, x: Tensor, rows: GroupedRows) -> None:
        if self._segments is None:
            self._segments = _Segments.of(rows, self._step)
        half = y.shape[1] // 2
        columns = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
        for name in _GROUPS[group]:
            module = EXPERT_MODULES.index(name)
            if self._step.ranks[module]:
                self._add(module, y[:, columns.get(name, slice(None))], x, self._segments)

    def _add(self, module: int, y: Tensor, x: Tensor, cut: "_Segments") -> None:
        pool = self._step.pool
        places = (pool.experts_cpu if isinstance(cut.slots, np.ndarray) else pool.experts)[
            cut.slots, self._layer, module
        ]  # [cuts, 3], a copy: of the first expert
        before = cut.experts * places[:, 2]
        places[:, 0] += before * x.shape[1]
        places[:, 1] += before * y.shape[1]
        table = torch.as_tensor(places)[:, None, None]
        add_lora_(
            y, x, arena=pool.arena, table=table, layer=0, group=(0,), out_offsets=(0,), segments=cut.segments
        )


@dataclass(frozen=True)
class _Segments:
    """Rows cut where the expert or the adapter changes: each cut has a row of its own in a table, which is
    its slot in `segments`. `experts`, `slots` (of the pool): int64 [cuts], of any value where there is no
    adapter; in host memory numpy's, which is faster with a few numbers."""

    segments: LoraSegments
    experts: Any
    slots: Any

    @classmethod
    def of(cls, rows: GroupedRows, step: StepExpertLora) -> "_Segments":
        is_for_gpu = gpu_kernels("experts", step.pool.arena) is not None
        return cls._on_device(rows, step) if is_for_gpu else cls._on_host(rows, step)

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
