"""Which cores the workers get, and what one of them computes."""

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.assist.world import SIZES, World
from tests.waiting import PATIENCE_S, wait_until
from toppings.assist import pool as pool_module
from toppings.assist import worker as worker_module
from toppings.assist.channel import SLOT_WORDS, Channel
from toppings.assist.cores import MAX_DEFAULT_WORKERS, WorkerCores, choose_cores
from toppings.assist.pool import NoWorkersError, PoolSettings, WorkerPool
from toppings.assist.product import Form, GroupWeights, Slice
from toppings.assist.worker import Worker, WorkerSettings
from toppings.core import GROUPS


def test_workers_get_the_cores_that_the_base_model_leaves_free() -> None:
    assert choose_cores((0, 1, 2, 3), 2) == WorkerCores((2, 3), is_shared=False)


def test_where_no_core_is_free_one_is_shared_and_the_log_says_so() -> None:
    cores = choose_cores((4, 5), 2)
    assert cores == WorkerCores((5,), is_shared=True)
    assert str(cores) == "1 LoRA worker on core 5, shared with the base model"


def test_more_workers_than_free_cores_share() -> None:
    assert choose_cores((0, 1, 2, 3), 3, num_workers=2) == WorkerCores((2, 3), is_shared=True)


def test_on_a_large_host_there_are_no_more_workers_than_a_prompt_has_rows_for() -> None:
    cores = choose_cores(tuple(range(112)), 2)
    assert cores == WorkerCores(tuple(range(112 - MAX_DEFAULT_WORKERS, 112)), is_shared=False)
    assert len(choose_cores(tuple(range(112)), 2, num_workers=40).cores) == 40


