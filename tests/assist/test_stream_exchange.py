"""CPU assistance in a stream's order, with real workers and without a device."""

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.assist.stream_fakes import DeferredOps, EagerOps, WatchedOps, WatchedTensors, word_at
from tests.assist.world import (
    NUM_LAYERS,
    OUT_OFFSETS,
    PROFILE,
    SIZES,
    World,
    assert_same,
    cold,
    expected,
    forward,
    pool_settings,
    worker_pool,
)
from tests.streams import Device
from tests.waiting import PATIENCE_S, wait_until
from toppings.adapters.layout import BaseShapes
from toppings.assist.coordinator import AssistLora, Coordinator
from toppings.assist.cuda_stream_ops import CudaStreamOps, self_test, unavailable_reason
from toppings.assist.plan import Choice
from toppings.assist.pool import WorkerPool
from toppings.assist.profile import NUM_QUEUED, REPEATS, EngineProbes
from toppings.assist.stream_exchange import (
    GROUP_SLOTS,
    MAX_STREAM_ROWS,
    NUM_STREAM_SLOTS,
    StreamExchange,
    StreamOps,
)
from toppings.engine.assist import widest
from toppings.ops.lora import LoraSegments

ALL = [16] * 7


@pytest.fixture(scope="module")
def shared() -> World:
    return World(torch.float32)


@pytest.fixture(scope="module")
def shared_pool(shared: World) -> Iterator[WorkerPool]:
    settings = replace(pool_settings(shared), num_slots=NUM_STREAM_SLOTS, is_ordered=True)
    with worker_pool(settings) as pool:
        yield pool


@pytest.fixture
def here(shared: World) -> World:
    shared.reset()
    return shared


@pytest.fixture
def pool(shared_pool: WorkerPool) -> WorkerPool:
    shared_pool.wait_ready()
    return shared_pool


def coordinator(
    world: World, pool: WorkerPool, ops: StreamOps, **options: Any
) -> tuple[Coordinator, StreamExchange]:
    exchange = StreamExchange(pool, world.arena, ops, **{"deadline_s": PATIENCE_S, **options})
    item_bytes, arena = world.dtype.itemsize, world.arena
    return Coordinator(world.pool, pool, exchange, item_bytes, OUT_OFFSETS, PROFILE, arena), exchange


def test_the_hosts_part_of_the_way_is_measured_by_the_way_itself(here: World, pool: WorkerPool) -> None:
    """One forward and rows that go out and come back, as often as is asked for."""
    ops, forwards = EagerOps(), []
    exchange = StreamExchange(pool, here.arena, ops)
    device, shapes = Device(), BaseShapes(NUM_LAYERS, SIZES)
    probes = EngineProbes(
        pool,
        lambda num_tokens, _: forwards.append(num_tokens),
        lambda _: 0.0,
        shapes,
        here.dtype,
        cuda=device,
        exchange=exchange,
    )
    before = sum(worker.channel.done for worker in pool.workers_ready)
    layer_s, piece_s = probes.queue_s()
    exchange.close()
    answered = sum(worker.channel.done for worker in pool.workers_ready) - before
    assert (len(forwards), answered) == (1 + REPEATS, NUM_QUEUED * (1 + REPEATS))
    assert layer_s >= 0
    assert piece_s > 0
    assert EngineProbes(pool, probes.forward, probes.copy_s, shapes, here.dtype).queue_s() == (0.0, 0.0)


