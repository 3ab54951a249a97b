"""What the plan chooses, against the published figures and against its own predictions."""

from dataclasses import asdict, replace

import pytest

from toppings.adapters.layout import AdapterLayout, BaseShapes, b_first, by_layer
from toppings.assist.cost import CostProfile, CpuCost
from toppings.assist.plan import (
    MIN_GAIN,
    Choice,
    compare,
    group_order,
    make_plan,
    predict,
)
from toppings.assist.pricing import LayerCosts, price_layers

LLAMA_7B = BaseShapes(32, (((4096, 4096),) * 4) + (((4096, 11008),) * 2) + ((11008, 4096),))
LAYER_BYTES_7B = 2 * sum(num_in * num_out for num_in, num_out in LLAMA_7B.sizes)
QKV, ALL = (1, 1, 1, 0, 0, 0, 0), (1,) * 7

# One AMX core, h 4096: 90 to 600 GFLOP/s at ranks 8 to 256, so ms = 0.17 per 10^6 values + 1.33 per GFLOP.
AMX_CORE = CpuCost(fixed_ms=0.005, per_gflop_ms=1.33, per_mweights_ms=0.0, per_mvalues_ms=0.17)


def gpu_profile(*, link_gbps: float, hbm_gbps: float, tflops: float, num_workers: int = 16) -> CostProfile:
    """A layer takes the longer of reading its weights at 85 % of the bandwidth and its arithmetic."""
    floor_ms = LAYER_BYTES_7B / (0.85 * hbm_gbps) * 1e-6
    tokens = (1, 32, 64, 128, 256, 512, 1024, 2048)
    return CostProfile(
        origin="data sheet",
        link_gbps=link_gbps,
        copy_ms=0.005,
        cpu=AMX_CORE,
        layer_ms=tuple((t, max(floor_ms, t * LAYER_BYTES_7B / tflops * 1e-9)) for t in tokens),
        gemm_share=0.8,
        round_trip_ms=0.03,
        session_ms=0.1,
        num_workers=num_workers,
        result_gbps=link_gbps,
    )


A100 = gpu_profile(link_gbps=24, hbm_gbps=1555, tflops=200)
H100 = gpu_profile(link_gbps=50, hbm_gbps=3350, tflops=600)
H200 = gpu_profile(link_gbps=50, hbm_gbps=4800, tflops=600)


def layout(rank: int, targets: tuple[int, ...]) -> AdapterLayout:
    return AdapterLayout.build([[rank * t for t in targets]] * 32, LLAMA_7B, "bfloat16")


def overheads(profile: CostProfile, rank: int, targets: tuple[int, ...], num_tokens: int) -> dict[str, float]:
    return compare(profile, layout(rank, targets), num_tokens).overheads_ms()


@pytest.mark.parametrize(
    ("profile", "rank", "targets", "pipelined_ms", "cpu_ms"),
    [
        (A100, 256, QKV, 6.3, 1.6),
        (A100, 128, ALL, 16.0, 5.6),
        (H200, 128, ALL, 8.9, 4.7),
        (H200, 256, ALL, 21.7, 9.1),
    ],
)
def test_overheads_at_64_tokens_are_near_the_published_model(
    profile: CostProfile, rank: int, targets: tuple[int, ...], pipelined_ms: float, cpu_ms: float
) -> None:
    # Published with rows split over sixteen cores to the last token: one core of their joint speed.
    joint = replace(AMX_CORE, **{name: value / 16 for name, value in asdict(AMX_CORE).items()})
    got = overheads(replace(profile, cpu=joint, num_workers=1), rank, targets, 64)
    assert got["pipelined"] == pytest.approx(pipelined_ms, rel=0.25)
    assert got["cpu_assisted"] == pytest.approx(cpu_ms, rel=0.35)
    assert got["auto"] <= got["cpu_assisted"] < got["pipelined"] < got["on_demand"]


@pytest.mark.parametrize("profile", [A100, H200])
@pytest.mark.parametrize(("rank", "targets"), [(256, QKV), (128, ALL), (256, ALL)])
@pytest.mark.parametrize("num_tokens", [64, 128])
def test_the_cpu_pays_at_high_ranks_and_short_prompts(
    profile: CostProfile, rank: int, targets: tuple[int, ...], num_tokens: int
) -> None:
    got = overheads(profile, rank, targets, num_tokens)
    assert got["auto"] < 0.75 * got["pipelined"]
    assert got["cpu_assisted"] < got["pipelined"]


def test_the_shrink_alone_beats_the_whole_product_at_128_tokens() -> None:
    got = overheads(A100, 128, ALL, 128)
    assert got["cpu_shrink"] < got["cpu_assisted"] < got["pipelined"]


