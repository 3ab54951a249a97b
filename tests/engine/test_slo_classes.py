"""Batch requests take what interactive ones leave, on a virtual clock."""

from typing import Any

import pytest

from tests.engine.test_fairness import World, make_scheduler
from tests.engine.test_scheduler import FakePlacement
from toppings.bad_input import MAX_INT
from toppings.core import BATCH_PRIORITY, Request, Standing
from toppings.engine.fair_clients import MAX_TURN_WAIT_S


def batch(world: World, num: int, *, outputs: int = 800, tenant: str = "") -> list[Request]:
    return [world.add(tenant, prompt=100, outputs=outputs, priority=BATCH_PRIORITY) for _ in range(num)]


def run(world: World, seconds: float) -> None:
    until = world.now + seconds
    while world.now < until:
        world.step()


def test_a_standing_says_the_class_beside_any_priority() -> None:
    assert Standing().scheduling_priority == 0
    ranks = [
        Standing(priority=priority, is_batch=has_time).scheduling_priority
        for has_time in (False, True)
        for priority in (-MAX_INT, -1, 0, 5, MAX_INT)
    ]
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("policy", ["fair", "fcfs", "priority"])
def test_batch_requests_start_after_all_interactive_ones_that_wait(policy: str) -> None:
    world = World(make_scheduler(policy, max_num_seqs=1))
    first = world.add(outputs=2)
    world.step()
    waiting = batch(world, 2, outputs=2)
    interactive = [world.add(tenant, outputs=2) for tenant in ("", "a")]
    started: list[Request] = []
    while len(world.scheduler.waiting):
        world.step()
        started += [r for r in world.scheduler.running if r is not first and r not in started]
    assert set(started[:2]) == set(interactive)
    assert started[2:] == waiting


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
@pytest.mark.parametrize("limits", [{"max_num_seqs": 8, "num_pages": 2000}, {"num_pages": 150}])
def test_an_interactive_request_takes_the_place_of_a_batch_one(policy: str, limits: dict[str, Any]) -> None:
    """Places or pages: the same tenant's requests, which fairness would never part."""
    alone = World(make_scheduler(policy, has_cache=True))
    alone.add("t", prompt=100, outputs=1)
    alone.step()
    world = World(make_scheduler(policy, has_cache=True, **limits))
    waiting = batch(world, 16, tenant="t")
    run(world, 5.0)
    world.ttft_s.clear()
    num_before = sum(r.num_preemptions for r in waiting)
    asked = [world.add("t", prompt=100, outputs=1)]
    run(world, 2.0)
    assert len(world.ttft_s["t"]) >= 1
    assert asked[0].output_token_ids
    first_s = world.ttft_s["t"][0]
    assert first_s <= 1.5 * alone.ttft_s["t"][0] + world.longest_step_s
    assert sum(r.num_preemptions for r in waiting) > num_before
    while len(world.scheduler.waiting) or world.scheduler.running:
        world.step()
    assert all(len(r.output_token_ids) == world.ends[r] for r in waiting)


def test_batch_requests_go_on_beside_interactive_ones_and_compute_little_again() -> None:
    """What has made way draws at least as much as it computes again. The cache keeps nothing here."""
    world = World(make_scheduler(max_num_seqs=4, num_pages=2000))
    waiting = batch(world, 4, outputs=600)
    num_steps = 0
    while not all(len(r.output_token_ids) == 600 for r in waiting):
        if num_steps % 10 == 0:
            world.add(prompt=100, outputs=20)
        world.step()
        num_steps += 1
        assert num_steps < 12000
    assert sum(r.num_preemptions for r in waiting) > 0
    for request in waiting:
        num_again = world.computed[request] - request.num_computed_tokens
        assert num_again <= len(request.output_token_ids) + request.num_tokens


def test_however_long_batch_requests_wait_they_do_not_stand_before_interactive_ones() -> None:
    """Many adapters' batch requests, of which some have had no start for minutes."""
    scheduler = make_scheduler(
        max_num_seqs=4, num_pages=4000, placement=FakePlacement(capacity=64), has_cache=True
    )
    world = World(scheduler)
    for adapter_id in range(20):
        for _ in range(4):
            world.add(prompt=100, outputs=900, adapter_id=adapter_id, priority=BATCH_PRIORITY)
    latest = 0.0
    while world.now < 3 * MAX_TURN_WAIT_S:
        asked = world.add(prompt=100, outputs=2)
        while not asked.output_token_ids:
            world.step()
        latest = max(latest, world.now - asked.arrived_at)
        run(world, 5.0)
    assert latest < 1.0


def test_alone_they_have_all_places() -> None:
    world = World(make_scheduler(max_num_seqs=8))
    batch(world, 12)
    world.step()
    run(world, 1.0)
    assert len(world.scheduler.running) == 8
