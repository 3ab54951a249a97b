"""A host arena, a device pool and loads that land when they are told to: what a coordinator works between."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toppings.adapters.arena import HostArena
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.assist.coordinator import AssistLora, ColdAdapter, Coordinator
from toppings.assist.cores import WorkerCores, available_cores
from toppings.assist.cost import CostProfile, CpuCost
from toppings.assist.exchange import HostExchange
from toppings.assist.plan import Choice
from toppings.assist.pool import PoolSettings, WorkerPool
from toppings.core import GROUPS
from toppings.ops.lora import LoraSegments, add_lora_

HIDDEN, INTERMEDIATE, KV = 96, 160, 32
SIZES = (
    (HIDDEN, HIDDEN),
    (HIDDEN, KV),
    (HIDDEN, KV),
    (HIDDEN, HIDDEN),
    (HIDDEN, INTERMEDIATE),
    (HIDDEN, INTERMEDIATE),
    (INTERMEDIATE, HIDDEN),
)
NUM_LAYERS = 3
ARENA_BYTES = 16 << 20
OUT_OFFSETS = {"qkv": (0, HIDDEN, HIDDEN + KV), "o": (0,), "gate_up": (0, INTERMEDIATE), "down": (0,)}
TOLERANCE = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 6e-2}

PROFILE = CostProfile(
    origin="made up: CPU work never fits behind a base product, so every worker gets its share",
    link_gbps=1.0,
    copy_ms=0.0,
    cpu=CpuCost(fixed_ms=0.01, per_gflop_ms=1000.0, per_mweights_ms=0.0, per_mvalues_ms=0.1),
    layer_ms=((1, 0.01), (512, 0.02)),
    gemm_share=0.8,
    round_trip_ms=0.01,
    session_ms=0.1,
    num_workers=8,
)


def make_layout(ranks: Sequence[int], dtype: torch.dtype, num_layers: int = NUM_LAYERS) -> AdapterLayout:
    shapes = BaseShapes(num_layers, SIZES)
    return AdapterLayout.build([ranks] * num_layers, shapes, str(dtype).removeprefix("torch."))


@dataclass
class Entry:
    """An adapter in the host arena."""

    layout: AdapterLayout
    offsets: list[int]
    num_layers_ready: int = NUM_LAYERS


@dataclass
class FakeLoad:
    """Lands what it is told to; `wait` lands the layer, as if the copy had just come through."""

    world: "World"
    entry: Entry
    slot: int
    landed: set[tuple[int, str]] = field(default_factory=set)
    num_waits: int = 0

    def layer_ready(self, layer: int) -> bool:
        return {(layer, "A"), (layer, "B")} <= self.landed

    def b_ready(self, layer: int) -> bool:
        return (layer, "B") in self.landed

    def wait_b(self, layer: int) -> None:
        if not self.b_ready(layer):
            self.num_waits += 1
            self.land(layer, "B")

    def wait(self, layer: int) -> None:
        if not self.layer_ready(layer):
            self.num_waits += 1
            self.land(layer, "AB")

    def land(self, layer: int, halves: str) -> None:
        block = self.entry.layout.layers[layer]
        host = self.entry.offsets[layer] // self.world.dtype.itemsize
        device = self.world.pool.layer_offset(self.slot, layer)
        for half in halves:
            low, high = (0, block.numel_a) if half == "A" else (block.numel_a, block.numel)
            source = self.world.arena[host + low : host + high]
            self.world.pool.arena[device + low : device + high] = source
            self.landed.add((layer, half))


class World:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.host = HostArena(ARENA_BYTES)
        self.arena = torch.from_numpy(self.host.view).view(dtype)
        self.used_bytes = 0
        self.pool = DevicePool(NUM_LAYERS, ARENA_BYTES, dtype)
        self.pool.arena.fill_(float("nan"))  # whatever is read before it has landed shows

    def add_adapter(self, ranks: Sequence[int]) -> FakeLoad:
        layout = make_layout(ranks, self.dtype)
        offsets = [self.used_bytes + layout.layer_offset_bytes(i) for i in range(NUM_LAYERS)]
        self.used_bytes += layout.num_bytes
        start = offsets[0] // self.dtype.itemsize
        self.arena[start : start + layout.num_bytes // self.dtype.itemsize].normal_(std=HIDDEN**-0.5)
        slot = self.pool.try_place(layout)
        assert slot is not None
        return FakeLoad(self, Entry(layout, offsets), slot)

    def reset(self) -> None:
        for slot in range(self.pool.num_slots):
            if self.pool.table_cpu[slot].any():
                self.pool.free(slot)
        self.pool.arena.fill_(float("nan"))
        self.used_bytes = 0


def pool_settings(world: World, num_workers: int = 2, **changes: Any) -> PoolSettings:
    cores = (available_cores() * num_workers)[:num_workers]
    return PoolSettings(
        cores=WorkerCores(cores, is_shared=True),
        arena_fd=world.host.fd,
        arena_bytes=world.host.size_bytes,
        dtype=world.dtype,
        max_input_bytes=int(changes.pop("max_input_bytes", 1 << 20)),
        max_output_bytes=1 << 21,
        **changes,
    )


@contextmanager
def worker_pool(settings: PoolSettings) -> Iterator[WorkerPool]:
    pool = WorkerPool(settings)
    try:
        pool.wait_ready()
        yield pool
    finally:
        pool.close()


def make_coordinator(world: World, workers: WorkerPool) -> Coordinator:
    exchange = HostExchange(workers, world.arena)
    return Coordinator(world.pool, workers, exchange, world.dtype.itemsize, OUT_OFFSETS, PROFILE, world.arena)


def cold(load: FakeLoad, choice: Choice = Choice.CPU) -> ColdAdapter:
    return ColdAdapter(load.slot, load.slot, load, load.entry, [choice] * NUM_LAYERS)


def group_widths(group: str) -> tuple[int, int]:
    modules = GROUPS[group]
    return SIZES[modules[0]][0], sum(SIZES[m][1] for m in modules)


def forward(lora: AssistLora, segments: LoraSegments, dtype: torch.dtype) -> dict[tuple[int, str], Tensor]:
    """What a decoder does with a context, base products being random."""
    outputs = {}
    for layer in range(NUM_LAYERS):
        for group in GROUPS:
            x, y = step_tensors(layer, group, segments.indptr[-1], dtype)
            lora.start(layer, group, x)
            lora.finish(layer, group, x, y)
            outputs[layer, group] = y
    return outputs


def expected(
    world: World, loads: Sequence[FakeLoad], segments: LoraSegments
) -> dict[tuple[int, str], Tensor]:
    """All weights on the device: what `cached` computes."""
    for load in loads:
        for layer in range(NUM_LAYERS):
            load.land(layer, "AB")
    outputs = {}
    for layer in range(NUM_LAYERS):
        for group, modules in GROUPS.items():
            x, y = step_tensors(layer, group, segments.indptr[-1], world.dtype)
            add_lora_(
                y,
                x,
                arena=world.pool.arena,
                table=world.pool.table,
                layer=layer,
                group=modules,
                out_offsets=OUT_OFFSETS[group],
                segments=segments,
            )
            outputs[layer, group] = y
    return outputs


def step_tensors(layer: int, group: str, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * layer + len(group) + num_rows)
    num_in, num_out = group_widths(group)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    return x, torch.randn(num_rows, num_out, generator=generator).to(dtype)


def assert_same(
    got: dict[tuple[int, str], Tensor], want: dict[tuple[int, str], Tensor], dtype: torch.dtype
) -> None:
    for key, y in want.items():
        torch.testing.assert_close(got[key], y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=str(key))