@pytest.mark.parametrize("choice", [Choice.CPU, Choice.CPU_SHRINK])
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("num_rows", [1, 13, 27, 300])
def test_a_cold_adapter_gives_what_a_warm_one_gives(
    here: World, pool: WorkerPool, choice: Choice, rank: int, num_rows: int
) -> None:
    load, warm = here.add_adapter([rank] * 7), here.add_adapter(ALL)
    for layer in range(NUM_LAYERS):
        warm.land(layer, "AB")
    segments = LoraSegments([0, 5, 5 + num_rows, 7 + num_rows], [warm.slot, load.slot, -1])
    assist, exchange = coordinator(here, pool, EagerOps())
    with assist.step(segments, [cold(load, choice)]) as lora:
        got = forward(lora, segments, here.dtype)
    exchange.close()
    # Where the CPU shrinks, the expand waits for B; short segments go to the CPU as a whole.
    assert load.num_waits == (NUM_LAYERS if choice is Choice.CPU_SHRINK and num_rows > 12 else 0)
    assert lora.stats.num_cpu_products == lora.stats.num_cold_products == 4 * NUM_LAYERS
    assert lora.stats.num_recomputed == 0
    assert_same(got, expected(here, [load, warm], segments), here.dtype)


def test_a_prompt_that_areas_cannot_hold_waits_for_its_weights(here: World, pool: WorkerPool) -> None:
    """And one that they hold beside it does not."""
    long, short = here.add_adapter([4] * 7), here.add_adapter([4] * 7)
    segments = LoraSegments([0, MAX_STREAM_ROWS + 1, MAX_STREAM_ROWS + 41], [long.slot, short.slot])
    assist, exchange = coordinator(here, pool, EagerOps())
    with assist.step(segments, [cold(long), cold(short)]) as lora:
        got = forward(lora, segments, here.dtype)
    exchange.close()
    assert (long.num_waits, short.num_waits) == (NUM_LAYERS, 0)
    assert_same(got, expected(here, [long, short], segments), here.dtype)


def test_a_channel_has_room_for_the_widest_group_and_no_more() -> None:
    sizes = (((4096, 4096),) * 4) + (((4096, 11008),) * 2) + ((11008, 4096),)
    assert widest(BaseShapes(32, sizes)) == (11008, 22016)


def test_forwards_follow_one_another_and_memory_is_given_back(here: World, pool: WorkerPool) -> None:
    ops = EagerOps()
    assist, exchange = coordinator(here, pool, ops)
    exchange.lock()
    assert len(ops.locked) == 2
    load = here.add_adapter(ALL)
    segments = LoraSegments([0, 40], [load.slot])
    right = expected(here, [load], segments)
    for _ in range(3):
        load.landed.clear()
        with assist.step(segments, [cold(load)]) as lora:
            assert_same(forward(lora, segments, here.dtype), right, here.dtype)
        assert lora.stats.num_cpu_products == 4 * NUM_LAYERS
        assert exchange._attendant is not None
        exchange._attendant.join()
    assert len(ops.locked) == 2
    exchange.close()
    assert not ops.locked


def test_the_host_never_waits_for_the_device(here: World, pool: WorkerPool) -> None:
    """A whole forward is queued while the device has not begun; then the workers answer all of it."""
    ops = DeferredOps()
    assist, exchange = coordinator(here, pool, ops)
    load, warm = here.add_adapter(ALL), here.add_adapter([8] * 7)
    segments = LoraSegments([0, 60, 90], [load.slot, warm.slot])
    with assist.step(segments, [cold(load), cold(warm, Choice.CPU_SHRINK)]) as lora:
        forward(lora, segments, here.dtype)
    assert lora.stats.num_cpu_products == 8 * NUM_LAYERS
    with assist.step(segments, [cold(load)]) as lora:  # that one is not over: the device waits for its load
        forward(lora, segments, here.dtype)
    assert lora.stats.num_cpu_products == 0
    assert load.num_waits == NUM_LAYERS
    finish(ops, pool, exchange)


def finish(ops: DeferredOps, pool: WorkerPool, exchange: StreamExchange) -> None:
    ops.run()
    wait_until(lambda: all(worker.channel.is_drained for worker in pool.workers_ready))
    ops.is_over = True
    exchange.close()


