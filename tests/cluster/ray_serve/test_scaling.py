"""How many replicas Serve keeps by demand: from requests that were placed to what Serve's policy answers."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext, RequestRouterConfig

from tests.cluster.ray_serve.test_accounts import make_accounts, make_call, make_report
from toppings.cluster.ray_serve import homes
from toppings.cluster.ray_serve.app import ROUTER, SCALING
from toppings.cluster.ray_serve.scaling import DOWN_SHARE, KEPT_S, WANTED, Wanted

SLO_MS = 40.0


def wanted_after(num_requests: int, over_s: float, num_replicas: int = 2) -> int:
    """What the request router finds when so many requests have come."""
    accounts = make_accounts("rank_aware", SLO_MS)
    accounts.set_replicas({f"r{i}": make_report(max_num_seqs=64) for i in range(num_replicas)})
    for number in range(num_requests):
        call = make_call(number, rank=16, tokens=100)
        choice = accounts.place(call, set(accounts.fleet.ids), number * over_s / num_requests)
        assert choice is not None
        accounts.end(call.request_id, choice.instance_id)
    return accounts.sizing(over_s)()


def decide(told: dict[str, list[float]], now: int) -> int:
    """By the policy as Serve's controller has it: made from its import path, and by value."""
    context = AutoscalingContext(
        **dict.fromkeys(AutoscalingContext.__init__.__annotations__),
    )
    context.target_num_replicas = context.current_num_replicas = now
    context._raw_metrics_value = {WANTED: {name: series_of(values) for name, values in told.items()}}
    policy = AutoscalingConfig(policy={"policy_function": SCALING}).policy.get_policy()
    number, remembered = policy(context)
    assert remembered == {}
    return int(number)


def series_of(values: list[float]) -> list[Any]:
    from ray.serve._private.common import TimeStampedValue

    return [TimeStampedValue(float(at), value) for at, value in enumerate(values)]


def test_more_demand_asks_for_more_replicas() -> None:
    some, more = wanted_after(40, 10.0), wanted_after(800, 10.0)
    assert 1 <= some < more
    wanted = Wanted()
    wanted.note(more, 0.0)
    assert decide({"r0": [wanted.stats(1.0)[WANTED]]}, now=2) == more


def test_a_number_holds_for_a_while_only() -> None:
    wanted = Wanted()
    assert wanted.stats(0.0) == {WANTED: 0.0}
    wanted.note(7, 100.0)
    assert wanted.stats(100.0 + KEPT_S) == {WANTED: 7.0}
    assert wanted.stats(101.0 + KEPT_S) == {WANTED: 0.0}


@pytest.mark.parametrize("told", [{}, {"r0": []}, {"r0": [5.0, 0.0]}])
def test_where_nobody_tells_of_a_number_replicas_stay(told: dict[str, list[float]]) -> None:
    assert decide(told, now=3) == 3


def test_the_largest_of_what_replicas_told_last_counts() -> None:
    assert decide({"r0": [9.0, 4.0], "r1": [6.0], "r2": [0.0]}, now=2) == 6


def test_few_replicas_go_at_once_so_that_adapters_keep_a_home() -> None:
    """Down from 40 to 2: each step leaves of the adapters, which have two homes each, hardly one without."""
    now, steps = 40, []
    while now > 2:
        now = decide({"r0": [2.0]}, now)
        steps.append(now)
    before = [40, *steps]
    assert steps[-1] == 2
    assert all(0 < old - new <= max(1, DOWN_SHARE * old) for old, new in zip(before, steps, strict=False))


def test_what_the_router_tells_reaches_the_front_although_serve_copies_it() -> None:
    copied = RequestRouterConfig(request_router_class=ROUTER).get_request_router_class()
    assert copied.choose_replicas.__globals__["homes"] is homes
