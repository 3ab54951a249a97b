"""The scheduler decides; it is tested on a virtual clock with fake adapter placement."""

import random

import pytest

from toppings.bad_input import RequestError
from toppings.core import Admission, Batch, FinishReason, Request
from toppings.engine.pages import PageAllocator
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.sampling_params import SamplingParams


class FakePlacement:
    """Room for `capacity` adapters of equal size; those in `on_disk` are not readable yet."""

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self.users: dict[int, int] = {}
        self.resident: list[int] = []
        self.on_disk: set[int] = set()
        self.unreadable: set[int] = set()
        self.load_cost = 0.0
        self.prefetched: list[int] = []

    def prefetch(self, adapter_id: int) -> None:
        self.prefetched.append(adapter_id)

    def holds(self, adapter_id: int) -> bool:
        return adapter_id in self.resident

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        if adapter_id in self.unreadable:
            raise ValueError(f"adapter {adapter_id} cannot be read")
        if adapter_id in self.on_disk:
            return Admission.LOADING
        if adapter_id not in self.resident and not self._make_room():
            return Admission.NO_ROOM
        if adapter_id not in self.resident:
            self.resident.append(adapter_id)
        self.users[adapter_id] = self.users.get(adapter_id, 0) + 1
        return Admission.READY

    def _make_room(self) -> bool:
        idle = [a for a in self.resident if not self.users.get(a)]
        if len(self.resident) >= self.capacity and idle:
            self.resident.remove(idle[0])
        return len(self.resident) < self.capacity

    def may_acquire(self, adapter_id: int) -> bool:
        if adapter_id in self.unreadable or adapter_id in self.resident:
            return True
        idle = [a for a in self.resident if not self.users.get(a)]
        return adapter_id not in self.on_disk and (len(self.resident) < self.capacity or bool(idle))

    def release(self, adapter_id: int) -> None:
        self.users[adapter_id] -= 1

    def load_tokens(self, adapter_id: int) -> float:
        return self.load_cost

    def victims_for(self, adapter_id: int) -> list[int]:
        return [a for a in self.resident if self.users.get(a)][:1]


def make_scheduler(
    *,
    num_pages: int = 100,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_adapter_wait_s: float = 1.0,
    placement: FakePlacement | None = None,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=64,
        max_adapter_wait_s=max_adapter_wait_s,
    )
    return Scheduler(limits, PageAllocator(num_pages, 4), placement or FakePlacement())


def make_request(name: str, num_prompt: int = 6, adapter_id: int | None = None, at: float = 0.0) -> Request:
    sampling = SamplingParams(max_tokens=8)
    return Request(name, list(range(num_prompt)), sampling, adapter_id, arrived_at=at)


def run_step(scheduler: Scheduler, now: float = 0.0, *, finish_at: int = 8) -> Batch:
    """One step with a model that always draws token 7; sequences end after `finish_at` tokens."""
    batch = scheduler.schedule(now)
    drawing = [item for item in batch.items if item.needs_sample]
    scheduler.commit(batch)
    for item in drawing:
        item.request.output_token_ids.append(7)
        if len(item.request.output_token_ids) >= finish_at:
            scheduler.finish(item.request)
    scheduler.check_integrity()
    return batch


def names(batch: Batch) -> list[str]:
    return [item.request.request_id for item in batch.items]


def test_long_prompts_are_prefilled_in_chunks_of_the_token_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    scheduler.add(make_request("a", num_prompt=25))
    assert [run_step(scheduler).num_tokens for _ in range(4)] == [10, 10, 5, 1]


def test_decodes_come_before_prefills_and_each_kind_is_sorted_by_adapter() -> None:
    scheduler = make_scheduler()
    for name, adapter_id in (("a", 2), ("b", None), ("c", 1)):
        scheduler.add(make_request(name, adapter_id=adapter_id))
    run_step(scheduler)
    for name, adapter_id in (("d", 2), ("e", 1)):
        scheduler.add(make_request(name, adapter_id=adapter_id, at=1.0))
    assert names(run_step(scheduler)) == ["b", "c", "a", "e", "d"]