def test_a_ring_without_room_leaves_the_group_to_the_device(here: World, pool: WorkerPool) -> None:
    ops = DeferredOps()
    assist, exchange = coordinator(here, pool, ops)
    load = here.add_adapter(ALL)
    segments = LoraSegments([0, 40], [load.slot])
    with assist.step(segments, [cold(load)]) as lora:
        x, y = torch.zeros(40, 96), torch.zeros(40, 96)
        num_free = pool.workers_ready[0].channel.num_free_slots
        for _ in range(num_free - GROUP_SLOTS + 10):
            lora.start(0, "o", x)
            lora.finish(0, "o", x, y)
    assert load.num_waits == 1
    assert lora.stats.num_cpu_products == num_free - GROUP_SLOTS + 1
    finish(ops, pool, exchange)


@pytest.mark.parametrize("has_waits", [True, False])
def test_nothing_is_written_before_it_has_been_read(here: World, pool: WorkerPool, has_waits: bool) -> None:
    """A device and workers at any distance from one another, but for what they wait for."""
    ops = WatchedOps(pool.workers_ready, has_waits=has_waits)
    assist, exchange = coordinator(here, pool, ops)
    loads = [here.add_adapter(ALL), here.add_adapter([8] * 7)]
    segments = LoraSegments([0, 60, 90], [load.slot for load in loads])
    adapters = [cold(loads[0]), cold(loads[1], Choice.CPU_SHRINK)]
    with WatchedTensors(ops), assist.step(segments, adapters) as lora:
        got = forward(lora, segments, here.dtype)
    exchange.close()
    assert len(ops.device.accesses) > 4 * 8 * NUM_LAYERS
    if has_waits:
        ops.device.check()
        assert_same(got, expected(here, loads, segments), here.dtype)
    else:
        with pytest.raises(AssertionError, match="may overtake"):
            ops.device.check()


def run_with_fault(
    world: World, pool: WorkerPool, harm: Callable[[list[int]], None], deadline_s: float
) -> AssistLora:
    """Workers are stopped, asked, and then `harm` strikes; checks the outputs."""
    load = world.add_adapter(ALL)
    segments = LoraSegments([0, 64], [load.slot])
    assist, exchange = coordinator(world, pool, EagerOps(), deadline_s=deadline_s)
    with assist.step(segments, [cold(load)]) as lora:
        start = lora.start

        def start_and_harm(layer: int, group: str, x: Tensor) -> None:
            is_now = (layer, group) == (1, "gate_up")
            for pid in pool.pids if is_now else ():
                os.kill(pid, signal.SIGSTOP)
            start(layer, group, x)
            if is_now:
                harm(pool.pids)

        lora.start = start_and_harm  # type: ignore[method-assign]
        got = forward(lora, segments, world.dtype)
    exchange.close()
    assert lora.stats.num_cpu_products == 4 * NUM_LAYERS
    assert lora.stats.num_recomputed == exchange.num_recomputed > 0
    assert_same(got, expected(world, [load], segments), world.dtype)
    return lora


def kill_one(pids: list[int]) -> None:
    os.kill(pids[0], signal.SIGKILL)
    os.kill(pids[1], signal.SIGCONT)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def stop_one(pids: list[int]) -> None:
    os.kill(pids[1], signal.SIGCONT)


@pytest.mark.parametrize("harm", [kill_one, kill_all, stop_one])
def test_a_stream_does_not_hang_when_workers_do(
    here: World, pool: WorkerPool, harm: Callable[[list[int]], None]
) -> None:
    before = pool.pids
    run_with_fault(here, pool, harm, 1.0 if harm is stop_one else PATIENCE_S)
    pool.wait_ready()
    gone = [pid for pid in before if pid not in pool.pids]
    if harm is stop_one:
        assert before[0] in gone  # a busy machine may keep the other one from answering in time, too
    else:
        assert len(gone) == (2 if harm is kill_all else 1)
    load = here.add_adapter(ALL)
    segments = LoraSegments([0, 64], [load.slot])
    assist, exchange = coordinator(here, pool, EagerOps())
    with assist.step(segments, [cold(load)]) as lora:
        got = forward(lora, segments, here.dtype)
    exchange.close()
    assert lora.stats.num_recomputed == 0
    assert_same(got, expected(here, [load], segments), here.dtype)


