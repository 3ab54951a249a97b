from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.fixtures import NUM_LAYERS, SHAPES
from tests.waiting import PATIENCE_S
from toppings.adapters import link
from toppings.adapters import loader as loader_module
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import AdapterLayout, LoadOrder, b_first, by_layer
from toppings.adapters.link import EmulatedLink, sleep_until
from toppings.adapters.loader import (
    CpuLoader,
    LoadHandle,
    LoadJob,
    LoadStep,
    plan_steps,
)
from toppings.vital import EngineLostError

LAYOUT = AdapterLayout.build([[4, 0, 8, 0, 0, 0, 0], [0] * 7, [2, 1, 0, 0, 0, 0, 3]], SHAPES, "float32")


class FakeSource:
    """An adapter in host memory, of which as many layers are read as a test says."""

    def __init__(self, layout: AdapterLayout = LAYOUT, *, num_layers_ready: int = NUM_LAYERS) -> None:
        self.adapter_id = 7
        self.layout = layout
        self.num_layers_ready = num_layers_ready
        self.error: AdapterError | None = None
        self.data = np.random.default_rng(0).integers(0, 255, layout.num_bytes, dtype=np.uint8)

    def layer_view(self, layer: int) -> Any:
        start = self.layout.layer_offset_bytes(layer)
        return self.data[start : start + self.layout.layer_bytes(layer)]


def offsets(layout: AdapterLayout = LAYOUT) -> list[int]:
    """Blocks in the arena in reverse order, to tell places from sources."""
    sizes = [layout.layer_bytes(layer) for layer in range(layout.num_layers)]
    return [sum(sizes[layer + 1 :]) for layer in range(layout.num_layers)]


def landed(arena: torch.Tensor, source: FakeSource, layer: int) -> bool:
    start, view = offsets(source.layout)[layer], source.layer_view(layer)
    return bool((arena.view(torch.uint8).numpy()[start : start + len(view)] == view).all())


