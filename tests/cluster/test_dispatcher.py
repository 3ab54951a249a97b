"""One dispatcher under all who place requests: placements, progress and reports in, choices out."""

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from toppings.cluster.dispatcher import MAX_OTHERS, MAX_RECENT_ADAPTERS, Dispatcher
from toppings.cluster.lengths import ResponseLengths
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import POLICIES, PolicySettings, make_policy
from toppings.cluster.report import RequestEntry, ServerReport
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

MODEL, OTHER_MODEL = load_perf_model("published:mbgmv"), load_perf_model("published:bgmv")


def make_dispatcher(policy: str = "least_loaded", names: str = "ab", **settings: Any) -> Dispatcher:
    snapshots = [InstanceSnapshot(instance_id=name, perf_model=MODEL) for name in names]
    return Dispatcher(make_policy(policy, PolicySettings()), snapshots, **settings)


def make_request(number: int, rank: int = 8, adapter: str | None = None) -> RequestSnapshot:
    return RequestSnapshot(str(number), adapter or f"rank{rank}", rank, 10, 20.0)


def make_report(ranks: list[int] | None = None, **told: Any) -> ServerReport:
    counts: dict[str, Any] = {"num_running": len(ranks or ()), "num_waiting": 0, "running_ranks": ranks}
    rest: dict[str, Any] = {
        "waiting_ranks": None if ranks is None else [],
        "kv_tokens_total": None,
        "kv_tokens_used": 0.0,
    }
    return ServerReport(**{**counts, **rest, "on_device": set(), "on_host": set(), **told})


def place(dispatcher: Dispatcher, number: int, rank: int = 8, now: float = 0.0) -> str:
    choice = dispatcher.place(make_request(number, rank), now)
    assert choice is not None
    return choice.instance_id


def num_requests(dispatcher: Dispatcher) -> list[float]:
    dispatcher.fleet.check_integrity()
    return list(dispatcher.fleet.num_requests.tolist())


def test_requests_that_came_another_way_count_until_they_are_told_no_longer() -> None:
    dispatcher = make_dispatcher()
    assert place(dispatcher, 0, rank=64) == "a"
    dispatcher.report("a", make_report([64, 64, 8]))
    assert num_requests(dispatcher) == [3, 0]
    assert dispatcher.own_ranks("a") == {64: 1}
    assert sorted(dispatcher.fleet.ranks("a").items()) == [(8, 1), (64, 2)]
    dispatcher.report("a", make_report([64]))
    assert num_requests(dispatcher) == [1, 0]


def test_what_ended_or_began_while_the_report_was_on_its_way_is_no_other_request() -> None:
    dispatcher = make_dispatcher(names="a")
    place(dispatcher, 0)
    own_then = dispatcher.own_ranks("a")
    dispatcher.ended("0")
    dispatcher.report("a", make_report([8]), own_then=own_then)
    assert num_requests(dispatcher) == [0]
    for number in (1, 2):
        place(dispatcher, number)
    dispatcher.report("a", make_report([8]), own_then=Counter())
    assert num_requests(dispatcher) == [2]


def test_others_without_ranks_count_as_of_the_given_one_and_not_without_end() -> None:
    dispatcher = make_dispatcher(names="a")
    place(dispatcher, 0)
    dispatcher.report("a", make_report(num_running=3), other_rank=16)
    assert dict(dispatcher.fleet.ranks("a")) == {8: 1, 16: 2}
    dispatcher.report("a", make_report(num_running=10**9), other_rank=16)
    assert num_requests(dispatcher) == [1 + MAX_OTHERS]


def test_an_adapter_is_held_where_it_is_told_or_on_its_way() -> None:
    dispatcher = make_dispatcher(names="a")
    place(dispatcher, 0, rank=8)
    place(dispatcher, 1, rank=16)
    dispatcher.ended("1")
    dispatcher.report("a", make_report([8, 64], on_device={"told"}, on_host={"host"}))
    snapshot = dispatcher.fleet.instance("a")
    assert snapshot.on_device == {"told", "rank8"}
    assert snapshot.on_host == {"host"}


