"""Who gets how much of an engine, on a virtual clock: a step takes a fixed time and some for each token."""

import itertools
import random
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from tests.engine.test_scheduler import FakePlacement, names, run_step
from toppings.bad_input import RequestError
from toppings.core import Request
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.fair_clients import MAX_TURN_WAIT_S
from toppings.engine.fair_queue import OUTPUT_WEIGHT, OWED_PER_TOKEN, FairQueue
from toppings.engine.pages import PageAllocator
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.engine.step_plan import StepPlan
from toppings.sampling_params import SamplingParams

STEP_S, TOKEN_S = 0.015, 0.0005


def make_scheduler(
    policy: str = "fair",
    *,
    placement: FakePlacement | None = None,
    has_cache: bool = False,
    **given: int,
) -> Scheduler:
    sizes = {"num_pages": 400, "max_num_seqs": 16, "max_num_batched_tokens": 256, **given}
    num_pages = sizes.pop("num_pages")
    limits = SchedulerLimits(**sizes, max_model_len=1024, max_adapter_wait_s=1.0, scheduling_policy=policy)
    names = BlockHasher(16) if has_cache else None
    return Scheduler(limits, PageAllocator(num_pages, 16), placement or FakePlacement(), names)


@dataclass
class World:
    """Requests of `num_outputs` tokens each, and what became of them."""

    scheduler: Scheduler
    now: float = 0.0
    num: int = 0
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # weighted tokens by tenant
    ttft_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    longest_step_s: float = 0.0
    ends: dict[Request, int] = field(default_factory=dict)
    computed: dict[Request, int] = field(default_factory=lambda: defaultdict(int))  # again counts again
    step_s: float = STEP_S  # and as much again for each token as `TOKEN_S` says

    def add(
        self,
        tenant: str = "",
        *,
        prompt: int = 64,
        outputs: int = 16,
        adapter_id: int | None = None,
        weight: float = 1.0,
        priority: int = 0,
    ) -> Request:
        self.num += 1
        request = Request(
            f"{tenant}-{self.num}",
            [self.num] + [1] * (prompt - 1),  # no two begin alike
            SamplingParams(max_tokens=outputs),
            adapter_id,
            arrived_at=self.now,
            tenant=tenant,
            weight=weight,
            priority=priority,
        )
        self.ends[request] = outputs
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        """Those that ended."""
        batch = self.scheduler.schedule(self.now)
        drawing = [item.request for item in batch.items if item.needs_sample]
        for item in batch.items:
            self.computed[item.request] += item.num_tokens
            if item.request.num_computed_tokens + item.num_tokens <= len(item.request.prompt_token_ids):
                self.served[item.request.tenant] += item.num_tokens
        self.scheduler.commit(batch)
        self.scheduler.cache.keep(batch.items)
        step_s = self.step_s + TOKEN_S * batch.num_tokens
        self.longest_step_s = max(self.longest_step_s, step_s)
        self.now += step_s
        ended = []
        for request in drawing:
            if not request.output_token_ids:
                self.ttft_s[request.tenant].append(self.now - request.arrived_at)
            request.output_token_ids.append(7)
            self.served[request.tenant] += OUTPUT_WEIGHT
            if len(request.output_token_ids) == self.ends[request]:
                self.scheduler.finish(request)
                ended.append(request)
        return ended

    def num_waiting(self, tenant: str) -> int:
        return sum(r.tenant == tenant for r in self.scheduler.waiting)


def flood(world: World, seconds: float, *, guest_prompt: int | None, **flooded: int) -> None:
    """One tenant keeps 250 requests with long prompts there; another sends one after another."""
    guest: Request | None = None
    while world.now < seconds:
        while world.num_waiting("flood") + len(world.scheduler.running) < 250:
            world.add("flood", **{"prompt": 700, "outputs": 24, **flooded})
        if guest_prompt is not None and guest is None and world.now > 1.0:
            guest = world.add("guest", prompt=guest_prompt, outputs=8)
        if guest in world.step():
            guest = None
    world.scheduler.check_integrity()


