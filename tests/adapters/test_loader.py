import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.fixtures import NUM_LAYERS, SHAPES
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

BIG = AdapterLayout.build([[512, 512, 512, 512, 0, 0, 0]] * NUM_LAYERS, SHAPES, "float32")


def load_ms(link_gbps: float, num_loads: int = 1) -> float:
    loader = CpuLoader(torch.zeros(BIG.num_bytes // 4), link_gbps=link_gbps)
    started_at = time.perf_counter()
    handles = [loader.start(FakeSource(BIG), offsets(BIG)) for _ in range(num_loads)]
    for handle in handles:
        handle.wait_all()
    loader.close()
    return (time.perf_counter() - started_at) * 1e3


def test_emulated_link_is_never_faster_than_its_speed() -> None:
    gbps = BIG.num_bytes / 0.02 / 1e9  # a load of 20 ms
    assert load_ms(gbps) >= 20
    assert load_ms(gbps, num_loads=2) >= 40  # one after another


def test_link_half_as_fast_takes_about_twice_as_long() -> None:
    gbps = BIG.num_bytes / 0.04 / 1e9
    assert 1.3 < min(load_ms(gbps / 2) for _ in range(3)) / min(load_ms(gbps) for _ in range(3)) < 3


def test_idle_link_does_not_save_up_time() -> None:
    link = EmulatedLink(1.0)
    link.wait_for_transfer(time.perf_counter() - 10, 1000)
    started_at = time.perf_counter()
    link.wait_for_transfer(started_at, 5_000_000)
    assert time.perf_counter() - started_at >= 0.005


def test_sleeping_to_a_deadline_uses_little_cpu() -> None:
    cpu_time = time.thread_time()
    sleep_until(time.perf_counter() + 0.2)
    assert time.thread_time() - cpu_time < 0.1


def test_sleep_never_ends_early() -> None:
    for delay in (0.0, 1e-5, 1e-4, 3e-3):
        deadline = time.perf_counter() + delay
        sleep_until(deadline)
        assert time.perf_counter() >= deadline


class BrokenLoader(CpuLoader):
    """Its device fails, and fails again when it is asked to settle, as after an illegal access."""

    def _copy(self, job: LoadJob, steps: Sequence[LoadStep]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _settle(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_waiters_hear_of_a_device_that_has_failed_for_good(arena: torch.Tensor) -> None:
    loader = BrokenLoader(arena)
    for _ in range(2):  # and the thread lives on
        handle = loader.start(FakeSource(), offsets())
        with pytest.raises(AdapterError, match="illegal memory access"):
            handle.wait(0)
    loader.check()
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
    loader._thread.join(10)
    with pytest.raises(EngineLostError, match="adapter-loader"):
        loader.check()
    with pytest.raises(EngineLostError):
        loader.start(FakeSource(), offsets())
    loader.close()
