"""Which servers should hold which adapter: demand, plans, and how requests follow them."""

import copy
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import STEPS, LinearModel, PerfModel, load_perf_model
from toppings.cluster.placement import PLACEMENTS, Placement, PlacementSettings, Plan, make_placement
from toppings.cluster.placement.demand import BASE, FAST_S, SLOW_S, Demand, DemandMeter
from toppings.cluster.placement.packing import NUM_SUMS, SPREADS, improve
from toppings.cluster.placement.plan import Ring, Shards
from toppings.cluster.placement.sizing import desired_instances
from toppings.cluster.placement.steering import COMFORT, steer
from toppings.cluster.policies import POLICIES, PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

BGMV, MBGMV = load_perf_model("published:bgmv"), load_perf_model("published:mbgmv")
MB = 10**6
REAL = [name for name, kind in PLACEMENTS.items() if kind is not None]


def request(
    number: int | str, adapter: str | None, rank: int = 8, num_bytes: int = 10 * MB
) -> RequestSnapshot:
    return RequestSnapshot(str(number), adapter, rank, 50, 100.0, num_bytes)


def fleet(num: int, **fields: Any) -> Fleet:
    fields = {"perf_model": MBGMV, "adapter_bytes_total": 100 * MB, **fields}
    return Fleet(InstanceSnapshot(instance_id=f"s{i}", **fields) for i in range(num))


def demand(rates: dict[str, float], ranks: dict[str, int] | None = None) -> Demand:
    def column(value: float) -> Any:
        return np.full(len(rates), value)

    of_rank = np.array([float((ranks or {}).get(name, 8)) for name in rates])
    values = np.array(list(rates.values()))
    return Demand(list(rates), values, column(50.0), column(100.0), of_rank, of_rank * MB)


def placement(name: str, **settings: Any) -> Placement:
    made = make_placement(name, PlacementSettings(**settings))
    assert made is not None
    return made


# --- demand ---


@pytest.mark.parametrize("age_s", [20.0, 600.0])
def test_a_steady_rate_is_found_from_the_start_and_later(age_s: float) -> None:
    """Poisson arrivals at 20/s; the bound is six standard deviations of the decayed count."""
    meter, rng, now = DemandMeter(), Random(1), 0.0
    while now < age_s:
        meter.note(request(0, "a"), now)
        now += rng.expovariate(20.0)
    found = meter.demand(now)
    assert found.names == ["a"]
    assert found.rates[0] == pytest.approx(20.0, abs=6 * (20.0 / min(age_s, SLOW_S / 2)) ** 0.5 + 0.5)
    assert (found.prompt_tokens[0], found.ranks[0]) == (pytest.approx(50.0), 8)


def test_what_begins_counts_before_the_slow_rate_has_seen_it() -> None:
    meter = DemandMeter(ticks_per_s=1000)
    for at in range(0, 120_000, 1000):
        meter.note(request(0, "a"), at)
    for at in range(120_000, 130_000, 50):
        meter.note(request(0, "a"), at)
    rate = float(meter.demand(130_000).rates[0])
    slow = 1.0 + 19.0 * (1 - np.exp(-10.0 / SLOW_S))
    fast = 1.0 + 19.0 * (1 - np.exp(-10.0 / FAST_S))
    assert 1.5 * slow < rate < fast


def test_a_single_request_is_no_burst() -> None:
    meter = DemandMeter()
    meter.note(request(0, "b"), 0.0)
    meter.note(request(0, "a"), 300.0)
    assert meter.demand(300.0).rates[-1] == pytest.approx(1 / SLOW_S, rel=0.01)


def test_adapters_that_nobody_asks_for_are_forgotten_and_others_keep_their_numbers() -> None:
    meter = DemandMeter()
    for number in range(200):
        meter.note(request(number, f"old{number}"), 0.0)
    for at in range(500, 1000):
        meter.note(request(at, "kept", rank=64), float(at))
        meter.note(request(at, None, rank=0, num_bytes=0), float(at))
    found = meter.demand(1000.0)
    assert (found.names, found.ranks.tolist()) == (["kept", BASE], [64.0, 0.0])
    assert found.rates.tolist() == pytest.approx([1.0, 1.0], rel=0.05)
    assert found.of_adapters().names == ["kept"]
    meter.note(request(0, "new"), 1000.0)
    assert meter.demand(1000.0).names == ["kept", BASE, "new"]


def test_what_is_remembered_is_bounded_though_nobody_asks_for_it() -> None:
    meter = DemandMeter()
    for number in range(20_000):
        meter.note(request(number, f"a{number}"), float(number))
    assert meter._columns.shape[1] <= 1024


# --- plans that know nothing of demand ---


