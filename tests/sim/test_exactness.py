"""Where steps and loads cost the same, the simulator gives exactly what the engine does: to the nanosecond.

The engine is the real one (scheduler, manager, device pool, eviction, bookkeeping) on a virtual clock; only
the forward is a stand-in that lets time pass.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.sim.builders import EXTENDED, make_config, make_trace, simulate
from tests.sim.virtual_engine import BYTES_PER_RANK, NUM_LAYERS, make_registry, play_virtually
from toppings.adapters.registry import AdapterRegistry
from toppings.cluster.perf_model import PerfModel, batch_features
from toppings.lab.players.engine import PlayedStep
from toppings.sim.records import InstanceTotals
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Tenants, Trace

RANKS = (2, 4, 8, 16) * 6
SLOW_LINK = replace(EXTENDED, link_gbps=0.001)
"""The adapters' 2 to 16 KiB take 2 to 16 ms; prefills take from 10 ms on."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    registry = make_registry(tmp_path_factory.mktemp("adapters"), RANKS)
    yield registry
    registry.close()


def config_of(**settings: Any) -> SimConfig:
    defaults = {
        "mode": "pipelined",
        "num_layers": NUM_LAYERS,
        "bytes_per_rank": BYTES_PER_RANK,
        "device_pool_bytes": 2**20,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "scheduling_policy": "fcfs",  # so that cases are those whose pools have no fragments
    }
    return make_config(SLOW_LINK, **{**defaults, **settings})


def trace_of(seed: int = 0, **workload: Any) -> Trace:
    """Arrivals in whole nanoseconds."""
    defaults = {"rate": 8.0, "duration_s": 8.0, "num_adapters": len(RANKS), "popularity": "uniform"}
    trace = Workload(**{**defaults, **workload}).make_trace(seed)
    return replace(
        trace,
        arrivals_s=np.round(trace.arrivals_s * NS_PER_S) / NS_PER_S,
        prompt_tokens=np.minimum(trace.prompt_tokens, 700),
        response_tokens=np.minimum(trace.response_tokens, 200),
        ranks=np.array(RANKS, dtype=np.int32),
    )


def assert_agree(registry: AdapterRegistry, config: SimConfig, trace: Trace) -> InstanceTotals:
    """The simulator's totals. Time is whole nanoseconds in both; rounding may differ once per load."""
    outcomes, steps, counters = play_virtually(registry, config, trace)
    assert counters["fragmented"] == 0, "the simulator's pool has no fragments: take another case"
    result = simulate(config, trace)
    totals = result.instances[0]
    assert _counts_of(totals) == {name: counters[name] for name in _counts_of(totals)}
    assert [outcome.num_tokens for outcome in outcomes] == result.num_tokens.tolist()
    for name, after in (("first_token_at", "ttft_ms"), ("ended_at", "e2e_ms")):
        instants_s = [outcome.sent_at + getattr(outcome, after) / 1e3 for outcome in outcomes]
        engine_ns = np.rint(np.array(instants_s) * NS_PER_S).astype(np.int64)
        difference = np.abs(engine_ns - getattr(result, name))
        first = int((difference > totals.num_adapter_loads).argmax())
        assert difference[first] <= totals.num_adapter_loads, (
            f"{name} of {first}: {difference[first]} ns apart"
        )
    if trace.blocks is None:  # a player does not tell cached tokens from computed ones
        assert_steps_are_the_models(steps, config.perf_model)
    return totals


def assert_steps_are_the_models(steps: list[PlayedStep], model: PerfModel) -> None:
    """What a player notes of the engine's steps is what they computed: the model gives the same times."""
    for step in steps:
        features = [batch_features(rows) for rows in (step.decode, step.prefill)]
        ms = model.step_ms(decode=features[0], prefill=features[1])
        assert step.ms > ms - 1e-5 if step.is_cold else step.ms == pytest.approx(ms, abs=1e-5)


def _counts_of(totals: InstanceTotals) -> dict[str, int]:
    return {
        "steps": totals.num_steps,
        "generation_tokens": totals.num_tokens,
        "preemptions": totals.num_preemptions,
        "drains": totals.num_drains,
        "adapter_loads": totals.num_adapter_loads,
        "prefix_cache_queries": totals.num_queried_tokens,
        "prefix_cache_hits": totals.num_cached_tokens,
    }


def scarce(**settings: Any) -> SimConfig:
    """Room for about a third of the adapters."""
    return config_of(device_pool_bytes=60 * BYTES_PER_RANK, **settings)


def test_adapters_all_on_the_device(registry: AdapterRegistry) -> None:
    totals = assert_agree(registry, config_of(mode="cached"), trace_of())
    assert totals.num_adapter_loads == 0


@pytest.mark.parametrize("mode", ["pipelined", "on_demand"])
@pytest.mark.parametrize("eviction", ["value", "lru"])
def test_cold_adapters(registry: AdapterRegistry, mode: str, eviction: str) -> None:
    totals = assert_agree(registry, scarce(mode=mode, eviction=eviction), trace_of())
    assert totals.num_adapter_loads > 30


