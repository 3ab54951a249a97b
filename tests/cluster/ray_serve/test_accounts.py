"""The request router's accounts, without Ray: reports and placements in, choices out."""

import math
from typing import Any

import msgspec
import pytest

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.placement import PlacementSettings, Plan, make_placement
from toppings.cluster.placement.plan import Ring
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.ray_serve.accounts import ReplicaAccounts
from toppings.cluster.ray_serve.homes import MAX_ORDERS
from toppings.cluster.ray_serve.messages import AdapterRef, Call
from toppings.cluster.report import RequestEntry, ServerReport
from toppings.sampling_params import SamplingParams

MODEL = load_perf_model("published:mbgmv")
BOTH = {"a": None, "b": None}


def make_accounts(
    policy: str = "least_loaded", slo_tpt_ms: float = math.inf, placement: str = "none"
) -> ReplicaAccounts:
    homes = make_placement(placement, PlacementSettings(num_copies=1))
    return ReplicaAccounts(make_policy(policy, PolicySettings(slo_tpt_ms)), MODEL, homes)


def make_report(**told: Any) -> ServerReport:
    nothing: dict[str, Any] = {
        "kv_tokens_total": None,
        "kv_tokens_used": 0.0,
        "on_device": set(),
        "on_host": set(),
    }
    counts = {"num_running": 0, "num_waiting": 0, "running_ranks": [], "waiting_ranks": [], "requests": []}
    return ServerReport(**{**nothing, **counts, **told})


def make_call(number: int, rank: int = 0, *, tokens: int = 10, avoid: frozenset[str] = frozenset()) -> Call:
    ref = AdapterRef(rank, f"rank{rank}", "/nowhere", "digest", rank, 1000 * rank) if rank else None
    return Call(f"front-{number}", [1] * tokens, SamplingParams(), ref, 20.0, avoid)


def place(accounts: ReplicaAccounts, call: Call, candidates: str = "ab") -> str:
    choice = accounts.place(call, set(candidates), 0.0)
    assert choice is not None
    accounts.fleet.check_integrity()
    return choice.instance_id


def loads(accounts: ReplicaAccounts) -> dict[str, tuple[int, int]]:
    """Running and waiting requests of each replica."""
    rows = (accounts.fleet.instance(replica_id) for replica_id in accounts.fleet.ids)
    return {row.instance_id: (len(row.running), len(row.waiting)) for row in rows}


def test_requests_sent_since_the_last_report_count_at_once() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    assert [place(accounts, make_call(i)) for i in range(4)] == ["a", "b", "a", "b"]
    assert loads(accounts) == {"a": (0, 2), "b": (0, 2)}


def test_a_request_that_ended_makes_room() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    first, second = make_call(0), make_call(1)
    assert [place(accounts, first), place(accounts, second)] == ["a", "b"]
    accounts.end(second.request_id, "b")
    accounts.end(second.request_id, "b")  # Serve may tell it twice
    assert place(accounts, make_call(2)) == "b"


def test_an_end_elsewhere_than_booked_changes_nothing() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    call = make_call(0)
    assert place(accounts, call) == "a"
    accounts.end(call.request_id, "b")
    assert loads(accounts)["a"] == (0, 1)


def test_a_report_starts_and_grows_our_requests() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    call = make_call(0, rank=8, tokens=10)
    place(accounts, call)
    told = make_report(requests=[RequestEntry(call.request_id, "rank8", 8, 10, 5)])
    accounts.set_replicas({"a": told, "b": None})
    assert loads(accounts)["a"] == (1, 0)
    later = make_report(requests=[RequestEntry(call.request_id, "rank8", 8, 10, 7)])
    accounts.set_replicas({"a": later, "b": None})
    accounts.fleet.check_integrity()
    accounts.end(call.request_id, "a")
    accounts.fleet.check_integrity()
    assert loads(accounts)["a"] == (0, 0)


def test_a_report_older_than_an_end_does_not_bring_the_request_back() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    call = make_call(0)
    place(accounts, call)
    accounts.end(call.request_id, "a")
    told = make_report(requests=[RequestEntry(call.request_id, None, 0, 10, 3)])
    accounts.set_replicas({"a": told, "b": None})
    assert loads(accounts)["a"] == (0, 0)