@pytest.mark.parametrize("rule", [Ring, Shards])
def test_a_server_that_goes_moves_only_what_it_had(rule: Any) -> None:
    names = [f"adapter-{i}" for i in range(400)]
    before, after = rule([f"s{i}" for i in range(8)], 2), rule([f"s{i}" for i in range(7)], 2)
    for name in names:
        old, new = before.homes_of(name), after.homes_of(name)
        assert len(set(old)) == len(set(new)) == 2
        assert set(old) - {"s7"} <= set(new)
    counts = Counter(home for name in names for home in before.homes_of(name))
    assert min(counts.values()) > 50  # of 100; names are fixed, so that this is no matter of chance


def test_shuffle_shards_share_all_their_servers_more_rarely_than_neighbours() -> None:
    ids, names = [f"s{i}" for i in range(16)], [f"adapter-{i}" for i in range(500)]
    shards, ring = (
        {frozenset(rule.homes_of(name)) for name in names} for rule in (Shards(ids, 3), Ring(ids, 3))
    )
    assert len(shards) > 300
    assert len(ring) <= len(shards)


# --- all placements ---


@pytest.mark.parametrize("name", REAL)
def test_homes_are_open_servers_none_twice_and_nothing_is_changed(name: str) -> None:
    servers, wanted = fleet(6), demand({f"a{i}": 3.0 / (i + 1) for i in range(40)})
    servers.set_open("s2", False)
    made, untouched = placement(name), copy.deepcopy(wanted)
    plan = made.plan(wanted, servers.frozen(), None)
    for adapter in [*wanted.names, "nobody asked for it"]:
        homes = plan.homes_of(adapter)
        assert len(set(homes)) == len(homes) <= 6
        assert set(homes) <= {"s0", "s1", "s3", "s4", "s5"}
    assert plan.chosen == made.plan(wanted, servers.frozen(), None).chosen
    assert all(np.array_equal(getattr(wanted, n), getattr(untouched, n)) for n in ("rates", "ranks"))


@pytest.mark.parametrize("name", REAL)
def test_a_plan_is_kept_while_nothing_changes(name: str) -> None:
    servers, wanted = fleet(6), demand({f"a{i}": 3.0 / (i + 1) for i in range(40)})
    first = placement(name).plan(wanted, servers.frozen(), None)
    second = placement(name).plan(wanted, servers.frozen(), first)
    assert second.num_moves_from(first) == 0


@pytest.mark.parametrize("name", REAL)
def test_a_fleet_without_open_servers_has_no_homes(name: str) -> None:
    plan = placement(name).plan(demand({"a": 1.0}), fleet(2, is_open=False).frozen(), None)
    assert plan.homes_of("a") == ()


def test_unknown_placements_and_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown placement 'best'; choose one of none, static_k"):
        make_placement("best")
    with pytest.raises(ValueError, match="num_copies is 0"):
        PlacementSettings(num_copies=0)
    with pytest.raises(ValueError, match="slo_tpt_ms is 0"):
        PlacementSettings(slo_tpt_ms=0)


# --- adaptive ---


def test_a_hot_adapter_gets_copies_and_a_cold_one_keeps_few() -> None:
    servers, made = fleet(8), placement("adaptive")
    rates = {"hot": 0.5, **{f"a{i}": 0.5 for i in range(40)}}
    plan = made.plan(demand(rates), servers.frozen(), None)
    assert len(plan.homes_of("hot")) == 2
    hotter = made.plan(demand({**rates, "hot": 20.0}), servers.frozen(), plan)
    assert len(hotter.homes_of("hot")) == 8
    assert set(plan.homes_of("hot")) < set(hotter.homes_of("hot"))
    assert {len(hotter.homes_of(f"a{i}")) for i in range(40)} == {2}


def test_a_server_that_goes_hands_its_adapters_to_the_others() -> None:
    servers, wanted = fleet(4, adapter_bytes_total=1000 * MB), demand({f"a{i}": 1.0 for i in range(20)})
    plan = placement("adaptive").plan(wanted, servers.frozen(), None)
    servers.set_open("s1", False)
    after = placement("adaptive").plan(wanted, servers.frozen(), plan)
    for name in wanted.names:
        assert "s1" not in after.homes_of(name)
        assert len(after.homes_of(name)) == 2
        assert set(plan.homes_of(name)) - {"s1"} <= set(after.homes_of(name))


def test_room_is_shared_out_evenly_whatever_ranks_are() -> None:
    servers, rng = fleet(4, adapter_bytes_total=400 * MB), Random(2)
    ranks = {f"a{i}": rng.choice((8, 16, 32, 64)) for i in range(60)}
    plan = placement("adaptive").plan(demand(dict.fromkeys(ranks, 0.1), ranks), servers.frozen(), None)
    held = Counter[str]()
    for name, rank in ranks.items():
        held.update(dict.fromkeys(plan.homes_of(name), rank))
    assert max(held.values()) < 1.15 * min(held.values())