def test_at_512_tokens_only_the_shrink_gains() -> None:
    got = overheads(A100, 256, ALL, 512)
    assert got["cpu_shrink"] < got["pipelined"] < got["cpu_assisted"]


@pytest.mark.parametrize(
    ("profile", "targets", "threshold"),
    [(A100, QKV, 150), (A100, ALL, 47), (H100, QKV, 145), (H100, ALL, 46), (H200, QKV, 101), (H200, ALL, 32)],
)
def test_a_layer_loads_in_its_own_compute_time_at_the_published_rank(
    profile: CostProfile, targets: tuple[int, ...], threshold: int
) -> None:
    loads_slower = [
        costs.load_ms - profile.copy_ms > costs.device_ms
        for rank in (int(0.97 * threshold), int(1.04 * threshold) + 1)
        for costs in price_layers(profile, layout(rank, targets), 16)[:1]
    ]
    assert loads_slower == [False, True]


@pytest.mark.parametrize("profile", [A100, H100, H200])
@pytest.mark.parametrize(
    ("rank", "targets", "num_tokens"),
    [
        (8, QKV, 16),
        (32, QKV, 64),
        (64, QKV, 64),
        (64, QKV, 512),
        (16, ALL, 128),
        (64, ALL, 512),
        (256, QKV, 1024),
    ],
)
def test_the_cpu_is_left_out_where_layers_load_faster_than_they_compute(
    profile: CostProfile, rank: int, targets: tuple[int, ...], num_tokens: int
) -> None:
    plan = make_plan(profile, layout(rank, targets), num_tokens)
    assert not plan.uses_cpu
    assert plan.order == by_layer(range(32))


@pytest.mark.parametrize("profile", [A100, H200])
@pytest.mark.parametrize("targets", [QKV, ALL])
@pytest.mark.parametrize("rank", [1, 8, 32, 64, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 64, 200, 1024])
def test_auto_is_never_predicted_slower_than_a_fixed_mode(
    profile: CostProfile, targets: tuple[int, ...], rank: int, num_tokens: int
) -> None:
    result = compare(profile, layout(rank, targets), num_tokens)
    fixed = [
        result.on_demand_ms,
        *(p.ttft_ms for p in (result.pipelined, result.cpu_assisted, result.cpu_shrink)),
    ]
    assert result.cached_ms < result.plan.ttft_ms <= min(fixed) / (1 - MIN_GAIN)


def test_on_demand_takes_the_whole_load_longer_than_cached() -> None:
    adapter = layout(64, QKV)
    load_ms = adapter.num_bytes / 24e6 + 32 * A100.copy_ms
    assert overheads(A100, 64, QKV, 64)["on_demand"] == pytest.approx(load_ms)


def test_pipelined_follows_the_published_formula() -> None:
    costs = price_layers(A100, layout(256, ALL), 64)[0]
    result = compare(A100, layout(256, ALL), 64)
    expected = 32 * costs.load_ms - 31 * costs.device_ms
    assert result.overheads_ms()["pipelined"] == pytest.approx(expected)


def test_without_workers_every_mode_is_pipelined() -> None:
    profile = gpu_profile(link_gbps=24, hbm_gbps=1555, tflops=200, num_workers=0)
    result = compare(profile, layout(256, ALL), 64)
    assert result.cpu_assisted == result.cpu_shrink == result.plan == result.pipelined


def test_shared_cores_make_the_cpu_less_attractive() -> None:
    plans = [make_plan(replace(A100, sharing_slowdown=x), layout(128, ALL), 64) for x in (1.0, 1.5, 3.0, 9.0)]
    times = [plan.ttft_ms for plan in plans]
    assert times == sorted(set(times))
    assert times[-1] < compare(A100, layout(128, ALL), 64).pipelined.ttft_ms


def test_the_cpu_is_left_out_where_the_host_is_slow_to_queue_its_pieces() -> None:
    """512 pieces of 80 us each take longer than the load of rank 64 that they would hide."""
    host_bound = replace(H100, queue_layer_ms=0.1, queue_piece_ms=0.08)
    adapter = layout(64, ALL)
    assert make_plan(H100, adapter, 64).uses_cpu
    assert not make_plan(host_bound, adapter, 64).uses_cpu
    costs = price_layers(host_bound, adapter, 64)[0]
    assert costs.cpu_ms == pytest.approx(0.1 + 4 * costs.num_workers * 0.08)
    assert costs.device_ms == price_layers(H100, adapter, 64)[0].device_ms


