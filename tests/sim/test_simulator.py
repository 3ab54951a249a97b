"""The simulator: worked examples by hand, the jump against single steps, conservation, determinism."""

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.sim.builders import (
    EXTENDED,
    FLAT,
    PUBLISHED,
    STEP_MS,
    make_config,
    make_trace,
    simulate,
    stepwise,
)
from toppings.cluster.policies import POLICIES
from toppings.config import ConfigError
from toppings.lab.simulation.metrics import latencies_of, summarize_run
from toppings.sim.loading import MODES
from toppings.sim.records import NEVER, SimResult
from toppings.sim.settings import NS_PER_MS, SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

COLUMNS = ("arrived_at", "first_token_at", "ended_at", "rows", "num_tokens", "is_rejected")


def ms(instants: "np.ndarray[Any, Any]") -> list[float]:
    return [float(instant) / NS_PER_MS for instant in instants]


def assert_same(one: SimResult, other: SimResult) -> None:
    for name in COLUMNS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.instances == other.instances
    assert (one.wall_s, one.num_breaking) == (other.wall_s, other.num_breaking)


# --- by hand: every step takes 10 ms ---


def test_a_lone_request_gets_a_token_per_step() -> None:
    result = simulate(make_config(), make_trace([0.5], response=4))
    assert (ms(result.first_token_at), ms(result.ended_at)) == ([510.0], [540.0])
    assert (result.instances[0].num_steps, result.instances[0].num_tokens) == (4, 4)
    assert result.instances[0].busy_s == pytest.approx(0.040)


def test_a_request_that_arrives_during_a_step_joins_the_next_one() -> None:
    result = simulate(make_config(), make_trace([0.0, 0.015], response=4))
    assert ms(result.first_token_at) == [10.0, 30.0]
    assert ms(result.ended_at) == [40.0, 60.0]


def test_a_request_that_arrives_as_a_step_ends_is_in_the_next_one() -> None:
    result = simulate(make_config(), make_trace([0.0, 0.020], response=4))
    assert ms(result.first_token_at) == [10.0, 30.0]


def test_a_request_of_one_token_ends_with_its_prefill() -> None:
    result = simulate(make_config(), make_trace([0.0], response=1))
    assert ms(result.first_token_at) == ms(result.ended_at) == [STEP_MS]


def test_a_long_prompt_takes_a_step_per_chunk() -> None:
    config = make_config(max_num_batched_tokens=64, max_num_seqs=8)
    result = simulate(config, make_trace([0.0], prompt=200, response=2))
    assert ms(result.first_token_at) == [40.0]


def test_at_most_max_num_seqs_requests_run_at_once() -> None:
    result = simulate(make_config(max_num_seqs=1), make_trace([0.0, 0.0], response=3))
    assert ms(result.first_token_at) == [10.0, 40.0]


def test_round_robin_spreads_requests_over_instances() -> None:
    result = simulate(make_config(num_instances=3), make_trace([0.0, 0.1, 0.2, 0.3]))
    assert result.rows.tolist() == [0, 1, 2, 0]


def test_generation_ends_at_the_models_length() -> None:
    result = simulate(make_config(max_model_len=16), make_trace([0.0], prompt=10, response=100))
    assert result.num_tokens.tolist() == [6]
    assert ms(result.ended_at) == [60.0]


def test_a_prompt_that_can_never_fit_is_rejected_and_the_others_are_served() -> None:
    result = simulate(make_config(max_model_len=16), make_trace([0.0, 0.0], prompt=[16, 8]))
    assert result.is_rejected.tolist() == [True, False]
    assert summarize_run(result).num_rejected == 1


def test_an_adapter_that_no_pool_can_hold_is_rejected() -> None:
    config = make_config(mode="on_demand", device_pool_bytes=100, bytes_per_rank=10)
    result = simulate(config, make_trace([0.0, 0.0], adapters=[0, 1], ranks=(8, 64)))
    assert result.is_rejected.tolist() == [False, True]


@pytest.mark.parametrize(("mode", "first_ms"), [("cached", 10.0), ("on_demand", 26.0), ("pipelined", 17.0)])
def test_a_cold_request_waits_for_its_adapter_as_its_mode_says(mode: str, first_ms: float) -> None:
    # 16 MB over 1 GB/s take 16 ms; with 10 layers of 1 ms, pipelining exposes 16 - 9 of them
    config = make_config(mode=mode, bytes_per_rank=2_000_000, num_layers=10)
    result = simulate(config, make_trace([0.0, 1.0]))
    assert ms(result.first_token_at) == [first_ms, 1010.0]
    assert result.instances[0].exposed_s == pytest.approx((first_ms - 10.0) / 1000)