def test_a_server_that_does_not_tell_is_believed_to_hold_what_was_used_last() -> None:
    dispatcher = make_dispatcher(names="a")
    dispatcher.report("a", make_report())
    for number in range(MAX_RECENT_ADAPTERS + 2):
        dispatcher.place(make_request(number, adapter=f"x{number}"), 0.0)
        dispatcher.ended(str(number))
    dispatcher.place(make_request(999, adapter="x2"), 0.0)
    dispatcher.place(make_request(1000, adapter="new"), 0.0)
    for request_id in ("999", "1000"):
        dispatcher.ended(request_id)
    dispatcher.report("a", make_report())
    held = dispatcher.fleet.instance("a").on_device
    assert len(held) == MAX_RECENT_ADAPTERS
    assert {"x2", "new"} < held
    assert "x3" not in held


def test_an_avoided_server_gets_requests_only_where_there_is_no_other() -> None:
    dispatcher = make_dispatcher()
    dispatcher.avoid("a", until=5.0)
    assert [place(dispatcher, i, now=1.0) for i in range(2)] == ["b", "b"]
    dispatcher.fleet.set_open("b", False)
    assert place(dispatcher, 2, now=1.0) == "a"
    dispatcher.fleet.set_open("b", True)
    assert [place(dispatcher, i, now=5.0) for i in (3, 4)] == ["a", "a"]


def test_a_request_placed_anew_has_left_where_it_was() -> None:
    dispatcher = make_dispatcher()
    assert place(dispatcher, 0) == "a"
    dispatcher.fleet.set_open("a", False)
    assert place(dispatcher, 0) == "b"
    assert num_requests(dispatcher) == [0, 1]
    dispatcher.sent(make_request(0), "a")
    assert num_requests(dispatcher) == [1, 0]
    assert dispatcher.place_of("0") == "a"


def test_a_server_that_goes_takes_its_requests_along() -> None:
    dispatcher = make_dispatcher()
    place(dispatcher, 0)
    dispatcher.remove_instance("a")
    dispatcher.ended("0")
    assert dispatcher.place_of("0") is None
    assert num_requests(dispatcher) == [0]


@pytest.mark.parametrize("keeps_model", [False, True])
def test_a_servers_own_costs_count_unless_others_were_set(keeps_model: bool) -> None:
    dispatcher = make_dispatcher(names="")
    dispatcher.add_instance(InstanceSnapshot(instance_id="a", perf_model=MODEL), keeps_model=keeps_model)
    for told in (msgspec.to_builtins(OTHER_MODEL), {"version": 99}):
        dispatcher.report("a", make_report([], perf_model=told))
        assert dispatcher.fleet.instance("a").perf_model == (MODEL if keeps_model else OTHER_MODEL)


def test_limits_that_are_told_no_longer_are_unknown() -> None:
    dispatcher = make_dispatcher(names="a")
    dispatcher.report("a", make_report([], kv_tokens_total=64.0, max_num_seqs=2.0))
    assert (dispatcher.fleet.kv_tokens_total[0], dispatcher.fleet.max_num_seqs[0]) == (64.0, 2.0)
    dispatcher.report("a", make_report([]))
    assert (dispatcher.fleet.kv_tokens_total[0], dispatcher.fleet.max_num_seqs[0]) == (float("inf"),) * 2


def test_expected_lengths_follow_the_responses_and_keep_to_the_limit() -> None:
    lengths = ResponseLengths(100.0)
    lengths.note(50)
    assert (lengths.expected(), lengths.expected(10), lengths.expected(0.5)) == (75.0, 10, 1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_happens_the_accounts_add_up(policy: str) -> None:
    """A thousand random events; what is left in the end is what was placed and has not ended."""
    dice, dispatcher = random.Random(policy), make_dispatcher(policy, "abc", is_own=str.isdigit)
    alive: list[str] = []
    for number in range(1000):
        if dice.random() < 0.5:
            place(dispatcher, number, dice.choice((8, 64)), number)
            alive.append(str(number))
            continue
        server = dice.choice("abc")
        there = [each for each in alive if dispatcher.place_of(each) == server]
        entries = [RequestEntry(each, "x", 8, 10, dice.randrange(4)) for each in (*there, f"other-{server}")]
        dispatcher.report(server, make_report([], requests=dice.sample(entries, len(entries) // 2)))
        if there:
            alive.remove(there[0])
            dispatcher.ended(there[0], dice.randrange(100))
        if policy == "dlora" and (moves := dispatcher.moves()):
            move = moves[0]
            dispatcher.sent(dispatcher.fleet.request(move.source_id, move.request_id), move.target_id)
    for server in "abc":
        dispatcher.report(server, make_report([], requests=[]))
    assert sum(num_requests(dispatcher)) == len(alive)
    for request_id in alive:
        dispatcher.ended(request_id)
    assert num_requests(dispatcher) == [0, 0, 0]