def test_a_slice_that_cannot_be_computed_fails_the_step_and_not_the_stream(
    here: World, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*operands: object) -> None:
        raise ArithmeticError("broken")

    load = here.add_adapter(ALL)
    segments = LoraSegments([0, 64], [load.slot])
    assist, exchange = coordinator(here, pool, EagerOps())
    monkeypatch.setattr("toppings.assist.stream_exchange.compute_next", fail)
    with assist.step(segments, [cold(load)]) as lora:
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        forward(lora, segments, here.dtype)
    exchange.close()
    assert str(lora.stats.error) == "broken"
    pool.wait_ready()


class FakeDriver:
    """`cuda.bindings.driver` as far as it is used; the device sees the host's memory at other addresses."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS=92)
    CUstreamWriteValue_flags = SimpleNamespace(CU_STREAM_WRITE_VALUE_DEFAULT=0)
    CUstreamWaitValue_flags = SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.answers: dict[str, tuple[object, ...]] = {
            "cuDeviceGet": (0, 0),
            "cuDeviceGetAttribute": (0, 1),
            "cuMemHostGetDevicePointer": (0, 1 << 40),
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[object, ...]]:
        def function(*arguments: object) -> tuple[object, ...]:
            self.calls.append((name, *arguments))
            return self.answers.get(name, (0,))

        return function


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr("toppings.assist.cuda_stream_ops._stream", lambda: 7)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    return fake


def test_words_are_written_and_waited_for_where_the_device_sees_them(driver: FakeDriver) -> None:
    assert unavailable_reason() == ""
    driver.calls.clear()
    ops = CudaStreamOps()
    ops.lock(1000, 64)
    ops.write(1008, 3)
    ops.wait(1016, 4)
    assert driver.calls == [
        ("cuMemHostRegister", 1000, 64, 3),
        ("cuMemHostGetDevicePointer", 1000, 0),
        ("cuStreamWriteValue64", 7, (1 << 40) + 8, 3, 0),
        ("cuStreamWaitValue64", 7, (1 << 40) + 16, 4, 0),
    ]
    with pytest.raises(KeyError, match="0x428"):
        ops.write(1064, 3)
    ops.unlock(1000)
    with pytest.raises(KeyError, match="not page-locked"):
        ops.write(1008, 3)


class QueuedOps(EagerOps):
    """A device that stands still where a word has not come; `how` it fails, if it does."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.awaited: list[tuple[int, int]] = []

    def lock(self, address: int, num_bytes: int) -> None:
        if self.how == "lock":
            raise RuntimeError("cuMemHostRegister failed: CUDA_ERROR_NOT_SUPPORTED")
        super().lock(address, num_bytes)

    def write(self, address: int, value: int) -> None:
        if self.how != "write":
            super().write(address, value)

    def wait(self, address: int, value: int) -> None:
        if self.how != "wait":
            self.awaited.append((address, value + (self.how == "hang")))

    def mark(self) -> Callable[[], bool]:
        return lambda: all(word_at(address).value >= value for address, value in self.awaited)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("", ""),
        ("lock", "CUDA_ERROR_NOT_SUPPORTED"),
        ("write", "write does not reach"),
        ("wait", "does not wait"),
        ("hang", "does not end within 0.02 s"),
    ],
)
def test_stream_operations_are_tried_before_they_are_relied_on(how: str, reason: str) -> None:
    told = self_test(QueuedOps(how), 0.02)
    assert reason in told if reason else not told


def test_a_driver_that_refuses_is_named(driver: FakeDriver) -> None:
    ops = CudaStreamOps()
    driver.answers["cuMemHostRegister"] = (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),)
    with pytest.raises(RuntimeError, match="cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY"):
        ops.lock(1000, 64)
    driver.answers["cuDeviceGetAttribute"] = (0, 0)
    assert "8-byte words" in unavailable_reason()
    driver.answers["cuDeviceGet"] = (SimpleNamespace(name="CUDA_ERROR_NO_DEVICE"), None)
    assert "CUDA_ERROR_NO_DEVICE" in unavailable_reason()