def test_a_cold_start_delays_those_that_share_its_step() -> None:
    config = make_config(mode="on_demand", bytes_per_rank=2_000_000)
    result = simulate(config, make_trace([0.0, 0.03], adapters=[0, 1], ranks=(8, 8), response=6))
    # the first: 26 ms, then 36; the other's prefill with its load ends at 62; then decodes of 10 ms
    assert ms(result.ended_at)[0] == pytest.approx(26 + 10 + 26 + 3 * 10)


def test_an_adapter_on_disk_is_read_while_its_request_waits() -> None:
    model = replace(FLAT, disk_gbps=1.0)
    config = make_config(model, mode="on_demand", bytes_per_rank=1_000_000, host_store_bytes=10**9)
    result = simulate(config, make_trace([0.0]))
    assert ms(result.first_token_at) == [8.0 + 8.0 + 10.0]


def test_tpt_is_end_to_end_latency_over_generated_tokens() -> None:
    result = simulate(make_config(slo_tpt_ms=10.0), make_trace([0.0, 0.001], response=[4, 8]))
    assert latencies_of(result).tpt.tolist() == [10.0, (9 + 8 * 10) / 8]
    assert summarize_run(result).slo_attainment == 0.5


# --- the jump ---


def random_case(rng: Random) -> tuple[SimConfig, Trace]:
    config = make_config(
        rng.choice([PUBLISHED, EXTENDED]),
        policy=rng.choice(list(POLICIES)),
        num_instances=rng.choice([1, 2, 4]),
        mode=rng.choice(list(MODES)),
        slo_tpt_ms=45.0,
        cpu_gflops=rng.choice([500.0, 5000.0]),
        max_num_seqs=rng.choice([4, 16, 64]),
        max_num_batched_tokens=rng.choice([64, 256, 2048]),
        max_model_len=512,
        kv_cache_tokens=rng.choice([1024, 4096]),
        page_size=rng.choice([1, 4, 16]),
        device_pool_bytes=rng.choice([2 * 10**8, 10**9]),
        host_store_bytes=rng.choice([0, 3 * 10**8, 2 * 10**9]),
        max_adapter_wait_s=rng.choice([0.05, 0.5]),
    )
    workload = Workload(
        arrivals=rng.choice(["poisson", "code", "even"]),
        popularity=rng.choice(["published", "uniform"]),
        lengths=rng.choice(["chat", "azure_code"]),
        rate=rng.choice([2.0, 8.0, 20.0]),
        duration_s=6.0,
        num_adapters=rng.choice([4, 50, 500]),
    )
    return config, workload.make_trace(rng.randrange(1000))


@pytest.mark.parametrize("seed", range(24))
def test_jumping_over_decode_steps_gives_exactly_what_single_steps_give(seed: int) -> None:
    config, trace = random_case(Random(seed))
    assert_same(simulate(config, trace), simulate(stepwise(config), trace))


def crowded(**settings: Any) -> tuple[SimConfig, Trace]:
    trace = Workload(rate=20.0, duration_s=5.0, num_adapters=50, popularity="uniform").make_trace(0)
    return make_config(PUBLISHED, max_model_len=512, **settings), trace


def test_jumping_is_exact_where_pages_run_out_and_requests_are_preempted() -> None:
    config, trace = crowded(kv_cache_tokens=1024)
    result = simulate(config, trace)
    assert result.instances[0].num_preemptions > 10
    assert_same(result, simulate(stepwise(config), trace))


def test_jumping_is_exact_where_starved_adapters_drain_others() -> None:
    config, trace = crowded(mode="pipelined", device_pool_bytes=2 * 10**8, max_adapter_wait_s=0.1)
    result = simulate(config, trace)
    assert result.instances[0].num_drains > 10
    assert_same(result, simulate(stepwise(config), trace))


def test_jumping_is_exact_where_queued_requests_move_between_instances() -> None:
    config, trace = crowded(policy="dlora", num_instances=3, max_num_seqs=4)
    moved = Simulator(config, trace)
    moves = []
    sent = moved.dispatchers[0].sent
    moved.dispatchers[0].sent = lambda *args: moves.append(args) or sent(*args)  # type: ignore[method-assign, func-returns-value]
    assert_same(moved.run(), simulate(stepwise(config), trace))
    assert moves


def test_jumping_is_exact_where_adapters_are_read_from_disk() -> None:
    config, trace = crowded(mode="on_demand", host_store_bytes=4 * 10**8, device_pool_bytes=3 * 10**8)
    config = replace(config, perf_model=replace(PUBLISHED, disk_gbps=0.5))
    assert_same(simulate(config, trace), simulate(stepwise(config), trace))