def test_bursts_of_long_prompts_in_chunks(registry: AdapterRegistry) -> None:
    config = config_of(mode="cached", max_num_seqs=16, max_num_batched_tokens=48)
    trace = trace_of(arrivals="gamma:4", lengths="azure_conversation")
    totals = assert_agree(registry, config, trace)
    assert totals.num_steps > trace.prompt_tokens.sum() / 48


def test_pages_that_run_out(registry: AdapterRegistry) -> None:
    config = config_of(mode="cached", max_num_batched_tokens=128, kv_cache_tokens=1024)
    totals = assert_agree(registry, config, trace_of(rate=16.0))
    assert totals.num_preemptions > 40


def test_preempted_requests_whose_adapters_are_gone(registry: AdapterRegistry) -> None:
    totals = assert_agree(registry, scarce(kv_cache_tokens=1024), trace_of(4, rate=16.0))
    assert totals.num_preemptions > 20
    assert totals.num_adapter_loads > 60


@pytest.mark.parametrize("policy", ["fair", "fcfs", "priority"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 6},
        {"kv_cache_tokens": 1024},
        {"mode": "cached"},
        {"max_num_seqs": 6, "batch_tenants": "flood"},
        {"kv_cache_tokens": 1024, "batch_tenants": "flood,other"},
    ],
)
def test_tenants_that_compete(registry: AdapterRegistry, policy: str, settings: dict[str, Any]) -> None:
    trace = trace_of(6, rate=16.0)
    trace = replace(trace, adapters=trace.adapters // 4 * 4 + 3)  # of one size, which leave no fragments
    indices = np.array(Random(0).choices(range(3), [8, 1, 1], k=len(trace)), dtype=np.int32)
    trace = replace(trace, tenants=Tenants(indices, ("flood", "guest", "other"), (1.0, 1.0, 3.0)))
    totals = assert_agree(registry, scarce(scheduling_policy=policy, **settings), trace)
    has_classes = "batch_tenants" in settings
    assert totals.num_preemptions > 0 or (policy == "fcfs" and not has_classes) or "mode" in settings


def test_requests_that_starve_for_room(registry: AdapterRegistry) -> None:
    config = config_of(device_pool_bytes=20 * BYTES_PER_RANK, max_adapter_wait_s=0.2)
    totals = assert_agree(registry, config, trace_of(rate=20.0))
    assert totals.num_drains > 20
    assert totals.num_preemptions > 0


def test_requests_of_one_token_leave_as_their_adapter_lands(registry: AdapterRegistry) -> None:
    trace = trace_of(rate=40.0)
    trace = replace(trace, response_tokens=np.ones_like(trace.response_tokens))
    totals = assert_agree(registry, scarce(), trace)
    assert totals.num_steps > 100
    assert totals.num_adapter_loads > 100


@pytest.mark.parametrize(("response", "stays"), [(3, 4), (1, 0)])
def test_of_adapters_worth_the_same_the_same_one_leaves(
    registry: AdapterRegistry, response: int, stays: int
) -> None:
    # adapters 0, 4 and 8 have rank 2. The first to become idle leaves: in the order of the batch, which is by
    # adapter, but with their first tokens in the order of their loads
    config = config_of(device_pool_bytes=4 * BYTES_PER_RANK)
    trace = make_trace(
        [0.0, 0.0, 1.0, 2.0], adapters=[4, 0, 8, stays], response=[response, response, 3, 3], ranks=RANKS
    )
    totals = assert_agree(registry, config, trace)
    assert (totals.num_adapter_loads, totals.num_adapter_hits) == (3, 1)


def random_case(rng: Random) -> tuple[SimConfig, Trace]:
    kv_cache_tokens = rng.choice([1024, 2048, 8192])
    config = config_of(
        mode=rng.choice(["cached", "pipelined", "on_demand"]),
        eviction=rng.choice(["value", "lru"]),
        device_pool_bytes=rng.choice([20, 40, 80, 200]) * BYTES_PER_RANK,
        max_num_seqs=rng.choice([2, 8, 24]),
        max_num_batched_tokens=rng.choice([24, 64, 512, 2048]),
        kv_cache_tokens=kv_cache_tokens,
        max_adapter_wait_s=rng.choice([0.05, 0.5]),
    )
    trace = trace_of(
        rng.randrange(1000),
        rate=rng.choice([2.0, 8.0, 25.0]),
        duration_s=3.0,
        arrivals=rng.choice(["poisson", "gamma:3", "even"]),
        popularity=rng.choice(["published", "uniform"]),
        lengths=rng.choice(["chat", "azure_code", "azure_conversation"]),
    )
    return config, trace


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes(registry: AdapterRegistry, seed: int) -> None:
    assert_agree(registry, *random_case(Random(seed)))