def test_running_requests_keep_decoding_while_a_new_prompt_is_prefilled() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    run_step(scheduler)
    scheduler.add(make_request("b", at=1.0))
    batch = run_step(scheduler)
    assert [(n, i.num_tokens) for n, i in zip(names(batch), batch.items)] == [("a", 1), ("b", 6)]


def test_at_most_max_num_seqs_run_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(5):
        scheduler.add(make_request(f"r{i}", at=i))
    assert names(run_step(scheduler)) == ["r0", "r1"]


def test_the_last_to_arrive_is_preempted_when_pages_run_out_and_then_computes_all_its_tokens_again() -> None:
    scheduler = make_scheduler(num_pages=16)
    old, young = make_request("old", 24, at=0.0), make_request("young", 24, at=1.0)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(10):
        run_step(scheduler, finish_at=1000)
    assert (young.num_preemptions, old.num_preemptions) == (1, 0)
    assert young.num_computed_tokens == 0
    assert young.page_table == []
    scheduler.finish(old)
    batch = run_step(scheduler, finish_at=1000)
    assert batch.items[0].num_tokens == young.num_tokens - 1  # all but the one just drawn


def test_a_request_whose_adapter_is_still_being_read_is_overtaken() -> None:
    placement = FakePlacement()
    placement.on_disk = {1}
    scheduler = make_scheduler(placement=placement)
    scheduler.add(make_request("cold", adapter_id=1))
    scheduler.add(make_request("warm", adapter_id=2, at=1.0))
    assert names(run_step(scheduler)) == ["warm"]
    placement.on_disk.clear()
    assert names(run_step(scheduler)) == ["warm", "cold"]


def test_queueing_a_request_begins_to_read_its_adapter() -> None:
    placement = FakePlacement()
    scheduler = make_scheduler(placement=placement)
    scheduler.add(make_request("a", adapter_id=5))
    assert placement.prefetched == [5]


def test_a_request_whose_adapter_cannot_be_read_fails_once_with_the_reason() -> None:
    placement = FakePlacement()
    placement.unreadable = {3}
    scheduler = make_scheduler(placement=placement)
    scheduler.add(make_request("a", adapter_id=3))
    assert run_step(scheduler).items == []
    assert [(r.request_id, reason) for r, reason in scheduler.pop_failed()] == [
        ("a", "adapter 3 cannot be read")
    ]
    assert scheduler.pop_failed() == []
    assert list(scheduler.requests()) == []


def starve(num_running: int = 4) -> tuple[Scheduler, FakePlacement]:
    """One slot, held by adapter 1, whose requests never end; a request of adapter 2 waits since instant 0."""
    placement = FakePlacement(capacity=1)
    scheduler = make_scheduler(placement=placement)
    for i in range(num_running):
        scheduler.add(make_request(f"hot{i}", adapter_id=1))
    run_step(scheduler, 0.0, finish_at=1000)
    scheduler.add(make_request("starved", adapter_id=2, at=0.5))
    run_step(scheduler, 0.0, finish_at=1000)
    return scheduler, placement


def test_hot_requests_overtake_one_without_room_only_until_its_wait_is_over() -> None:
    scheduler, _ = starve()
    scheduler.add(make_request("hot4", adapter_id=1, at=0.6))
    assert "hot4" in names(run_step(scheduler, 0.9, finish_at=1000))
    scheduler.add(make_request("hot5", adapter_id=1, at=1.1))
    assert "hot5" not in names(run_step(scheduler, 1.2, finish_at=1000))


def test_a_starved_request_starts_when_the_drained_adapters_requests_have_ended() -> None:
    scheduler, _ = starve(num_running=1)
    assert names(run_step(scheduler, 1.2, finish_at=3)) == ["hot0"]
    assert names(run_step(scheduler, 1.3)) == ["starved"]


