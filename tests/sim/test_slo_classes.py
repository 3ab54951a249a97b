"""Batch requests beside interactive ones in a simulated fleet."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.sim.builders import PUBLISHED, make_trace
from toppings.lab.simulation.metrics import summarize_run
from toppings.settings import ConfigError
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Tenants, Trace

NUM_BATCH, NUM_INTERACTIVE = 400, 600
OBJECTIVES = {"slo_tpt_ms": 45.0, "slo_ttft_ms": 400.0}


def mixed_trace() -> Trace:
    """All batch requests at once, while interactive ones come for a minute."""
    rng = np.random.default_rng(0)
    arrivals = np.sort(np.append(np.full(NUM_BATCH, 1.0), rng.uniform(0.0, 60.0, NUM_INTERACTIVE)))
    is_batch = arrivals == 1.0
    num = len(arrivals)
    trace = make_trace(
        arrivals.tolist(),
        adapters=rng.integers(0, 4, num).tolist(),
        prompt=np.where(is_batch, 600, 200).tolist(),
        response=np.where(is_batch, 200, 60).tolist(),
        ranks=[8, 16, 32, 64],
    )
    return replace(
        trace,
        tenants=Tenants(is_batch.astype(np.int32), ("office", "nightly"), (1.0, 1.0)),
    )


def config_of(**settings: Any) -> SimConfig:
    defaults = {"num_instances": 3, "mode": "cached", "max_num_seqs": 48, **OBJECTIVES}
    return SimConfig(perf_model=PUBLISHED, **{**defaults, **settings})


def attained(config: SimConfig) -> tuple[float, float, float]:
    """Attainment of the interactive tenant, its TTFT's p99 in ms, and when the last batch request ended."""
    result = Simulator(config, mixed_trace()).run()
    run = summarize_run(result)
    office, nightly = run.tenants
    assert (office.num_ended, nightly.num_ended) == (NUM_INTERACTIVE, NUM_BATCH)
    assert result.tenants is not None
    return office.slo_attainment, office.ttft_ms.p99, result.ended_at[result.tenants.indices == 1].max() / 1e9


def test_batch_requests_cost_interactive_ones_nothing_and_fill_what_they_leave() -> None:
    alike, _, _ = attained(config_of())
    apart, p99_ms, ended_s = attained(config_of(batch_tenants="nightly"))
    assert apart > 0.98 > alike
    assert p99_ms < OBJECTIVES["slo_ttft_ms"]
    assert ended_s < 300


def test_without_objectives_servers_alone_give_way() -> None:
    """Nothing is held: batch requests start at their servers after interactive ones."""
    objectives = {"slo_tpt_ms": float("inf"), "slo_ttft_ms": float("inf")}
    _, alike_ms, _ = attained(config_of(max_num_seqs=16, **objectives))
    _, apart_ms, _ = attained(config_of(max_num_seqs=16, batch_tenants="nightly", **objectives))
    assert apart_ms < alike_ms / 2


@pytest.mark.parametrize("num_routers", [1, 3])
def test_every_step_on_its_own_gives_the_same(num_routers: int) -> None:
    config = config_of(batch_tenants="nightly", num_routers=num_routers)
    assert attained(config) == attained(
        config_of(batch_tenants="nightly", num_routers=num_routers, is_stepwise=True)
    )


def test_a_tenant_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_tenants has 'nobody'"):
        Simulator(config_of(batch_tenants="nightly,nobody"), mixed_trace())
