"""Workers that die, hang or are overrun: results stay right, workers come back, and nothing is left
behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.assist.world import (
    NUM_LAYERS,
    World,
    assert_same,
    cold,
    expected,
    forward,
    make_coordinator,
    pool_settings,
    worker_pool,
)
from tests.waiting import PATIENCE_S, wait_until
from tests.warm import WARM
from toppings.assist.coordinator import AssistLora
from toppings.assist.pool import WorkerPool
from toppings.ops.lora import LoraSegments

RANKS = [16] * 7


@pytest.fixture(scope="module")
def world_fp32() -> World:
    return World(torch.float32)


@pytest.fixture(scope="module")
def frail_pool(world_fp32: World) -> Iterator[WorkerPool]:
    with worker_pool(pool_settings(world_fp32, deadline_s=PATIENCE_S)) as pool:
        yield pool


@pytest.fixture
def frail(world_fp32: World, frail_pool: WorkerPool) -> WorkerPool:
    """Two workers, whatever an earlier test did to theirs."""
    world_fp32.reset()
    frail_pool.wait_ready()
    frail_pool.num_restarts = 0
    return frail_pool


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_with_fault(world: World, pool: WorkerPool, harm: Callable[[], None]) -> AssistLora:
    """A forward whose workers are stopped and loaded with slices when `harm` strikes; checks the outputs."""
    load = world.add_adapter(RANKS)
    segments = LoraSegments([0, 64], [load.slot])
    with make_coordinator(world, pool).step(segments, [cold(load)]) as lora:
        start = lora.start

        def start_and_harm(layer: int, group: str, x: Tensor) -> None:
            if (layer, group) != (1, "gate_up"):
                start(layer, group, x)
                return
            pids = pool.pids
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            start(layer, group, x)  # the slices are posted, and cannot be answered yet
            harm()
            for pid in pids[1:]:  # `harm` decides about the first one
                os.kill(pid, signal.SIGCONT)

        lora.start = start_and_harm  # type: ignore[method-assign]
        got = forward(lora, segments, world.dtype)
    assert_same(got, expected(world, [load], segments), world.dtype)
    return lora


def assert_recovers(world: World, pool: WorkerPool, num_restarts: int) -> None:
    pool.wait_ready()
    assert pool.num_restarts == num_restarts
    load = world.add_adapter(RANKS)
    segments = LoraSegments([0, 64], [load.slot])
    with make_coordinator(world, pool).step(segments, [cold(load)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert lora.stats.num_recomputed == 0
    assert lora.stats.num_cpu_products == 4 * NUM_LAYERS
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_a_worker_killed_in_mid_prefill_costs_a_recomputation(world_fp32: World, frail: WorkerPool) -> None:
    lora = run_with_fault(world_fp32, frail, lambda: os.kill(frail.pids[0], signal.SIGKILL))
    assert lora.stats.num_recomputed == 1
    assert_recovers(world_fp32, frail, num_restarts=1)


def test_a_stopped_worker_is_replaced_after_its_deadline(world_fp32: World, frail: WorkerPool) -> None:
    stopped = frail.pids[0]
    frail.workers_ready[0]._deadline_s = 0.5  # of the others' a busy machine makes no fault
    lora = run_with_fault(world_fp32, frail, lambda: None)
    assert lora.stats.num_recomputed == 1
    assert not is_running(stopped)
    assert_recovers(world_fp32, frail, num_restarts=1)


def test_all_workers_killed_leaves_the_rest_of_the_prefill_to_the_device(
    world_fp32: World, frail: WorkerPool
) -> None:
    def kill_all() -> None:
        for pid in frail.pids:
            os.kill(pid, signal.SIGKILL)

    lora = run_with_fault(world_fp32, frail, kill_all)
    assert lora.stats.num_recomputed == 2
    assert lora.stats.num_cpu_products < lora.stats.num_cold_products
    assert_recovers(world_fp32, frail, num_restarts=2)


def test_a_full_channel_is_computed_in_process(world_fp32: World) -> None:
    world_fp32.reset()
    load = world_fp32.add_adapter(RANKS)
    segments = LoraSegments([0, 600], [load.slot])
    settings = pool_settings(world_fp32, max_input_bytes=64 * 96 * 4)
    with (
        worker_pool(settings) as pool,
        make_coordinator(world_fp32, pool).step(segments, [cold(load)]) as lora,
    ):
        got = forward(lora, segments, world_fp32.dtype)
    assert lora.stats.num_recomputed > 0
    assert load.num_waits == 0
    assert_same(got, expected(world_fp32, [load], segments), world_fp32.dtype)


def test_a_worker_that_cannot_compute_is_replaced(world_fp32: World, frail: WorkerPool) -> None:
    load = world_fp32.add_adapter(RANKS)
    load.entry.offsets = [offset + (1 << 30) for offset in load.entry.offsets]  # beyond the arena
    segments = LoraSegments([0, 26], [load.slot])
    x = torch.zeros(26, 96)
    with make_coordinator(world_fp32, frail).step(segments, [cold(load)]) as lora:
        lora.start(0, "o", x)
        with pytest.raises(RuntimeError):  # in process it is no better: this is a bug, not a fault
            lora.finish(0, "o", x, torch.zeros(26, 96))
    wait_until(lambda: len(frail.workers_ready) < 2)


def test_before_workers_have_started_the_device_waits_for_the_weights(world_fp32: World) -> None:
    world_fp32.reset()
    load = world_fp32.add_adapter(RANKS)
    segments = LoraSegments([0, 64], [load.slot])
    pool = WorkerPool(pool_settings(world_fp32, num_workers=1))
    try:
        with make_coordinator(world_fp32, pool).step(segments, [cold(load)]) as lora:
            os.kill(pool.pids[0], signal.SIGSTOP)
            got = forward(lora, segments, world_fp32.dtype)
    finally:
        os.kill(pool.pids[0], signal.SIGKILL)
        pool.close()
    assert load.num_waits == NUM_LAYERS
    assert_same(got, expected(world_fp32, [load], segments), world_fp32.dtype)


def test_a_worker_that_hangs_in_its_start_is_replaced(world_fp32: World) -> None:
    pool = WorkerPool(pool_settings(world_fp32, num_workers=1, start_timeout_s=0.0))
    try:
        pids = pool.pids
        os.kill(pids[0], signal.SIGSTOP)
        pool.restart_dead()
        assert pool.pids != pids
        assert not is_running(pids[0])
        assert pool.num_restarts == 1
    finally:
        pool.close()


def test_idle_workers_sleep_until_they_are_woken(world_fp32: World, frail: WorkerPool) -> None:
    """As the kernel counts: one that looks again and again falls asleep again and again."""
    with frail.session():
        pass  # awake once, then asleep again
    wait_until(lambda: all(_is_asleep(pid) for pid in frail.pids))
    before = [_num_sleeps(pid) for pid in frail.pids]
    time.sleep(0.5)
    assert all(_is_asleep(pid) for pid in frail.pids)
    assert [_num_sleeps(pid) for pid in frail.pids] == before


def _is_asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def _num_sleeps(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def test_closing_the_pool_ends_its_workers(world_fp32: World) -> None:
    with worker_pool(pool_settings(world_fp32, num_workers=1)) as pool:
        pids = pool.pids
    assert not any(is_running(pid) for pid in pids)


ENGINE = """
import os, signal, sys, time, torch
from tests.assist.world import World, pool_settings
from toppings.assist.pool import WorkerPool
pool = WorkerPool(pool_settings(World(torch.float32)))
pool.wait_ready()
if sys.argv[1] == "working":
    session = pool.session()
    session.__enter__()
if sys.argv[1] == "stopped":
    [os.kill(pid, signal.SIGSTOP) for pid in pool.pids]
names = [line.split()[5] for line in open("/proc/self/maps") if "/dev/shm/" in line]
assert not names, names
print(*pool.pids, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["asleep", "working", "stopped"])
def test_nothing_is_left_when_the_engine_is_killed(state: str) -> None:
    """Their memory has no name (`memfd_create`): with the last process it is gone."""
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, state],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, WARM: "2", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert engine.stdout is not None
    pids = [int(pid) for pid in engine.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    engine.kill()
    engine.wait()
    engine.stdout.close()
    wait_until(lambda: not any(is_running(pid) for pid in pids))