def test_a_drained_adapter_that_keeps_running_is_preempted_so_that_the_wait_is_bounded() -> None:
    scheduler, placement = starve()
    run_step(scheduler, 1.2, finish_at=1000)
    assert names(run_step(scheduler, 2.5, finish_at=1000)) == ["starved"]
    assert placement.resident == [2]
    assert all(r.num_preemptions == 1 for r in scheduler.waiting)


def test_room_made_for_a_starved_request_is_not_taken_by_another_cold_one() -> None:
    scheduler, placement = starve(num_running=1)
    scheduler.add(make_request("other", adapter_id=3, at=0.1))  # its turn comes before the starved one's
    assert names(run_step(scheduler, 1.2, finish_at=3)) == ["hot0"]
    assert names(run_step(scheduler, 1.3, finish_at=1000)) == ["starved"]
    assert placement.resident == [2]


def test_an_aborted_starved_request_ends_the_drain() -> None:
    scheduler, _ = starve()
    run_step(scheduler, 1.2, finish_at=1000)
    scheduler.finish(next(iter(scheduler.waiting)))
    scheduler.add(make_request("hot9", adapter_id=1, at=1.3))
    assert "hot9" in names(run_step(scheduler, 1.4, finish_at=1000))


def test_a_step_ahead_admits_nobody() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    run_step(scheduler)
    scheduler.add(make_request("b", adapter_id=1))
    assert scheduler.may_admit(0.0)
    assert names(scheduler.schedule(0.0, admits=False)) == ["a"]
    assert names(run_step(scheduler)) == ["a", "b"]
    assert not scheduler.may_admit(0.0)


def test_whoever_waits_for_its_adapter_does_not_keep_steps_from_running_ahead() -> None:
    """Until the adapter has been read or there is room, somebody behind can start, or room is to be made."""
    placement = FakePlacement(capacity=1)
    scheduler = make_scheduler(placement=placement)
    scheduler.add(make_request("running", adapter_id=1))
    run_step(scheduler)
    placement.on_disk.add(2)
    scheduler.add(make_request("unread", adapter_id=2))
    assert not scheduler.may_admit(0.1)
    placement.on_disk.clear()
    assert not scheduler.may_admit(0.1)  # there is no room
    scheduler.schedule(0.2)
    assert not scheduler.may_admit(1.1)
    assert scheduler.may_admit(1.3)  # it has waited for room for too long
    scheduler.add(make_request("behind", adapter_id=1))
    assert scheduler.may_admit(0.2)


@pytest.mark.parametrize("num_prompt", [0, 64, 1000])
def test_prompts_that_can_never_fit_are_refused_with_the_number(num_prompt: int) -> None:
    with pytest.raises(RequestError, match="empty" if num_prompt == 0 else str(num_prompt)):
        make_scheduler().add(make_request("a", num_prompt=num_prompt))


def test_nothing_is_lost_under_random_arrivals_aborts_and_scarce_pages() -> None:
    rng = random.Random(0)
    placement = FakePlacement(capacity=1)
    scheduler = make_scheduler(
        num_pages=24, max_num_seqs=6, max_num_batched_tokens=24, max_adapter_wait_s=0.05, placement=placement
    )
    ended: dict[str, FinishReason] = {}
    live: dict[str, Request] = {}
    for step in range(20000):
        now = step * 0.01
        if rng.random() < 0.1 and step < 2000:
            adapter_id = rng.choice([None, *range(8)])
            request = make_request(f"r{step}", rng.randint(1, 40), adapter_id, at=now)
            live[request.request_id] = request
            scheduler.add(request)
        if rng.random() < 0.01 and live:
            request = live.pop(rng.choice(sorted(live)))
            scheduler.finish(request)
            ended[request.request_id] = FinishReason.ABORT
        run_step(scheduler, now)
        for request in [r for r in live.values() if len(r.output_token_ids) >= 8]:
            assert request.request_id not in ended
            ended[request.request_id] = FinishReason.LENGTH
            del live[request.request_id]
        if step > 2000 and not live:
            break
    assert not live
    assert scheduler.pages.num_used == 0
    assert not any(placement.users.values())
    assert scheduler.num_preemptions > 0
    assert scheduler.draining.num_drains > 0