def test_requests_of_another_router_count_until_their_replica_stops_telling_of_them() -> None:
    accounts = make_accounts()
    theirs = [RequestEntry(f"other-{i}", "rank8", 8, 10, i) for i in range(2)]
    accounts.set_replicas({"a": make_report(requests=theirs), "b": None})
    assert loads(accounts)["a"] == (1, 1)
    assert place(accounts, make_call(0)) == "b"
    accounts.set_replicas({"a": make_report(requests=theirs[:1]), "b": None})
    accounts.fleet.check_integrity()
    assert loads(accounts) == {"a": (0, 1), "b": (0, 1)}


def test_a_replica_that_goes_takes_its_requests_along_and_one_that_comes_is_used() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    calls = [make_call(i) for i in range(4)]
    for call in calls:
        place(accounts, call)
    accounts.drop_replica("a")
    accounts.drop_replica("a")
    accounts.end(calls[0].request_id, "a")
    accounts.set_replicas({"b": None, "c": None})
    assert place(accounts, make_call(9), "bc") == "c"
    assert loads(accounts) == {"b": (0, 2), "c": (0, 1)}


def test_a_retried_request_goes_where_it_has_not_failed() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    call = make_call(0)
    assert place(accounts, call) == "a"
    again = make_call(0, avoid=frozenset({"a"}))
    assert place(accounts, again) == "b"
    assert loads(accounts) == {"a": (0, 0), "b": (0, 1)}
    assert place(accounts, make_call(1, avoid=frozenset({"a", "b"}))) == "a"  # better than nowhere


def test_only_candidates_are_chosen() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    assert [place(accounts, make_call(i), "b") for i in range(2)] == ["b", "b"]
    assert accounts.place(make_call(5), set(), 0.0) is None


def test_a_request_that_serve_sent_elsewhere_is_booked_there() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    call = make_call(0)
    assert place(accounts, call) == "a"
    accounts.confirm(call, "b")
    accounts.confirm(call, "b")
    accounts.fleet.check_integrity()
    assert loads(accounts) == {"a": (0, 0), "b": (0, 1)}


def test_the_published_policy_decides_over_what_replicas_report() -> None:
    """24 requests of rank 32 against 16 of rank 64: MBGMV's costs allow both servers one of rank 64, and the
    first is cheaper per request; BGMV's costs forbid the first (figures of the published system).
    """
    entries = {
        "a": [RequestEntry(f"x-{i}", "rank32", 32, 1, 1) for i in range(24)],
        "b": [RequestEntry(f"y-{i}", "rank64", 64, 1, 1) for i in range(16)],
    }
    chosen = {}
    for form in ("bgmv", "mbgmv"):
        accounts = make_accounts("rank_aware", slo_tpt_ms=36.5 if form == "bgmv" else 36.0)
        model = msgspec.to_builtins(load_perf_model(f"published:{form}"))
        accounts.set_replicas(
            {name: make_report(requests=told, perf_model=model) for name, told in entries.items()}
        )
        chosen[form] = place(accounts, make_call(0, rank=64))
    assert chosen == {"bgmv": "b", "mbgmv": "a"}


def test_limits_and_residency_come_from_the_report() -> None:
    accounts = make_accounts("lora_affinity")
    told = make_report(
        kv_tokens_total=640.0, kv_tokens_used=64.0, max_num_seqs=4.0, max_adapters=3.0, on_device={"rank8"}
    )
    accounts.set_replicas({"a": None, "b": told})
    snapshot = accounts.fleet.instance("b")
    assert (snapshot.kv_tokens_total, snapshot.kv_tokens_used) == (640.0, 64.0)
    assert (snapshot.max_num_seqs, snapshot.max_adapters) == (4.0, 3.0)
    assert place(accounts, make_call(0, rank=8)) == "b"


def test_an_adapter_that_was_just_sent_there_stays_in_the_accounts() -> None:
    accounts = make_accounts()
    accounts.set_replicas(BOTH)
    place(accounts, make_call(0, rank=8), "a")
    accounts.set_replicas({"a": make_report(kv_tokens_used=1.0), "b": None})
    assert accounts.fleet.instance("a").on_device == {"rank8"}


