"""Routers that know little: candidates drawn for each request, several of them, old snapshots."""

from typing import Any

import numpy as np
import pytest

from tests.sim.builders import EXTENDED, PUBLISHED, make_config, simulate
from tests.sim.test_simulator import assert_same
from toppings.cluster.policies import POLICIES
from toppings.config import ConfigError
from toppings.sim.records import SimResult
from toppings.sim.request import SimRequest
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import Workload

BLIND: dict[str, dict[str, Any]] = {
    "candidates": {"candidates": 2},
    "routers": {"num_routers": 3},
    "snapshots": {"snapshot_interval_s": 0.2},
    "all": {"candidates": 3, "num_routers": 2, "snapshot_interval_s": 0.05},
}


def run(policy: str = "rank_aware", num_instances: int = 8, rate: float = 32.0, **settings: Any) -> SimResult:
    trace = Workload(rate=rate, duration_s=6.0, num_adapters=60, lengths="fixed:64:40").make_trace(3)
    config = make_config(
        PUBLISHED, policy=policy, num_instances=num_instances, mode="pipelined", slo_tpt_ms=50.0, **settings
    )
    return simulate(config, trace)


def spread(result: SimResult) -> float:
    """Standard deviation over servers of how many requests each got."""
    return float(np.std(np.bincount(result.rows, minlength=result.config.num_instances)))


@pytest.mark.parametrize("settings", BLIND.values(), ids=BLIND)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_runs_repeat(policy: str, settings: dict[str, Any]) -> None:
    result = run(policy, **settings)
    assert result.has_ended.all()
    assert_same(result, run(policy, **settings))


@pytest.mark.parametrize("name", ["candidates", "routers", "snapshots"])
def test_knowing_less_evens_out_less(name: str) -> None:
    assert spread(run("least_loaded", **BLIND[name])) > spread(run("least_loaded"))


def test_a_router_decides_on_its_snapshot_until_the_next() -> None:
    """No server looks better meanwhile: all requests of an interval with the same best server go there."""
    result = run("least_loaded", snapshot_interval_s=1.0)
    for second in range(6):
        in_second = (result.arrived_at // 10**9) == second
        assert len(set(result.rows[in_second].tolist())) == 1
    assert len(set(result.rows.tolist())) > 1


def test_routers_take_turns_and_each_counts_its_own() -> None:
    trace = Workload(rate=20.0, duration_s=3.0, num_adapters=10).make_trace(0)
    simulator = Simulator(make_config(EXTENDED, num_instances=4, num_routers=2), trace)
    simulator.run(until_s=1.0)
    counted = [dispatcher.fleet.num_requests.sum() for dispatcher in simulator.dispatchers]
    present = [
        sum(
            isinstance(request, SimRequest) and request.router == i
            for server in simulator.instances
            for request in (*server.scheduler.running, *server.scheduler.waiting)
        )
        for i in range(2)
    ]
    assert counted == present
    assert min(present) > 0


def test_round_robin_of_two_routers_begins_at_the_same_server_twice() -> None:
    assert run("round_robin", num_routers=2).rows[:4].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"candidates": -1}, "candidates is -1"),
        ({"num_routers": 0}, "num_routers is 0"),
        ({"snapshot_interval_s": -0.1}, "snapshot_interval_s is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(**settings)