def test_a_long_decode_is_one_event() -> None:
    simulator = Simulator(make_config(report_interval_s=1e6), make_trace([0.0], response=900))
    num_ends = 0
    end = simulator.instances[0].end

    def count() -> Any:
        nonlocal num_ends
        num_ends += 1
        return end()

    simulator.instances[0].end = count  # type: ignore[method-assign]
    simulator.run()
    assert num_ends == 2  # the prefill, and 899 decode steps at once


# --- every run ---


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_policy_and_mode_serves_all_that_arrive(policy: str, mode: str) -> None:
    trace = Workload(rate=30.0, duration_s=4.0, num_adapters=200).make_trace(0)
    config = make_config(
        PUBLISHED, policy=policy, mode=mode, num_instances=4, slo_tpt_ms=50.0, max_model_len=4200,
        cpu_gflops=1000.0, device_pool_bytes=10**9,
    )  # fmt: skip
    summary = summarize_run(simulate(config, trace))
    assert (summary.num_arrived, summary.num_ended) == (len(trace), len(trace))
    assert sum(map(sum, summary.rank_mix)) == len(trace)


def test_a_run_that_is_stopped_knows_who_is_still_there() -> None:
    trace = Workload(rate=50.0, duration_s=20.0).make_trace(0)
    result = simulate(make_config(PUBLISHED, max_model_len=4200), trace, until_s=10.0)
    num_ended = int(result.has_ended.sum())
    assert 0 < num_ended < len(result.arrived_at) < len(trace)
    assert num_ended + result.num_present == len(result.arrived_at)
    assert result.wall_s <= 10.0


@pytest.mark.parametrize("policy", ["random", "rank_aware", "dlora"])
def test_the_same_seed_gives_the_same_result_to_the_bit(policy: str) -> None:
    trace = Workload(rate=40.0, duration_s=5.0).make_trace(1)
    config = make_config(
        PUBLISHED, policy=policy, mode="pipelined", num_instances=5, seed=3, max_model_len=4200
    )
    assert_same(simulate(config, trace), simulate(config, trace))


def test_another_seed_of_a_policy_that_draws_gives_another_result() -> None:
    trace = Workload(rate=40.0, duration_s=5.0).make_trace(1)
    configs = [
        make_config(PUBLISHED, policy="random", num_instances=5, seed=s, max_model_len=4200) for s in (0, 1)
    ]
    first, second = (simulate(config, trace).rows.tolist() for config in configs)
    assert first != second


def test_a_lost_request_is_noticed() -> None:
    result = simulate(make_config(), make_trace([0.0, 0.1]))
    with pytest.raises(AssertionError, match="a request is lost"):
        replace(result, ended_at=np.array([result.ended_at[0], NEVER])).check()


def test_a_token_before_its_prefill_is_noticed() -> None:
    result = simulate(make_config(), make_trace([0.0]))
    with pytest.raises(AssertionError, match="before its prefill"):
        replace(result, first_token_at=result.arrived_at).check()


def test_time_that_does_not_exist_is_noticed() -> None:
    result = simulate(make_config(), make_trace([0.0]))
    with pytest.raises(AssertionError, match="busy for longer than time passed"):
        replace(result, wall_s=0.001).check()


def test_an_empty_trace_gives_an_empty_result() -> None:
    trace = make_trace([0.0]).between(0.5, 1.0)
    summary = summarize_run(simulate(make_config(), trace))
    assert (summary.num_arrived, np.isnan(summary.slo_attainment)) == (0, True)


def test_the_fleet_knows_what_a_server_holds_after_its_report() -> None:
    config = make_config(mode="pipelined", device_pool_bytes=200, bytes_per_rank=10, report_interval_s=0.3)
    trace = make_trace([0.0, 0.1, 0.2, 0.5], adapters=[0, 1, 2, 0], ranks=(8, 8, 8))
    simulator = Simulator(config, trace)
    simulator.run()
    resident = {f"adapter-{a}" for a in range(3) if simulator.instances[0].placement.holds(a)}
    assert len(resident) == 2
    assert simulator.dispatchers[0].fleet.on_device[0] == resident


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"policy": "fastest"}, "policy is 'fastest'; choose one of rank_aware"),
        ({"mode": "lazy"}, "mode is 'lazy'; choose one of cached"),
        ({"num_instances": 0}, "num_instances is 0; it must be at least 1"),
        ({"mode": "cpu_assisted"}, "cpu_gflops is 0; say what the CPU computes"),
        ({"max_model_len": 9000}, "max_model_len is 9000; kv_cache_tokens 8192 hold less"),
        ({"max_num_batched_tokens": 100}, "max_num_batched_tokens is 100; it must be at least max_num_seqs"),
        ({"report_interval_s": 0.0}, "report_interval_s is 0.0; it must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(**settings)