@pytest.fixture
def arena() -> torch.Tensor:
    return torch.zeros(LAYOUT.num_bytes // 4)


@pytest.fixture
def loader(arena: torch.Tensor) -> Iterator[CpuLoader]:
    loader = CpuLoader(arena)
    yield loader
    loader.close()


@pytest.mark.parametrize("order", [by_layer(range(NUM_LAYERS)), b_first(NUM_LAYERS)])
def test_every_layer_lands_in_its_place(arena: torch.Tensor, loader: CpuLoader, order: LoadOrder) -> None:
    source = FakeSource()
    handle = loader.start(source, offsets(), order)
    handle.wait_all()
    assert handle.done
    assert all(handle.layer_ready(layer) and landed(arena, source, layer) for layer in range(NUM_LAYERS))
    assert all(at is not None and at >= handle.started_at for at in handle.landed_at)
    assert handle.num_layers_ready == NUM_LAYERS


def test_layers_follow_the_read_from_disk(arena: torch.Tensor, loader: CpuLoader) -> None:
    source = FakeSource(num_layers_ready=1)
    handle = loader.start(source, offsets())
    handle.wait(0)
    assert landed(arena, source, 0)
    assert not handle.layer_ready(1)
    assert not handle.done
    source.num_layers_ready = NUM_LAYERS
    loader.notify()
    handle.wait_all()
    assert landed(arena, source, 2)


def test_load_that_waits_for_the_disk_lets_others_pass(loader: CpuLoader) -> None:
    blocked = loader.start(FakeSource(num_layers_ready=0), offsets())
    loader.start(FakeSource(), offsets()).wait_all()
    assert not blocked.layer_ready(0)


def test_failed_read_reaches_whoever_waits(loader: CpuLoader) -> None:
    source = FakeSource(num_layers_ready=1)
    handle = loader.start(source, offsets())
    handle.wait(0)
    source.error = AdapterError("damaged in layer 1")
    loader.notify()
    with pytest.raises(AdapterError, match="damaged in layer 1"):
        handle.wait(1)
    handle.wait(0)  # that one is there
    assert handle.error is source.error
    assert not handle.done


def test_unforeseen_failure_reaches_whoever_waits(loader: CpuLoader) -> None:
    handle = loader.start(FakeSource(), [10**9] * NUM_LAYERS)
    with pytest.raises(AdapterError, match="load failed"):
        handle.wait_all()
    loader.start(FakeSource(), offsets()).wait_all()  # the thread lives on


def test_closing_fails_loads_under_way(arena: torch.Tensor) -> None:
    loader = CpuLoader(arena)
    handle = loader.start(FakeSource(num_layers_ready=0), offsets())
    loader.close()
    with pytest.raises(AdapterError, match="closed"):
        handle.wait(0)


def test_b_first_brings_every_b_half_before_any_a_half() -> None:
    steps = plan_steps(LAYOUT, b_first(NUM_LAYERS))
    assert [(step.layer, step.halves) for step in steps] == [(i, h) for h in "BA" for i in range(NUM_LAYERS)]
    assert sum(step.stop - step.start for step in steps) == LAYOUT.num_bytes
    assert steps[0].start == LAYOUT.layers[0].numel_a * 4


def test_b_is_ready_before_its_layer() -> None:
    handle = LoadHandle(FakeSource(), b_first(NUM_LAYERS))
    handle._finish(handle.steps[:NUM_LAYERS], 0.0)
    assert handle.b_ready(0)
    assert not handle.layer_ready(0)


# --- the emulated link ---


class Clock:
    """Time passes only while somebody sleeps, and then exactly as long; `slept_s` are their sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept_s: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The link's and the loader's."""
    clock = Clock()
    monkeypatch.setattr(link, "time", clock)
    monkeypatch.setattr(loader_module, "time", clock)
    return clock


@pytest.mark.parametrize("gbps", [0.5, 1.0, 8.0])
def test_loads_over_an_emulated_link_take_as_long_as_their_bytes(clock: Clock, gbps: float) -> None:
    loader = CpuLoader(torch.zeros(LAYOUT.num_bytes // 4), link_gbps=gbps)
    started_at = clock.now
    handles = [loader.start(FakeSource(), offsets()) for _ in range(2)]  # one after another
    for handle in handles:
        handle.wait_all()
    loader.close()
    assert clock.now - started_at == pytest.approx(2 * LAYOUT.num_bytes / (gbps * 1e9))


def test_idle_link_does_not_save_up_time(clock: Clock) -> None:
    idle = EmulatedLink(1.0)
    idle.wait_for_transfer(clock.now - 10, 1000)
    assert clock.slept_s == []
    idle.wait_for_transfer(clock.now, 5_000_000)
    assert clock.slept_s == [pytest.approx(0.005)]


def test_a_sleep_that_ends_early_goes_on(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = clock.sleep
    monkeypatch.setattr(clock, "sleep", lambda seconds: sleep(max(seconds / 2, 1e-6)))
    deadline = clock.now + 1.0
    sleep_until(deadline)
    assert clock.now >= deadline
    assert len(clock.slept_s) > 2


def test_a_deadline_that_is_over_is_no_sleep(clock: Clock) -> None:
    sleep_until(clock.now)
    assert clock.slept_s == []


class BrokenLoader(CpuLoader):
    """Its device fails, and fails again when it is asked to settle, as after an illegal access."""

    def _copy(self, job: LoadJob, steps: Sequence[LoadStep]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _settle(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_waiters_hear_of_a_device_that_has_failed_for_good(arena: torch.Tensor) -> None:
    loader = BrokenLoader(arena)
    handle = loader.start(FakeSource(), offsets())
    with pytest.raises(AdapterError, match="illegal memory access"):
        handle.wait(0)
    loader._thread.join(PATIENCE_S)
    with pytest.raises(EngineLostError, match="illegal memory access"):  # the engine is to end
        loader.start(FakeSource(), offsets())
    loader.close()


def test_loads_under_way_fail_at_close_even_if_the_device_has_failed(arena: torch.Tensor) -> None:
    loader = BrokenLoader(arena)
    handle = loader.start(FakeSource(num_layers_ready=0), offsets())
    loader.close()
    with pytest.raises(AdapterError, match="closed"):
        handle.wait(0)


def test_a_loader_whose_thread_has_failed_fails_its_loads_and_says_so(arena: torch.Tensor) -> None:
    class Faulty(CpuLoader):
        def _advance(self, job: LoadJob) -> None:
            raise MemoryError

    loader = Faulty(arena)
    handle = loader.start(FakeSource(), offsets())
    with pytest.raises(AdapterError):
        handle.wait(0)
    loader._thread.join(PATIENCE_S)
    with pytest.raises(EngineLostError, match="adapter-loader"):
        loader.check()
    with pytest.raises(EngineLostError):
        loader.start(FakeSource(), offsets())
    loader.close()
