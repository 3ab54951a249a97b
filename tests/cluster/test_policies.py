"""What each policy chooses, and what all of them have in common."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import POLICIES, Policy, PolicySettings, make_policy
from toppings.cluster.snapshot import Choice, InstanceSnapshot, RequestSnapshot

BGMV, MBGMV = load_perf_model("published:bgmv"), load_perf_model("published:mbgmv")


def requests(prefix: str, count: int, rank: int = 8, adapter: str = "a") -> tuple[RequestSnapshot, ...]:
    return tuple(RequestSnapshot(f"{prefix}{i}", adapter, rank, 32, 100.0) for i in range(count))


NEW = RequestSnapshot("new", "fresh", 64, 32, 100.0, adapter_bytes=100_000_000)


def instance(
    instance_id: str, num_running: int = 0, num_waiting: int = 0, **fields: object
) -> InstanceSnapshot:
    return InstanceSnapshot(
        instance_id=instance_id,
        running=requests(f"{instance_id}r", num_running),
        waiting=requests(f"{instance_id}w", num_waiting),
        **{"perf_model": MBGMV, **fields},  # type: ignore[arg-type]
    )


def choose(policy: Policy | str, *snapshots: InstanceSnapshot, new: RequestSnapshot = NEW) -> Choice:
    chosen = (make_policy(policy) if isinstance(policy, str) else policy).choose(new, Fleet(snapshots))
    assert chosen is not None
    return chosen


def published_servers(model: object) -> tuple[InstanceSnapshot, InstanceSnapshot]:
    """24 running requests of rank 32 on one server, 16 of rank 64 on the other."""
    first = InstanceSnapshot(instance_id="24xr32", perf_model=BGMV, running=requests("a", 24, 32))
    second = InstanceSnapshot(instance_id="16xr64", perf_model=BGMV, running=requests("b", 16, 64))
    if model is BGMV:
        return first, second
    return tuple(  # type: ignore[return-value]
        InstanceSnapshot(instance_id=s.instance_id, perf_model=MBGMV, running=s.running)
        for s in (first, second)
    )


@pytest.mark.parametrize(("model", "slo_ms", "server"), [(BGMV, 36.5, "16xr64"), (MBGMV, 36.0, "24xr32")])
def test_published_example_depends_on_the_kernel(model: object, slo_ms: float, server: str) -> None:
    policy = make_policy("rank_aware", PolicySettings(slo_tpt_ms=slo_ms))
    choice = choose(policy, *published_servers(model))
    assert (choice.instance_id, choice.breaks_slo) == (server, False)


def test_published_predictions_are_met() -> None:
    tpt = [Fleet(published_servers(model)).step_ms_with(NEW)[0].tolist() for model in (BGMV, MBGMV)]
    assert tpt[0] == pytest.approx([31.8 + 0.0039 * 25 * 64, 31.8 + 0.0039 * 17 * 64])
    assert tpt[1] == pytest.approx([33.5 + 0.0023 * 832, 33.5 + 0.0023 * 1088])


@pytest.mark.parametrize(("prefill_interrupts", "fixed_ms"), [(True, 28.7), (False, 0.0)])
def test_published_cost_is_what_is_minimised(prefill_interrupts: bool, fixed_ms: float) -> None:
    """Against the formula written out, on random fleets with waiting requests. A prefill's fixed cost counts
    where it interrupts decoding, not where it shares its step with it."""
    generator = np.random.default_rng(0)
    model = replace(BGMV, prefill_interrupts=prefill_interrupts)
    for _ in range(20):
        fleet = Fleet(
            InstanceSnapshot(
                instance_id=str(i),
                perf_model=model,
                running=requests(f"{i}r", int(generator.integers(0, 9)), int(generator.choice([8, 64]))),
                waiting=requests(f"{i}w", int(generator.integers(0, 4)), int(generator.choice([8, 64]))),
            )
            for i in range(6)
        )
        totals = [_published_total(fleet.instance(name), fixed_ms) for name in fleet.ids]
        chosen = make_policy("rank_aware").choose(NEW, fleet)
        assert chosen is not None
        assert totals[chosen.row] == pytest.approx(min(totals))


def _published_total(server: InstanceSnapshot, fixed_ms: float) -> float:
    ranks = [request.rank for request in (*server.running, *server.waiting)]
    tokens = [request.prompt_tokens for request in server.waiting]

    def decode(batch: list[int]) -> float:
        return 31.8 + 0.0039 * len(batch) * max(batch) if batch else 0.0

    def prefill(batch: list[int]) -> float:
        return fixed_ms + 0.06 * sum(batch) if batch else 0.0

    d_prefill = prefill([*tokens, NEW.prompt_tokens]) - prefill(tokens)
    d_decode = decode([*ranks, NEW.rank]) - decode(ranks)
    return (d_prefill / NEW.response_tokens + d_decode) * len(ranks)


def test_where_all_would_break_the_slo_the_fastest_takes_it_marked() -> None:
    policy = make_policy("rank_aware", PolicySettings(slo_tpt_ms=30.0))
    choice = choose(policy, instance("busy", 9), instance("idle", 2))
    assert (choice.instance_id, choice.breaks_slo) == ("idle", True)
    assert choice.predicted_tpt_ms == pytest.approx(33.5 + 0.0023 * (2 * 8 + 64))


def test_residency_prefers_the_server_that_holds_the_adapter() -> None:
    cold, warm = instance("cold", 5), instance("warm", 5, on_device=frozenset({"fresh"}))
    assert choose("rank_aware", cold, warm).instance_id == "cold"
    assert choose("rank_aware_residency", cold, warm).instance_id == "warm"


def test_residency_weighs_the_load_against_the_queue() -> None:
    cold, warm = instance("cold", 1), instance("warm", 40, on_device=frozenset({"fresh"}))
    assert choose("rank_aware_residency", cold, warm).instance_id == "cold"


@pytest.mark.parametrize("name", ["rank_aware", "rank_aware_residency"])
@pytest.mark.parametrize(
    "limits",
    [{"kv_tokens_total": 100.0, "kv_tokens_used": 90.0}, {"max_num_seqs": 1.0}],
    ids=["cache", "seqs"],
)
def test_a_server_without_room_is_avoided(name: str, limits: dict[str, Any]) -> None:
    full = instance("full", 1, **limits)
    assert choose(name, full, instance("free", 9)).instance_id == "free"


@pytest.mark.parametrize("name", ["rank_aware", "rank_aware_residency"])
def test_a_full_server_is_taken_rather_than_none(name: str) -> None:
    fuller = instance("fuller", 3, max_num_seqs=1.0)
    choice = choose(name, fuller, instance("full", 2, max_num_seqs=1.0))
    assert (choice.instance_id, choice.breaks_slo) == ("full", False)


def test_a_server_with_room_is_taken_rather_than_a_full_one_that_keeps_the_slo() -> None:
    policy = make_policy("rank_aware", PolicySettings(slo_tpt_ms=34.0))
    full = instance("full", 1, max_num_seqs=1.0)
    choice = choose(policy, full, instance("busy", 20))
    assert (choice.instance_id, choice.breaks_slo) == ("busy", True)


def test_first_fit_fills_the_first_before_the_second() -> None:
    first, second = instance("first", 3, max_num_seqs=4.0), instance("second")
    assert choose("first_fit", first, second).instance_id == "first"
    full = instance("first", 4, max_num_seqs=4.0)
    assert choose("first_fit", full, second).instance_id == "second"


def test_first_fit_takes_the_least_loaded_where_none_has_room() -> None:
    servers = [instance("a", 4, max_num_seqs=2.0), instance("b", 3, max_num_seqs=2.0)]
    assert choose("first_fit", *servers).instance_id == "b"


def test_least_loaded_counts_waiting_requests_too() -> None:
    assert choose("least_loaded", instance("a", 2, 3), instance("b", 4)).instance_id == "b"


def test_round_robin_takes_turns_and_passes_closed_ones_over() -> None:
    policy = make_policy("round_robin")
    servers = [instance("a"), instance("b", is_open=False), instance("c")]
    assert [choose(policy, *servers).instance_id for _ in range(4)] == ["a", "c", "a", "c"]


def test_random_is_even_and_repeats_with_its_seed() -> None:
    """The chance that a fair draw fails this is below 1e-9 (six standard deviations for each of four)."""
    fleet = Fleet(instance(name) for name in "abcd")

    def draw(seed: int) -> list[int]:
        policy = make_policy("random", PolicySettings(seed=seed))
        return [choice.row for _ in range(4000) if (choice := policy.choose(NEW, fleet))]

    counts = Counter(draw(1))
    assert all(abs(counts[row] - 1000) < 6 * math.sqrt(4000 * 3 / 16) for row in range(4))
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([{"on_device": {"x"}}, {"on_device": {"fresh", "x"}}], "1"),  # active
        ([{"on_device": {"x", "y"}}, {"on_device": {"x"}}], "1"),  # room for another
        ([{"on_device": {"x", "y"}}, {"on_device": {"x", "y"}, "waiting": True}], "1"),  # waiting there
    ],
)
def test_lora_affinity_scores_as_the_reference_scorer(
    servers: list[dict[str, object]], expected: str
) -> None:
    snapshots = [
        InstanceSnapshot(
            instance_id=str(i),
            perf_model=MBGMV,
            on_device=frozenset(each["on_device"]),  # type: ignore[call-overload]
            waiting=requests(f"{i}w", 1, 64, "fresh") if each.get("waiting") else (),
            running=requests(f"{i}r", 3 if str(i) == expected else 1, 8, "x"),
            max_adapters=2.0,
        )
        for i, each in enumerate(servers)
    ]
    assert choose("lora_affinity", *snapshots).instance_id == expected


def test_dlora_goes_where_the_adapter_is_unless_that_is_busier() -> None:
    holds = frozenset({"fresh"})
    assert choose("dlora", instance("a", 3), instance("b", 3, on_device=holds)).instance_id == "b"
    assert choose("dlora", instance("a", 3), instance("b", 6, on_device=holds)).instance_id == "a"


def test_dlora_moves_waiting_requests_until_loads_are_even() -> None:
    fleet = Fleet(
        [instance("busy", 2, 8, on_device=frozenset("a")), instance("idle", on_device=frozenset("a"))]
    )
    moves = make_policy("dlora").migrations(fleet)
    assert {(move.source_id, move.target_id) for move in moves} == {("busy", "idle")}
    assert len({move.request_id for move in moves}) == len(moves) == 5


def test_dlora_leaves_running_requests_where_they_are() -> None:
    fleet = Fleet([instance("busy", 10), instance("idle")])
    assert make_policy("dlora").migrations(fleet) == []


def test_dlora_moves_once_then_rests() -> None:
    fleet = Fleet([instance("busy", 0, 9), instance("idle"), instance("closed", is_open=False)])
    policy = make_policy("dlora")
    for move in policy.migrations(fleet):
        moved = fleet.queued[fleet.ids.index(move.source_id)][move.request_id]
        fleet.finish(move.source_id, move.request_id)
        fleet.enqueue(move.target_id, moved)
    assert policy.migrations(fleet) == []


@pytest.mark.parametrize("name", POLICIES)
def test_closed_instances_are_never_chosen(name: str) -> None:
    policy = make_policy(name, PolicySettings(slo_tpt_ms=1.0))
    for _ in range(5):
        assert choose(policy, instance("shut", is_open=False), instance("open", 20)).instance_id == "open"


@pytest.mark.parametrize("name", POLICIES)
def test_no_open_instance_is_none(name: str) -> None:
    policy = make_policy(name)
    assert policy.choose(NEW, Fleet()) is None
    assert policy.choose(NEW, Fleet([instance("shut", is_open=False)])) is None


@pytest.mark.parametrize("name", POLICIES)
def test_choosing_changes_nothing_in_the_fleet(name: str) -> None:
    fleet = Fleet([instance("a", 3, 2), instance("b", 1, 1)])
    before = fleet.frozen()
    policy = make_policy(name)
    policy.choose(NEW, fleet)
    policy.migrations(fleet)
    for column, kept in vars(before).items():
        assert np.array_equal(vars(fleet)[column], kept), column


def test_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown policy 'best'; choose one of rank_aware,"):
        make_policy("best")
    with pytest.raises(ValueError, match="slo_tpt_ms is 0"):
        PolicySettings(slo_tpt_ms=0.0)