@pytest.mark.parametrize("num_pages", [400, 96], ids=["few places", "few pages"])
def test_a_request_beside_a_flood_waits_a_step_and_little_more_than_alone(
    num_pages: int,
) -> None:
    alone = World(make_scheduler(num_pages=num_pages))
    alone.add("guest", prompt=100, outputs=1)
    alone.step()
    world = World(make_scheduler(num_pages=num_pages))
    flood(world, 60.0, guest_prompt=100)
    ttfts = sorted(world.ttft_s["guest"])
    assert len(ttfts) > 20
    assert ttfts[-1] <= 1.5 * alone.ttft_s["guest"][0] + world.longest_step_s
    first_come = World(make_scheduler("fcfs", num_pages=num_pages))
    flood(first_come, 60.0, guest_prompt=100)
    assert not first_come.ttft_s["guest"]


def test_guests_that_come_often_wait_no_longer_where_steps_have_a_small_fixed_part() -> None:
    """Two that ask for no more than their share, one after the other: each step for one of them costs the
    others what a step takes in any case, which is little here."""
    alone = World(make_scheduler())
    alone.add("guest", prompt=100, outputs=1)
    alone.step()
    served = []
    for policy in ("fair", "fcfs"):
        world = World(make_scheduler(policy, max_num_batched_tokens=512, fixed_step_tokens=32))
        for step in range(600):
            while world.num_waiting("flood") < 40:
                world.add("flood", prompt=256, outputs=16)
            if step % 4 == 2:
                world.add("guest", prompt=100, outputs=8)
            world.step()
        served.append(sum(world.served.values()) / world.now)
        if policy == "fair":
            ttfts = sorted(world.ttft_s["guest"])
            assert len(ttfts) == 150
            assert ttfts[-1] <= 1.75 * alone.ttft_s["guest"][0]  # they come where a step begins
    assert served[0] > 0.97 * served[1]


def test_steps_for_guests_cost_next_to_nothing() -> None:
    served = []
    for policy in ("fair", "fcfs"):
        world = World(make_scheduler(policy))
        flood(world, 120.0, guest_prompt=100)
        served.append(sum(world.served.values()))
    assert served[0] > 0.97 * served[1]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_backlogged_tenants_are_served_by_their_weights_whatever_they_send(weight: float) -> None:
    world = World(make_scheduler())
    while world.now < 600.0:
        while world.num_waiting("a") < 20:
            world.add("a", prompt=700, outputs=4)
        while world.num_waiting("b") < 20:
            world.add("b", prompt=20, outputs=60, weight=weight)
        world.step()
    assert world.served["b"] / world.served["a"] == pytest.approx(weight, rel=0.05)


def test_who_was_idle_has_saved_up_nothing() -> None:
    world = World(make_scheduler())
    for _ in range(2000):
        while world.num_waiting("a") < 20:
            world.add("a")
        world.step()
    world.served.clear()
    for _ in range(2000):
        for tenant in "ab":
            while world.num_waiting(tenant) < 20:
                world.add(tenant)
        world.step()
    assert world.served["b"] == pytest.approx(world.served["a"], rel=0.05)


def test_nothing_stands_idle_while_one_tenant_alone_has_requests() -> None:
    world = World(make_scheduler(max_num_seqs=8))
    for _ in range(8):
        world.add("a", weight=0.01, prompt=16)
    world.step()
    assert len(world.scheduler.running) == 8