def test_high_ranks_are_kept_together_where_a_batch_pays_for_the_largest() -> None:
    ranks = {f"a{i}": 64 if i % 5 == 0 else 8 for i in range(32)}
    wanted = demand(dict.fromkeys(ranks, 0.5), ranks)

    def num_mixed(model: PerfModel) -> int:
        servers = fleet(4, perf_model=model, adapter_bytes_total=10_000 * MB)
        plan = placement("adaptive").plan(wanted, servers.frozen(), None)
        kinds = {(home, rank) for name, rank in ranks.items() for home in plan.homes_of(name)}
        return len(kinds) - 4

    assert num_mixed(BGMV) == 0
    assert num_mixed(replace(BGMV, decode_forms={"bgmv": LinearModel({"steps": 30.0, "tokens": 0.1})})) > 0


def test_passes_end_where_no_single_move_costs_less() -> None:
    """Against the formula of packing.py written out plainly, over random units and models."""
    rng = np.random.default_rng(3)
    num, num_servers, ranks, slo_ms = 24, 5, np.array([8.0, 32.0, 64.0]), 60.0
    loads, contexts = rng.uniform(0.05, 4.0, num), rng.uniform(10.0, 500.0, num)
    classes, shares = rng.integers(0, 3, num), rng.uniform(0.0, 0.2, (num, num_servers))
    models = rng.uniform(0.0, 0.004, (8, num_servers))
    models[STEPS] = 30.0
    copies = rng.integers(1, 3, num)
    indptr = np.concatenate([[0], np.cumsum(copies)])
    homes = np.full(indptr[-1], -1)
    units = np.repeat(np.arange(num), copies)

    def total(homes: Any) -> float:
        return sum(
            cost(row, [int(u) for u, home in zip(units, homes, strict=True) if home == row])
            for row in range(5)
        )

    def cost(row: int, here: list[int]) -> float:
        if not here:
            return 0.0
        load, in_use = loads[here], 1 - np.exp(-loads[here])
        rank, share, n, model = ranks[classes[here]], shares[here, row], loads[here].sum(), models[:, row]
        below = [1.0, *(np.exp(-load[rank >= r].sum()) for r in ranks[::-1])]
        max_rank = sum(r * (was - now) for r, was, now in zip(ranks[::-1], below, below[1:], strict=False))
        fixed = model[0] + model[4] * (in_use * rank).sum()
        each = (
            model[1]
            + model[6]
            + model[3] * (load * rank).sum() / n
            + model[5] * (load * contexts[here]).sum() / n
        )
        worst = fixed + (each + model[2] * 64.0) * (n + SPREADS * n**0.5)
        space = (in_use * share).sum() + SPREADS * ((in_use * (1 - in_use) * share**2).sum()) ** 0.5
        step = fixed + (each + model[2] * max_rank) * n
        return float(n * step * (1 + space**6 + (worst / slo_ms) ** 12))

    sums, class_loads = np.zeros((num_servers, NUM_SUMS)), np.zeros((num_servers, 3))
    columns = (loads, contexts, classes, np.zeros(num), shares, ranks, models, sums, class_loads)
    while improve(indptr, homes, *columns, slo_ms, 1e3, 1e-9):
        pass
    best = total(homes)
    for at, home in enumerate(homes.tolist()):
        others = homes[indptr[units[at]] : indptr[units[at] + 1]].tolist()
        for row in set(range(num_servers)) - set(others):
            moved = homes.copy()
            moved[at] = row
            assert total(moved) >= best * (1 - 1e-9), (at, home, row)


# --- how many servers ---


def test_each_limit_asks_for_servers() -> None:
    """Each of 10 adapters at 2/s: 20 requests/s of 100 tokens at 48 ms and a prefill run 97 to 98 at once."""
    wanted = demand({f"a{i}": 2.0 for i in range(10)})

    def needed(slo_ms: float = 50.0, **limits: Any) -> int:
        limits = {"adapter_bytes_total": 10_000 * MB, **limits}
        return desired_instances(wanted, fleet(3, **limits), slo_ms)

    assert needed(1000.0) == 1
    assert needed() == 1
    assert needed(max_num_seqs=20) == 6  # 98 / (0.9 x 20)
    assert needed(kv_tokens_total=3000.0) == 6  # of 150 tokens each
    assert needed(adapter_bytes_total=20 * MB) == 5  # ten of 8 MB, all in use
    assert needed(adapter_bytes_total=float("inf"), max_adapters=2) == 6
    assert needed(36.0) > 2  # 33.5 ms and 0.0023 for each rank


