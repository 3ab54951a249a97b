"""The engine itself on a virtual clock: all of it but the forward, whose steps take what a model says."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.adapters.fixtures import SHAPES, open_registry, write_adapter
from toppings.adapters import device_memory
from toppings.adapters import manager as manager_module
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, BaseShapes, LoadOrder, by_layer
from toppings.adapters.loader import LoadHandle, LoadSource
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LoadingMode, make_mode
from toppings.adapters.registry import AdapterRegistry
from toppings.cluster.batch_row import BatchRow
from toppings.cluster.perf_model import PerfModel, batch_features
from toppings.config import EngineConfig
from toppings.core import Batch, Request
from toppings.engine import engine as engine_module
from toppings.engine.drawing import Drawing
from toppings.engine.engine import Engine
from toppings.engine.model_runner import StepInFlight
from toppings.engine.pages import PageAllocator
from toppings.engine.prefix_cache import BlockNames
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.engine.step_log import StepLog
from toppings.lab.outcome import Outcome
from toppings.lab.players.engine import EnginePlayer, PlayedStep, preload_host
from toppings.messages import EngineReady
from toppings.ops.sampling import SampleOutput
from toppings.sim.blocks import TraceNames
from toppings.sim.settings import NS_PER_MS, NS_PER_S, SimConfig
from toppings.sim.trace import Trace

NUM_LAYERS = 4
LAYERS = BaseShapes(NUM_LAYERS, SHAPES.sizes)
BYTES_PER_RANK = NUM_LAYERS * (32 + 32) * 4  # of q_proj, fp32


class VirtualClock:
    """Time passes where somebody says so. `perf_counter` never shows the same instant
    twice, as a real one."""

    def __init__(self) -> None:
        self.now_ns = 0.0
        self._num_looks = 0

    def now(self) -> float:
        return self.now_ns / NS_PER_S

    def sleep_until(self, at: float) -> None:
        self.wait_until(round(at * NS_PER_S))

    def wait_until(self, at_ns: float) -> None:
        self.now_ns = max(self.now_ns, at_ns)

    def stopped(self) -> AbstractContextManager[None]:
        return nullcontext()

    def perf_counter(self) -> float:
        self._num_looks += 1
        return self.now() + self._num_looks * 1e-13


class VirtualHandle(LoadHandle):
    """Its layers land one after another, each in the same time."""

    def __init__(
        self, source: LoadSource, order: LoadOrder, clock: VirtualClock, landed: list[float]
    ) -> None:
        super().__init__(source, order)
        self._clock, self._landed = clock, landed

    def layer_ready(self, layer: int) -> bool:
        return self._clock.now_ns >= self._landed[layer]

    @property
    def done(self) -> bool:
        return self.layer_ready(self.num_layers - 1)

    def wait(self, layer: int) -> None:
        self._clock.wait_until(self._landed[layer])


class VirtualLoader:
    """One load after another."""

    def __init__(self, clock: VirtualClock, model: PerfModel) -> None:
        self._clock, self._model = clock, model
        self.free_ns = 0.0

    def start(
        self, source: LoadSource, offsets_bytes: list[int], order: LoadOrder | None = None
    ) -> VirtualHandle:
        begin_ns = max(self._clock.now_ns, self.free_ns)
        load_ns = self.load_ns(source.layout.num_bytes)
        self.free_ns = begin_ns + load_ns
        landed = [begin_ns + load_ns * (layer + 1) / NUM_LAYERS for layer in range(NUM_LAYERS)]
        return VirtualHandle(source, order or by_layer(range(NUM_LAYERS)), self._clock, landed)

    def load_ns(self, num_bytes: int) -> int:
        return round(self._model.load_ms(num_bytes, is_on_host=True) * NS_PER_MS)

    def load_tokens(self, num_bytes: int) -> float:
        token_ms = self._model.prefill.coefficients["tokens"]
        return self.load_ns(num_bytes) / NS_PER_MS / token_ms

    def part_of(self, entry: LoadSource) -> LoadSource:
        return entry

    def is_over(self, handle: LoadHandle) -> bool:
        return handle.done

    def notify(self) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class VirtualRunner:
    """Computes nothing. A step takes what the model predicts, layer by layer, and the waits of its mode."""

    def __init__(
        self, clock: VirtualClock, model: PerfModel, adapters: AdapterManager, mode: LoadingMode
    ) -> None:
        self._clock, self._model, self._adapters, self._mode = clock, model, adapters, mode

    def can_run_ahead(self, requests: Sequence[Request]) -> bool:
        return False

    def start(self, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        self._check_pages(batch)
        compute_ns = max(1, round(self._step_ms(batch) * NS_PER_MS))
        adapter_ids = {item.request.adapter_id for item in batch.items} - {None}
        loads = [load for a in adapter_ids if (load := self._adapters.load_of(a)) is not None]  # type: ignore[arg-type]
        for layer in range(NUM_LAYERS):
            for load in loads:
                self._mode.wait_before_layer(load, layer)
            self._clock.now_ns += compute_ns / NUM_LAYERS
        self._clock.now_ns = round(self._clock.now_ns)
        sampled = [item for item in batch.items if item.needs_sample]
        drawn = SampleOutput([5] * len(sampled), [None] * len(sampled))
        return StepInFlight(sampled, Drawing(torch.tensor(drawn.token_ids), lambda: drawn), 0.0, 0.0, None)

    def forget(self, request: Request) -> None:
        pass

    def _step_ms(self, batch: Batch) -> float:
        rows: dict[bool, list[BatchRow]] = {True: [], False: []}
        for item in batch.items:
            request = item.request
            assert request.adapter_id is not None
            rank, name = self._adapters.rank_of(request.adapter_id), str(request.adapter_id)
            rows[item.is_decode].append(BatchRow(rank, name, item.num_tokens, request.num_computed_tokens))
        return self._model.step_ms(decode=batch_features(rows[True]), prefill=batch_features(rows[False]))

    @staticmethod
    def _check_pages(batch: Batch) -> None:
        """Every token of the step has its place in the cache."""
        for item in batch.items:
            assert (
                len(item.request.page_table) * PAGE_SIZE >= item.request.num_computed_tokens + item.num_tokens
            )


PAGE_SIZE = 16


def make_registry(directory: Path, ranks: Sequence[int]) -> AdapterRegistry:
    """Adapter i of a trace has the id i + 1."""
    registry = open_registry(directory / "state", shapes=LAYERS)
    for i, rank in enumerate(ranks):
        registry.register(str(i), write_adapter(directory / str(i), rank=rank, shapes=LAYERS))
    assert [record.num_bytes for record in map(registry.get, map(str, range(len(ranks))))] == [
        BYTES_PER_RANK * rank for rank in ranks
    ]
    return registry


class CountingPool(DevicePool):
    """Counts how often there was enough room, but in fragments around blocks that were loading."""

    num_fragmented = 0

    def try_place(self, layout: AdapterLayout) -> int | None:
        slot = super().try_place(layout)
        self.num_fragmented += slot is None
        return slot


@contextmanager
def virtual_engine(
    registry: AdapterRegistry, config: SimConfig, clock: VirtualClock, names: BlockNames | None = None
) -> Iterator[Engine]:
    """An engine with the limits of `config`, all its adapters in host memory; `play` it with the same
    clock. `names`: of pages that requests may share."""
    assert config.page_size == PAGE_SIZE
    assert (config.num_layers, config.bytes_per_rank) == (NUM_LAYERS, BYTES_PER_RANK)
    settings = EngineConfig(
        mode=config.mode,
        device_pool_bytes=config.device_pool_bytes if config.mode != "cached" else 2**22,
        host_store_bytes=2**22,
        eviction=config.eviction,
    )
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        max_adapter_wait_s=config.max_adapter_wait_s,
        scheduling_policy=config.scheduling_policy,
    )
    mode, loader = make_mode(config.mode), VirtualLoader(clock, config.perf_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "make_loader", lambda *_: loader)
        patch.setattr(device_memory, "DevicePool", CountingPool)
        patch.setattr(engine_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        adapters = AdapterManager(registry, settings, mode)
        runner: Any = VirtualRunner(clock, config.perf_model, adapters, mode)
        adapters.start()
        token_ms = config.perf_model.prefill.coefficients["tokens"]
        patch.setattr(
            adapters,
            "load_tokens",
            lambda a: loader.load_ns(registry.get_by_id(a).num_bytes) / NS_PER_MS / token_ms,
        )
        clock.now_ns = loader.free_ns = 0.0
        preload_host(adapters, registry.live_ids())
        info = EngineReady("virtual", config.max_model_len, config.max_num_seqs, 512, PAGE_SIZE, 0, 0, 0)
        scheduler = Scheduler(limits, PageAllocator(config.num_pages, PAGE_SIZE), adapters, names)
        engine = Engine(info, scheduler, runner, adapters, eos_token_ids=(), step_log=StepLog(""))
        try:
            yield engine
        finally:
            engine.close()


def play_virtually(
    registry: AdapterRegistry, config: SimConfig, trace: Trace
) -> tuple[list[Outcome], list[PlayedStep], dict[str, float]]:
    """What became of the requests, the steps, and by how much the engine's counters grew."""
    clock = VirtualClock()
    steps: list[PlayedStep] = []
    names = None if trace.blocks is None else TraceNames(trace.blocks, PAGE_SIZE)
    with virtual_engine(registry, config, clock, names) as engine:
        before = engine.stats(0).counters
        adapter_ids = [a + 1 for a in range(len(trace.ranks))]
        batch_tenants = [name for name in config.batch_tenants.split(",") if name]
        player = EnginePlayer(engine, adapter_ids, clock, on_step=steps.append, batch_tenants=batch_tenants)
        outcomes = player.play(trace)
        engine.check_integrity()
        grown = {name: value - before[name] for name, value in engine.stats(0).counters.items()}
        pool = engine.adapters.pool
        assert isinstance(pool, CountingPool)
        return outcomes, steps, {**grown, "fragmented": pool.num_fragmented}
