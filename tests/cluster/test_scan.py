"""The compiled scan against the same decision in array operations, over random fleets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from toppings.cluster.fleet import Fleet
from toppings.cluster.instances import DECODE, PREFILL, Instances
from toppings.cluster.perf_model import DECODE_FORMS, PREFILL_FORMS, LinearModel, PerfModel, load_perf_model
from toppings.cluster.policies.base import PolicySettings, least_row
from toppings.cluster.scan import least_cost
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

NUM_ADAPTERS = 12
DECIMALS = 9
"""Of costs in ms: differences of sums, as the reference takes them, tell equal ones apart by rounding."""
EXTENDED = PerfModel(
    origin="made up, every feature in use",
    decode_forms={"extended": LinearModel(dict.fromkeys(DECODE_FORMS["extended"], 0.01))},
    prefill_forms={"extended": LinearModel(dict.fromkeys(PREFILL_FORMS["extended"], 0.01))},
    decode_form="extended",
    prefill_form="extended",
    link_gbps=24.0,
    disk_gbps=2.0,
)
MODELS = {
    "bgmv": load_perf_model("published:bgmv"),
    "mbgmv": load_perf_model("published:mbgmv"),
    "interrupting": replace(load_perf_model("published:mbgmv"), prefill_interrupts=True),
    "extended": EXTENDED,
}


def reference(
    request: RequestSnapshot, instances: Instances, slo: PolicySettings, *, weighs_residency: bool
) -> tuple[int, bool, float, float] | None:
    """Row, whether the SLO is broken, predicted TPT and TTFT: the policies' formulas, one array operation
    after another.
    """
    before, after = instances.step_ms(), instances.step_ms_with(request)
    added, tpt = after - before, after[DECODE]
    per_token = added[PREFILL] / request.response_tokens + added[DECODE]
    num, has_ttft = instances.num_requests, slo.slo_ttft_ms < np.inf
    ttft = after[PREFILL] + tpt + instances.lacking_kv_share(request) * request.response_tokens * tpt
    excess = np.maximum(num + 1 - instances.max_num_seqs, 0.0) / instances.max_num_seqs
    ttft = ttft + np.nan_to_num(excess) * request.response_tokens * tpt
    if weighs_residency or has_ttft:
        ttft = ttft + instances.load_ms(request)
    has_room, totals = instances.has_room(request), per_token * num
    if weighs_residency:
        load = instances.load_ms(request) / request.response_tokens
        wait = tpt * instances.lacking_kv_share(request)
        totals = (per_token + load) * num + load + wait
        tpt = tpt + load + wait
        has_room = num < instances.max_num_seqs
    if instances.found_tokens.any():
        totals = totals + added[PREFILL] / request.response_tokens
    keeps_slo = (tpt <= slo.slo_tpt_ms) & (ttft <= slo.slo_ttft_ms)
    missed = np.maximum(tpt / slo.slo_tpt_ms, ttft / slo.slo_ttft_ms) if has_ttft else tpt
    for costs in (np.where(has_room & keeps_slo, totals, np.inf), np.where(has_room, missed, np.inf), num):
        row = least_row(np.round(costs, DECIMALS), instances)
        if row is not None:
            return row, not keeps_slo[row], float(tpt[row]), float(ttft[row])
    return None


def random_request(rng: np.random.Generator, name: str) -> RequestSnapshot:
    adapter = int(rng.integers(-1, NUM_ADAPTERS))
    if adapter < 0:
        return RequestSnapshot(name, None, 0, int(rng.integers(1, 300)), 64.0)
    rank = (8, 16, 32, 64)[adapter % 4]
    tokens, response = int(rng.integers(1, 300)), float(rng.integers(1, 300))
    return RequestSnapshot(name, f"a{adapter}", rank, tokens, response, rank << 20)


def random_fleet(rng: np.random.Generator, models: list[PerfModel]) -> Fleet:
    def names() -> frozenset[str]:
        return frozenset(f"a{i}" for i in rng.integers(0, NUM_ADAPTERS, 4))

    def batch(prefix: str, most: int) -> tuple[RequestSnapshot, ...]:
        return tuple(random_request(rng, f"{prefix}{i}") for i in range(int(rng.integers(0, most))))

    limits: list[dict[str, Any]] = [
        {},
        {"max_num_seqs": 6.0},
        {"kv_tokens_total": 1500.0, "kv_tokens_used": float(rng.integers(0, 1500))},
    ]
    return Fleet(
        InstanceSnapshot(
            instance_id=str(i),
            perf_model=models[int(rng.integers(len(models)))],
            running=batch("r", 9),
            waiting=batch("w", 4),
            on_device=names(),
            on_host=names(),
            is_open=bool(rng.random() < 0.9),
            **limits[int(rng.integers(len(limits)))],
        )
        for i in range(int(rng.integers(1, 9)))
    )


@pytest.mark.parametrize("weighs_residency", [False, True])
@pytest.mark.parametrize("form", [*MODELS, "mixed"])
def test_the_scan_decides_as_array_operations_do(form: str, weighs_residency: bool) -> None:
    models = list(MODELS.values()) if form == "mixed" else [MODELS[form]]
    outcomes = set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        fleet, request = random_fleet(rng, models), random_request(rng, "new")
        found = np.floor(request.prompt_tokens * rng.random(len(fleet)) * (rng.random(len(fleet)) < 0.3))
        instances = fleet.finding(found) if seed % 2 else fleet
        slo = PolicySettings(
            slo_tpt_ms=float(rng.choice([1.0, 34.0, 36.0, np.inf])),
            slo_ttft_ms=float(rng.choice([50.0, 150.0, 2000.0, np.inf, np.inf])),
        )
        choice = least_cost(request, instances, slo, weighs_residency=weighs_residency)
        expected = reference(request, instances, slo, weighs_residency=weighs_residency)
        if expected is None or choice is None:
            assert choice is None
            assert expected is None
            continue
        assert (choice.row, choice.instance_id, choice.breaks_slo) == (
            expected[0],
            fleet.ids[expected[0]],
            expected[1],
        )
        assert choice.predicted_tpt_ms == pytest.approx(expected[2], rel=1e-12)
        assert choice.predicted_ttft_ms == pytest.approx(expected[3], rel=1e-9)
        outcomes.add(choice.breaks_slo)
    assert outcomes == {False, True}


def test_a_fleet_that_changes_is_read_as_it_is() -> None:
    """The columns are brought up to date before the compiled code sees them."""
    rng = np.random.default_rng(1)
    fleet = Fleet(InstanceSnapshot(instance_id=name, perf_model=MODELS["bgmv"]) for name in "abc")
    rows = set()
    for i in range(30):
        request = random_request(rng, str(i))
        choice = least_cost(request, fleet, PolicySettings(), weighs_residency=False)
        afresh = Fleet(fleet.instance(name) for name in fleet.ids)
        assert choice == least_cost(request, afresh, PolicySettings(), weighs_residency=False)
        assert choice is not None
        rows.add(choice.row)
        fleet.enqueue(choice.instance_id, request)
        if i % 3:
            fleet.start(choice.instance_id, request.request_id)
    assert rows == {0, 1, 2}


def test_what_is_taken_from_a_fleet_is_scanned_alike() -> None:
    rng = np.random.default_rng(2)
    fleet, request = random_fleet(rng, [EXTENDED]), random_request(rng, "new")
    rows = np.arange(len(fleet))[::-1].copy()
    for weighs_residency in (False, True):
        whole = least_cost(request, fleet, PolicySettings(), weighs_residency=weighs_residency)
        taken = least_cost(request, fleet.take(rows), PolicySettings(), weighs_residency=weighs_residency)
        assert whole is not None
        assert taken is not None
        assert whole.instance_id == taken.instance_id