def test_without_demand_servers_or_objective_there_is_still_a_number() -> None:
    wanted = demand({"a": 50.0})
    assert desired_instances(demand({}), fleet(2).frozen(), 50.0) == 1
    assert desired_instances(wanted, fleet(2, is_open=False).frozen(), 50.0) == 1
    assert desired_instances(wanted, fleet(2, max_num_seqs=20).frozen(), float("inf")) > 5
    assert desired_instances(wanted, fleet(2).frozen(), 1.0) >= 5  # an objective that no server keeps


# --- obeying ---


def test_requests_go_where_the_plan_says_in_the_order_that_is_promised() -> None:
    servers, policy = fleet(4), make_policy("least_loaded")

    def chosen(adapter: str = "a", homes: tuple[int, ...] = (1,)) -> str:
        choice = steer(request("new", adapter), servers, homes, policy)
        assert choice is not None
        return choice.instance_id

    assert chosen() == "s1"
    for number in range(int(10 * COMFORT)):  # half of the home's device is in use
        servers.enqueue("s1", request(number, f"b{number}"))
    assert chosen() == "s1"
    servers.enqueue("s3", request("other", "a"))
    assert chosen() == "s3"
    servers.finish("s3", "other")
    for number in range(10, 15):
        servers.enqueue("s1", request(number, f"b{number}"))
    assert chosen() == "s0"
    assert chosen("b0") == "s1"
    for name in ("s0", "s2", "s3"):
        for number in range(10):
            servers.enqueue(name, request(f"{name} {number}", f"c{name}{number}"))
    assert chosen() in ("s0", "s1", "s2", "s3")


def test_a_home_that_would_break_the_objective_sends_on_and_all_that_would_are_marked() -> None:
    servers = fleet(2, adapter_bytes_total=float("inf"))
    policy = make_policy("rank_aware", PolicySettings(slo_tpt_ms=40.0))
    for number in range(60):
        servers.enqueue("s0", request(number, f"b{number}", rank=64))
    choice = steer(request("new", "a"), servers, [0], policy)
    assert choice is not None
    assert (choice.instance_id, choice.breaks_slo) == ("s1", False)
    for number in range(60, 120):
        servers.enqueue("s1", request(number, f"b{number}", rank=64))
    choice = steer(request("new", "a"), servers, [0], policy)
    assert choice is not None
    assert (choice.instance_id, choice.breaks_slo) == ("s0", True)


def test_servers_that_tell_only_how_many_adapters_fit_are_filled_by_number() -> None:
    servers = fleet(2, adapter_bytes_total=float("inf"), max_adapters=2)
    for number in range(2):
        servers.enqueue("s0", request(number, f"b{number}"))
    choice = steer(request("new", "a"), servers, [0], make_policy("least_loaded"))
    assert choice is not None
    assert choice.instance_id == "s1"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_obeys_and_closed_servers_get_nothing(name: str) -> None:
    snapshots = [
        InstanceSnapshot(instance_id=f"s{i}", perf_model=MBGMV, is_open=i != 1, adapter_bytes_total=100 * MB)
        for i in range(3)
    ]
    dispatcher = Dispatcher(make_policy(name), snapshots, placement=placement("static_k", num_copies=1))
    dispatcher.plan = Plan(("s0", "s1", "s2"), Ring((), 0), {"a": ("s2",), "b": ("s1",)})
    for number in range(5):
        choice = dispatcher.place(request(number, "a"), float(number))
        assert choice is not None
        assert choice.instance_id == "s2"
    choice = dispatcher.place(request("away", "b"), 5.0)
    assert choice is not None
    assert choice.instance_id != "s1"
    dispatcher.fleet.check_integrity()


def test_what_a_dispatcher_plans_follows_from_what_it_placed() -> None:
    snapshots = [InstanceSnapshot(instance_id=f"s{i}", perf_model=MBGMV) for i in range(4)]
    dispatcher = Dispatcher(make_policy("rank_aware"), snapshots, placement=placement("adaptive"))
    for number in range(400):
        dispatcher.place(request(number, "hot" if number % 2 else f"cold{number % 40}"), number / 40)
        dispatcher.ended(str(number))
    plan = dispatcher.planning(10.0)()
    assert len(plan.homes_of("hot")) == 4
    assert len(plan.homes_of("cold2")) == 2


def test_bytes_in_use_are_those_of_distinct_adapters_until_the_last_request_ends() -> None:
    servers = fleet(1)
    for number, adapter in enumerate("aab"):
        servers.enqueue("s0", request(number, adapter))
    assert (servers.adapter_bytes_used[0], servers.num_adapters[0]) == (20 * MB, 2)
    servers.finish("s0", "0")
    assert servers.adapter_bytes_used[0] == 20 * MB
    servers.finish("s0", "1")
    assert (servers.adapter_bytes_used[0], servers.num_adapters[0]) == (10 * MB, 1)
    servers.check_integrity()