def test_workers_that_do_not_start_in_time_are_given_up(
    world: World, workers: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(*, by_force: bool) -> None:
        closed.append(by_force)

    closed: list[bool] = []
    ready = SimpleNamespace(is_ready=True, is_lost=False)
    late = SimpleNamespace(is_ready=False, is_lost=False, close=close)
    monkeypatch.setattr(pool_module, "_start_workers", lambda _: [late, ready, late])
    pool = WorkerPool(workers.settings)
    pool.wait_ready(0.02)
    assert pool.workers_ready == [ready]
    assert closed == [True, True]
    monkeypatch.setattr(pool_module, "_start_workers", lambda _: [late])
    with pytest.raises(NoWorkersError, match=r"no LoRA worker is ready after 0\.02 s"):
        WorkerPool(workers.settings).wait_ready(0.02)


def test_where_processes_run_out_there_are_fewer_workers(
    workers: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(settings: PoolSettings, core: int) -> int:
        if len(started) == limit:
            raise OSError("no more processes")
        started.append(core)
        return core

    started: list[int] = []
    limit = 1
    monkeypatch.setattr(pool_module, "Worker", start)
    made: list[Any] = list(pool_module._start_workers(workers.settings))
    assert made == [workers.settings.cores.cores[0]]
    started, limit = [], 0
    with pytest.raises(NoWorkersError):
        pool_module._start_workers(workers.settings)


def test_given_cores_are_taken() -> None:
    assert choose_cores((0, 1, 2, 3), 2, cores=(1, 3)) == WorkerCores((1, 3), is_shared=False)


@pytest.mark.parametrize(
    ("num_workers", "cores", "message"),
    [
        (3, (), "3 workers asked for; only 2"),
        (0, (7,), r"worker cores are \[7\]"),
        (0, (1, 1), r"worker cores are \[1, 1\]"),
        (2, (1,), "2 workers and 1 cores"),
    ],
)
def test_impossible_cores_are_refused(num_workers: int, cores: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_cores((0, 1), 1, num_workers=num_workers, cores=cores)


def test_a_slice_survives_its_words() -> None:
    weights = GroupWeights(96, (8, 0, 4), (96, 0, 32), (100, -1, 900), (2000, -1, 3000))
    request = Slice(Form.SHRINK, 17, 64, 4096, weights)
    assert Slice.from_words([*request.to_words(), 0, 0, 0]) == request


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("group", list(GROUPS))
def test_a_worker_computes_what_plain_torch_does(
    world: World, workers: WorkerPool, form: Form, group: str
) -> None:
    load = world.add_adapter([4, 8, 0, 16, 32, 3, 64])
    start = load.entry.offsets[1] // world.dtype.itemsize
    weights = GroupWeights.locate(load.entry.layout, 1, group, start)
    x = torch.randn(50, weights.num_in).to(world.dtype)
    with workers.session() as awake:
        ticket = awake[0].try_post(form, weights, x)
        assert ticket is not None
        assert awake[0].wait(ticket.number)
    block, parts = load.entry.layout.layers[1], []
    for module in GROUPS[group]:
        num_in, num_out = SIZES[module]
        a_start, b_start, rank = (
            start + block.a_offsets[module],
            start + block.b_offsets[module],
            block.ranks[module],
        )
        if rank:
            a = world.arena[a_start : a_start + rank * num_in].view(rank, num_in).float()
            b = world.arena[b_start : b_start + rank * num_out].view(rank, num_out).float()
            h = x.float() @ a.t()
            parts.append(h @ b if form is Form.FULL else h)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[world.dtype]
    torch.testing.assert_close(ticket.result.float(), torch.cat(parts, 1), rtol=tolerance, atol=tolerance)


def test_a_worker_with_a_core_of_its_own_watches_in_a_session_and_sleeps_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a thread; it gets one byte in its pipe, and is asked for many slices."""
    monkeypatch.setattr(worker_module, "compute_next", lambda *_: None)
    monkeypatch.setattr(worker_module, "SPIN_S", PATIENCE_S)
    engine = Channel.create(num_slots=4, input_bytes=64, output_bytes=64)
    wake_fd, nudge_fd = os.pipe()
    settings = WorkerSettings(
        channel_fd=engine.fd,
        wake_fd=wake_fd,
        arena_fd=-1,
        arena_bytes=0,
        dtype="float32",
        core=None,
        is_core_shared=False,
        nice=0,
        parent_pid=os.getpid(),
    )
    worker = Worker(Channel(os.dup(engine.fd)), torch.zeros(1), settings)
    sleeps: list[int] = []  # what was done before each

    def sleep() -> bool:
        sleeps.append(engine.done)
        return Worker._sleep(worker)

    monkeypatch.setattr(worker, "_sleep", sleep)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    engine.set_active(True)
    os.write(nudge_fd, b"!")
    for _ in range(20):
        engine.announce(engine.post([0] * SLOT_WORDS))
        wait_until(lambda: engine.is_drained)
    engine.set_active(False)
    wait_until(lambda: len(sleeps) == 2)
    os.close(nudge_fd)
    thread.join(PATIENCE_S)
    assert sleeps == [0, 20]
    assert not thread.is_alive()


def test_each_worker_is_bound_to_its_core(workers: WorkerPool) -> None:
    cores = [os.sched_getaffinity(pid) for pid in workers.pids]
    assert cores == [{core} for core in workers.settings.cores.cores]


def test_a_result_stays_while_the_same_worker_computes_the_next(world: World, workers: WorkerPool) -> None:
    load = world.add_adapter([8] * 7)
    weights = GroupWeights.locate(load.entry.layout, 0, "o", load.entry.offsets[0] // world.dtype.itemsize)
    with workers.session() as awake:
        tickets = []
        for scale in (1.0, 2.0):
            ticket = awake[0].try_post(Form.FULL, weights, torch.full((20, 96), scale, dtype=world.dtype))
            assert ticket is not None
            assert awake[0].wait(ticket.number)
            tickets.append(ticket)
    torch.testing.assert_close(2 * tickets[0].result, tickets[1].result)
