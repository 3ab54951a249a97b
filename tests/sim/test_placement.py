"""Placements in the simulator: what they win where devices are short, and a server that dies."""

from dataclasses import replace

import numpy as np
import pytest

from tests.sim.builders import PUBLISHED, make_config, make_trace, simulate, stepwise
from toppings.cluster.placement import PLACEMENTS
from toppings.lab.simulation.metrics import summarize_run
from toppings.sim.records import NEVER
from toppings.sim.settings import LLAMA_7B_QKV_BYTES_PER_RANK, SimConfig, base_tpt_ms
from toppings.sim.synth.workload import Workload

SHORT = Workload(rate=14.0, duration_s=40.0, num_adapters=200, popularity="zipf:1.0")
"""On four servers whose devices hold 16 adapters each."""


def short_config(placement: str, **settings: object) -> SimConfig:
    model = replace(PUBLISHED, link_gbps=1.0)
    fields = {
        "policy": "rank_aware_residency",
        "mode": "pipelined",
        "num_instances": 4,
        "slo_tpt_ms": 1.5 * base_tpt_ms(model),
        "device_pool_bytes": 16 * 30 * LLAMA_7B_QKV_BYTES_PER_RANK,
        "max_model_len": 8192,
        "kv_cache_tokens": 65536,
    }
    return make_config(model, placement=placement, **{**fields, **settings})


def test_placements_keep_more_requests_within_the_objective_with_fewer_loads() -> None:
    trace = SHORT.make_trace(0)
    results = {name: simulate(short_config(name), trace) for name in PLACEMENTS}
    attained = {name: summarize_run(result).slo_attainment for name, result in results.items()}
    loads = {name: sum(i.num_adapter_loads for i in r.instances) for name, r in results.items()}
    for name in ("static_k", "shuffle_shard", "adaptive"):
        assert attained[name] > attained["none"] + 0.02, attained
        assert loads[name] < loads["none"], loads
    assert results["none"].num_moves == []
    assert len(results["adaptive"].num_moves) > 15


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_jumps_and_single_steps_are_the_same_with_a_placement_and_a_death(placement: str) -> None:
    config = short_config(placement, kill_at_s=6.0)
    trace = replace(SHORT, duration_s=10.0).make_trace(1)
    one, other = simulate(config, trace), simulate(stepwise(config), trace)
    for name in ("first_token_at", "ended_at", "rows", "is_rejected"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.num_moves == other.num_moves


def test_a_server_that_dies_loses_what_had_a_token_and_nothing_else() -> None:
    """Steps take 10 ms. At 25 ms the second of two servers has one request with two tokens and one that
    waits."""
    config = make_config(num_instances=2, max_num_seqs=1, kill_at_s=0.025)
    result = simulate(config, make_trace([0.0] * 4 + [0.1], response=10))
    assert result.is_rejected.tolist() == [False, True, False, False, False]
    assert result.rows.tolist() == [0, 1, 0, 0, 0]
    assert (result.ended_at[[0, 2, 3, 4]] != NEVER).all()
    assert result.num_present == 0


def test_a_server_that_dies_as_it_waits_for_an_adapter_has_waited_no_longer_than_it_lived() -> None:
    """Loads take 100 ms; at 50 ms the second of two servers dies in its first step."""
    model = replace(PUBLISHED, link_gbps=8 * LLAMA_7B_QKV_BYTES_PER_RANK / 1e8)
    settings = {"mode": "on_demand", "num_instances": 2, "device_pool_bytes": 2**40, "kill_at_s": 0.05}
    result = simulate(make_config(model, **settings), make_trace([0.0, 0.0, 0.1], response=10, ranks=[8]))
    first, second = result.instances
    assert first.exposed_s > 0.0
    assert (second.num_adapter_loads, second.exposed_s, second.busy_s) == (1, 0.0, 0.0)