def test_a_replicas_own_model_counts_more_than_the_default() -> None:
    accounts = make_accounts()
    own = load_perf_model("published:bgmv")
    accounts.set_replicas({"a": make_report(perf_model=msgspec.to_builtins(own)), "b": None})
    models = [accounts.fleet.instance(name).perf_model for name in "ab"]
    assert models == [own, MODEL]


@pytest.mark.parametrize("policy", ["random", "round_robin", "first_fit", "dlora", "rank_aware_residency"])
def test_every_policy_spreads_equal_requests(policy: str) -> None:
    accounts = make_accounts(policy)
    told = make_report(kv_tokens_total=4096.0, max_num_seqs=8.0)
    accounts.set_replicas({"a": told, "b": told})
    chosen = [place(accounts, make_call(i, rank=8)) for i in range(16)]
    assert set(chosen) == {"a", "b"}


def test_requests_go_to_their_adapters_home() -> None:
    accounts = make_accounts(placement="static_k")
    accounts.set_replicas({each: make_report() for each in "abcd"})
    assert accounts.obey(accounts.planning(0.0)()) == {}
    homes = {place(accounts, make_call(number, rank=8), "abcd") for number in range(6)}
    assert len(homes) == 1
    left = set("abcd") - homes
    accounts.set_replicas({each: make_report() for each in left})
    accounts.obey(accounts.planning(1.0)())
    assert len({place(accounts, make_call(number, rank=8), "".join(left)) for number in range(6, 12)}) == 1


def test_homes_that_demand_asks_for_are_told_once() -> None:
    accounts = make_accounts(placement="adaptive")
    accounts.set_replicas({each: make_report(adapter_bytes_total=1e6) for each in "abcd"})
    for number in range(40):
        accounts.place(make_call(number, rank=8), set("a"), number * 0.1)
    told = accounts.obey(accounts.planning(4.0)())
    assert set(told) == {"rank8"}
    assert told["rank8"]
    assert "a" not in told["rank8"]  # it holds it
    assert accounts.obey(accounts.planning(4.1)()) == {}


def test_homes_by_rule_are_told_of_what_is_asked_for() -> None:
    """The plan stays the same one as long as the replicas do."""
    accounts = make_accounts(placement="static_k")
    accounts.set_replicas({each: make_report() for each in "abcd"})
    assert accounts.obey(accounts.planning(0.0)()) == {}
    call = make_call(0, rank=8)
    home = place(accounts, call, "abcd")
    accounts.end(call.request_id, home)
    accounts.set_replicas({each: make_report(kv_tokens_used=1.0) for each in "abcd"})
    assert accounts.obey(accounts.planning(1.0)()) == {"rank8": [home]}
    assert accounts.obey(accounts.planning(2.0)()) == {}


def plan_of(*names: str, homes: tuple[str, ...] = ("a",)) -> Plan:
    return Plan(("a", "b"), Ring((), 0), dict.fromkeys(names, homes))


def test_homes_that_hold_an_adapter_already_are_not_told() -> None:
    accounts = make_accounts(placement="static_k")
    accounts.set_replicas({"a": make_report(on_host={"x"}), "b": make_report(on_device={"z"})})
    assert accounts.obey(plan_of("x", "y", "z", homes=("a", "b", "gone"))) == {
        "x": ["b"],
        "y": ["a", "b"],
        "z": ["a"],
    }


def test_homes_beyond_those_told_at_once_are_told_with_the_next_plans_after_its_own() -> None:
    accounts = make_accounts(placement="static_k")
    accounts.set_replicas({"a": make_report(), "b": make_report()})
    names = [f"a{i}" for i in range(MAX_ORDERS + 3)]
    assert [*accounts.obey(plan_of(*names))] == names[:MAX_ORDERS]
    last = names.pop()  # it is at home there no more
    assert [*accounts.obey(plan_of("new", *names))] == ["new", *names[MAX_ORDERS:]]
    assert accounts.obey(plan_of("new", *names)) == {}
    assert accounts.obey(plan_of("new", *names, last)) == {last: ["a"]}
