"""Which cores the workers get, and what one of them computes."""

import os
from pathlib import Path

import pytest
import torch

from tests.assist.world import OUT_OFFSETS, SIZES, World, cold, make_coordinator, pool_settings, worker_pool
from toppings.assist.cores import WorkerCores, choose_cores
from toppings.assist.pool import PoolSettings, WorkerPool
from toppings.assist.product import Form, GroupWeights, Slice
from toppings.core import GROUPS
from toppings.ops.lora import LoraSegments


def test_workers_get_the_cores_that_the_base_model_leaves_free() -> None:
    assert choose_cores((0, 1, 2, 3), 2) == WorkerCores((2, 3), is_shared=False)


def test_where_no_core_is_free_one_is_shared_and_the_log_says_so() -> None:
    cores = choose_cores((4, 5), 2)
    assert cores == WorkerCores((5,), is_shared=True)
    assert str(cores) == "1 LoRA worker on core 5, shared with the base model"


def test_more_workers_than_free_cores_share() -> None:
    assert choose_cores((0, 1, 2, 3), 3, num_workers=2) == WorkerCores((2, 3), is_shared=True)


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


def test_a_worker_with_a_core_of_its_own_spins_in_a_session_only() -> None:
    world = World(torch.float32)
    settings = pool_settings(world, num_workers=1, deadline_s=60.0)
    settings = PoolSettings(
        **{**settings.__dict__, "cores": WorkerCores(settings.cores.cores, is_shared=False)}
    )
    load = world.add_adapter([8] * 7)
    segments = LoraSegments([0, 64], [load.slot])
    x, y = torch.ones(64, 96), torch.zeros(64, OUT_OFFSETS["qkv"][-1] + 32)
    with worker_pool(settings) as pool:
        with make_coordinator(world, pool).step(segments, [cold(load)]) as lora:
            for _ in range(20):
                lora.start(0, "qkv", x)
                lora.finish(0, "qkv", x, y)
        assert lora.stats.num_recomputed == 0
        before = _num_voluntary_switches(pool.pids[0])
        with make_coordinator(world, pool).step(segments, [cold(load)]) as lora:
            for _ in range(20):
                lora.start(0, "qkv", x)
                lora.finish(0, "qkv", x, y)
        # Once to sleep after the session, and a few for nudges where this machine is busy; not one a request.
        assert _num_voluntary_switches(pool.pids[0]) - before < 20


def _num_voluntary_switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


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