def test_adapters_of_one_tenant_share_what_it_gets() -> None:
    world = World(make_scheduler())
    served: dict[int | None, int] = defaultdict(int)
    for _ in range(4000):
        while len(world.scheduler.waiting) < 60:
            world.add("many", adapter_id=world.num // 2 % 4 + 1, prompt=32, outputs=8)
            world.add("one", adapter_id=9, prompt=32, outputs=8)
        for request in world.step():
            served[request.adapter_id] += 1
    assert served[9] == pytest.approx(sum(served[i] for i in range(1, 5)), rel=0.05)
    assert max(served[i] for i in range(1, 5)) <= 1.1 * min(served[i] for i in range(1, 5))


def test_a_cold_load_is_charged_to_whose_request_began_it() -> None:
    placement = FakePlacement(capacity=1000)
    placement.load_cost = 640.0
    world = World(make_scheduler(placement=placement))
    for _ in range(3000):
        while world.num_waiting("cold") < 10:
            world.add("cold", adapter_id=world.num, prompt=64, outputs=1)
        while world.num_waiting("warm") < 10:
            world.add("warm", prompt=64, outputs=1)
        world.step()
    # A cold request counts as 64 + 640 + 2 tokens, a warm one as 66.
    assert world.served["warm"] / world.served["cold"] == pytest.approx(706 / 66, rel=0.05)


def test_what_an_aborted_prompt_did_not_compute_is_given_back() -> None:
    world = World(make_scheduler(num_pages=800, max_num_batched_tokens=64))
    for _ in range(400):
        long = world.add("a", prompt=1000, outputs=1)
        while world.num_waiting("b") < 4:
            world.add("b", prompt=64, outputs=1)
        world.step()
        if long in world.scheduler.running:
            world.scheduler.finish(long)
        elif world.num_waiting("a") > 4:
            world.scheduler.finish(next(r for r in world.scheduler.waiting if r.tenant == "a"))
    assert world.served["a"] > 0.5 * world.served["b"]


def test_one_client_is_served_as_first_come_first_served() -> None:
    logs = []
    for policy in ("fair", "fcfs", "priority"):
        rng, world, log = random.Random(0), World(make_scheduler(policy, num_pages=90)), []
        for _ in range(3000):
            if rng.random() < 0.3:
                world.add("t", prompt=rng.randint(1, 500), outputs=rng.randint(1, 30), adapter_id=1)
            log.append([r.request_id for r in world.step()])
        logs.append(log)
    assert logs[0] == logs[1] == logs[2]


def test_a_lower_priority_comes_first_and_then_fairness_decides() -> None:
    world = World(make_scheduler("priority", max_num_seqs=1))
    running = world.add("a", outputs=2)
    world.step()
    late = world.add("a", priority=1)
    fair = [world.add(tenant) for tenant in "aab"]
    urgent = world.add("a", priority=-5)
    started: list[Request] = []
    while len(world.scheduler.waiting) or world.scheduler.running:
        world.step()
        started += [r for r in world.scheduler.running if r not in started and r is not running]
    assert started == [urgent, fair[2], fair[0], fair[1], late]


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_a_priority_is_refused_where_nobody_would_look_at_it(policy: str) -> None:
    with pytest.raises(RequestError, match=r"priority is 3.*scheduling_policy"):
        World(make_scheduler(policy)).add(priority=3)


def test_a_client_that_waits_too_long_goes_first_whoever_comes() -> None:
    world = World(make_scheduler(max_num_seqs=1))
    for _ in range(20):
        world.add("old", prompt=600, outputs=1)
    patient = next(iter(world.scheduler.waiting))
    while patient in world.scheduler.waiting or len(world.scheduler.running):
        world.step()
    asked_at = world.now
    waiting = next(r for r in world.scheduler.waiting)
    while waiting in world.scheduler.waiting:
        for _ in range(2):  # new tenants without end, more than can be served
            world.add(f"new {world.num}", prompt=100, outputs=4)
        world.step()
    assert world.now - asked_at < MAX_TURN_WAIT_S + 5.0


def test_who_made_way_does_so_again_only_when_it_has_drawn_much_more_than_its_new_start_computed() -> None:
    world = World(make_scheduler(has_cache=True, max_num_seqs=4))
    flood(world, 60.0, guest_prompt=40, outputs=600, prompt=16)
    assert max(request.num_preemptions for request in world.ends) > 1
    for request, num_computed in world.computed.items():
        again = num_computed - request.num_computed_tokens
        num_last = len(request.prompt_token_ids) + world.ends[request]  # its last start may be a new one
        assert again <= len(request.output_token_ids) / OWED_PER_TOKEN + num_last, request.request_id


def test_a_request_beside_long_answers_need_not_wait_for_one_of_them_to_end() -> None:
    alone = World(make_scheduler(has_cache=True))
    alone.add("guest", prompt=100, outputs=1)
    alone.step()
    world = World(make_scheduler(has_cache=True, max_num_seqs=8, num_pages=2000))
    flood(world, 90.0, guest_prompt=100, prompt=100, outputs=800)
    assert len(world.ttft_s["guest"]) > 100
    assert max(world.ttft_s["guest"]) <= 1.5 * alone.ttft_s["guest"][0] + world.longest_step_s
    num_again = sum(world.computed.values()) - sum(r.num_computed_tokens for r in world.computed)
    assert num_again < 0.02 * sum(world.computed.values())


def test_a_tenant_that_may_have_nothing_of_a_step_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(make_scheduler(max_num_seqs=64, num_pages=4000, max_num_batched_tokens=512))
    for adapter_id in range(1, 101):
        world.add("flood", prompt=256, outputs=4, adapter_id=adapter_id)
    world.step()
    while world.scheduler._was_overtaken:
        world.step()
    guest, asked = world.add("guest", prompt=32, outputs=1), []
    try_start = world.scheduler._try_start

    def note(step: StepPlan, request: Request, now: float, refused: set[int]) -> bool:
        asked.append(request)
        return try_start(step, request, now, refused)

    monkeypatch.setattr(world.scheduler, "_try_start", note)
    world.step()
    assert guest.num_computed_tokens == 32
    assert len(asked) <= 3  # the guest, and of the others the first


def test_guests_without_end_leave_few_places_in_steps_empty() -> None:
    served = []
    for policy in ("fair", "fcfs"):
        world = World(make_scheduler(policy, max_num_seqs=64, num_pages=4000), step_s=0.2)
        for step in range(400):
            while world.num_waiting("flood") < 40:
                world.add("flood", prompt=256, outputs=4)
            if step % 2 == 0:
                world.add("guest", prompt=32, outputs=1)
            world.step()
        served.append(sum(world.served.values()) / world.now)
    assert served[0] > 0.97 * served[1]


def test_tenants_that_overload_an_engine_together_make_each_other_no_way() -> None:
    """So what both get is what they would get if they came first and were served first."""
    served = []
    for policy in ("fair", "fcfs"):
        world, num_sent = World(make_scheduler(policy, max_num_batched_tokens=512)), Counter[str]()
        while world.now < 120.0:
            for tenant, rate in (("a", 6.0), ("b", 12.0)):
                while num_sent[tenant] < world.now * rate:
                    world.add(tenant, prompt=256)
                    num_sent[tenant] += 1
            world.step()
        served.append(sum(world.served.values()) / world.now)
        assert world.scheduler.num_preemptions <= 2
    assert served[0] > 0.99 * served[1]


def test_a_tenant_that_lags_gets_its_share_of_places_while_others_draw_long_answers() -> None:
    world = World(make_scheduler(max_num_seqs=8))
    for _ in range(8):
        world.add("long", prompt=32, outputs=900)
    for _ in range(4):
        world.step()
    for _ in range(8):
        world.add("late", prompt=32, outputs=900)
    for _ in range(100):
        world.step()
    running = world.scheduler.running
    assert sum(request.tenant == "late" for request in running) == len(running) // 2 == 4


def test_pages_are_taken_from_the_tenant_that_holds_most_when_they_run_out() -> None:
    world = World(make_scheduler(num_pages=68, max_num_seqs=8))
    big = [world.add("big", prompt=160, outputs=300) for _ in range(5)]
    world.step()
    for _ in range(8):
        world.step()
    small = world.add("small", prompt=20, outputs=300)
    for _ in range(200):
        world.step()
    assert small.num_preemptions == 0
    assert sum(request.num_preemptions for request in big) > 0


def test_two_adapters_with_one_room_both_end_where_a_step_takes_as_long_as_the_longest_wait() -> None:
    scheduler = make_scheduler(placement=FakePlacement(capacity=1))
    world, now = World(scheduler), 0.0
    for adapter_id in (1, 2):
        world.add(prompt=20, outputs=8, adapter_id=adapter_id)
    for _ in range(200):
        run_step(scheduler, now)
        now += 1.01
    assert not list(scheduler.requests())


def test_a_long_prompt_goes_on_whoever_comes() -> None:
    world = World(make_scheduler(max_num_batched_tokens=64))
    long = world.add("a", prompt=640, outputs=1)
    for step in range(40):
        world.add(f"new {step}", prompt=64, outputs=1)
        if long in world.step():
            break
    assert step < 25


def test_a_step_ahead_is_not_taken_while_somebody_has_a_claim_to_a_place() -> None:
    world = World(make_scheduler(max_num_seqs=2))
    for _ in range(4):
        world.add("a", prompt=8)
    world.step()
    assert not world.scheduler.may_admit(world.now)
    world.add("b", prompt=8)
    assert world.scheduler.may_admit(world.now)
    batch = run_step(world.scheduler, world.now)
    assert any(name.startswith("b-") for name in names(batch))


def test_nothing_is_lost_with_many_tenants_aborts_and_scarce_pages() -> None:
    rng = random.Random(3)
    scheduler = make_scheduler(
        num_pages=70, max_num_seqs=6, max_num_batched_tokens=48, placement=FakePlacement(capacity=3)
    )
    world, live = World(scheduler), []
    for step in range(6000):
        if rng.random() < 0.2 and step < 3000:
            adapter_id = rng.choice([None, *range(6)])
            tenant = f"t{rng.randrange(4)}"
            live.append(
                world.add(
                    tenant,
                    prompt=rng.randint(1, 300),
                    outputs=rng.randint(1, 20),
                    adapter_id=adapter_id,
                    weight=rng.choice([0.5, 1.0, 4.0]),
                )
            )
        if rng.random() < 0.02 and (left := [r for r in live if r in set(scheduler.requests())]):
            scheduler.finish(rng.choice(left))
        world.step()
        scheduler.check_integrity()
        if step > 3000 and not list(scheduler.requests()):
            break
    assert not list(scheduler.requests())
    assert scheduler.pages.num_used == 0
    assert scheduler.num_preemptions > 0


def test_a_queue_does_not_grow_while_a_client_waits_that_cannot_start() -> None:
    """One that was served far more, has waited too long, and is asked first and passed over at every step."""
    numbers = itertools.count()

    def request(tenant: str, now: float) -> Request:
        name = str(next(numbers))
        return Request(name, [1] * 10, SamplingParams(), adapter_id=1, arrived_at=now, tenant=tenant)

    queue = FairQueue("fair", lambda _: 0, lambda requests: iter(list(requests)), 8)
    served = request("starved", 0.0)
    queue.add(served)
    queue.start(served, 1e9, 0.0)
    queue.add(request("starved", 0.0))
    for step in range(2000):
        now = 2 * MAX_TURN_WAIT_S + step
        queue.add(request("busy", now))
        with closing(queue.candidates(now)) as candidates:
            started = next(each for each in candidates if each.tenant == "busy")
            queue.start(started, 10, now)
        queue.remove(started)
    assert queue.tenants.num_entries < 200