def test_a_host_that_queues_faster_than_the_device_works_costs_nothing() -> None:
    quick, adapter = replace(A100, queue_layer_ms=0.01, queue_piece_ms=0.001), layout(256, ALL)
    assert price_layers(quick, adapter, 512) == price_layers(A100, adapter, 512)


def test_more_workers_make_no_layer_slower() -> None:
    times = [
        price_layers(replace(A100, num_workers=n), layout(256, ALL), 128)[0].cpu_ms for n in (1, 2, 4, 8, 16)
    ]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[2]


def test_no_more_workers_are_asked_for_than_hide_the_work() -> None:
    slow_device = replace(A100, layer_ms=((1, 10.0), (512, 10.0)), result_gbps=0.0)
    few, many = (price_layers(slow_device, layout(rank, QKV), 512)[0].num_workers for rank in (8, 256))
    assert 1 <= few < many < 16


@pytest.mark.parametrize(
    "order", [by_layer(range(5)), b_first(5), group_order(5, 2, 2), group_order(5, 0, 5)]
)
def test_every_half_of_every_layer_travels_once(order: tuple[tuple[int, str], ...]) -> None:
    halves = [(layer, half) for layer, both in order for half in both]
    assert sorted(halves) == [(layer, half) for layer in range(5) for half in "AB"]


def test_layers_that_nobody_waits_for_travel_last() -> None:
    order = group_order(6, num_cpu=2, num_shrink=2)
    assert order == (
        *((2, "B"), (3, "B")),
        *((4, "AB"), (5, "AB")),
        *((2, "A"), (3, "A")),
        *((0, "AB"), (1, "AB")),
    )


def test_a_layer_that_has_landed_is_predicted_on_the_device_whatever_was_chosen() -> None:
    costs = LayerCosts(1.0, 0.1, 0.1, 50.0, 50.0, 0.0, 0.0, 1)
    plan = predict(A100, [costs] * 4, [Choice.DEVICE] + [Choice.CPU] * 3, by_layer(range(4)))
    assert plan.ttft_ms == pytest.approx(0.2 + 4 * 1.0)


def test_results_that_come_back_delay_what_has_yet_to_land() -> None:
    def ttft_ms(return_ms: float) -> float:
        costs = LayerCosts(1.0, 1.0, 1.0, 1.0, 1.0, return_ms, 0.0, 1)
        choices = [Choice.CPU, Choice.DEVICE, Choice.DEVICE]
        return predict(A100, [costs] * 3, choices, group_order(3, 1, 0)).ttft_ms

    assert ttft_ms(0.5) == pytest.approx(ttft_ms(0.0) + 0.5)


def test_a_prefill_has_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        compare(A100, layout(8, QKV), 0)


def test_base_products_that_hide_a_round_trip_are_those_of_attention_where_there_are_experts() -> None:
    """Experts' products take no part in a projection group's round trip, and in the measured share."""
    profile = gpu_profile(link_gbps=24, hbm_gbps=1400, tflops=200)
    qkv = layout(64, QKV)
    dense, mixture = (
        price_layers(each, qkv, 64)[0] for each in (profile, replace(profile, has_experts=True))
    )
    attention = sum(num_in * num_out for num_in, num_out in qkv.shapes.sizes[:4])
    everything = sum(num_in * num_out for num_in, num_out in qkv.shapes.sizes)
    slow = replace(profile, has_experts=True, gemm_share=profile.gemm_share * attention / everything)
    assert mixture.cpu_ms <= dense.cpu_ms
    assert price_layers(slow, qkv, 64)[0].cpu_ms == pytest.approx(dense.cpu_ms)


def test_a_plan_tells_its_layers() -> None:
    costs = LayerCosts(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1)
    plan = predict(A100, [costs] * 3, [Choice.CPU, Choice.CPU, Choice.DEVICE], by_layer(range(3)))
    assert plan.describe() == "layers 0-1 CPU, 2-2 DEVICE"


def test_layers_that_the_device_waits_for_in_any_case_gain_nothing_from_the_cpu() -> None:
    """Experts are the device's, and travel with their layer."""
    plain = layout(128, ALL)
    assert compare(A100, plain, 64).plan.uses_cpu
    extras = [(("experts.down_proj.A", (8, 4, 64)), ("experts.down_proj.B", (8, 4, 32)))] * 32
    ranks = [layer.ranks for layer in plain.layers]
    experts = AdapterLayout.build(ranks, LLAMA_7B, "bfloat16", extras)
    assert experts.layer_bytes(0) - plain.layer_bytes(0) == 2 * 8 * 4 * (64 + 32)
    compared = compare(A100, experts, 64)
    assert not compared.plan.uses_cpu
    assert compared.cpu_assisted.ttft_ms >= compared.pipelined.ttft_ms
