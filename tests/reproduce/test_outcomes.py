"""What each verb makes of its numbers: claims beside the published values, figures, data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fitting import Observation, fit_perf_model
from toppings.cluster.perf_model import load_perf_model
from toppings.config import Config
from toppings.lab.batches.steps import BatchProfile
from toppings.lab.modes.comparison import ModeResult, ModesComparison, ModesSpec, Survey
from toppings.lab.modes.report import LoggedStep, StepReport, summarize_steps
from toppings.lab.outcome import Outcome as Answer
from toppings.lab.reproduce import fleet_runs
from toppings.lab.reproduce.cpu import write_cpu, write_ipc
from toppings.lab.reproduce.fleet_runs import FleetSpec, RunRecord, load_that_breaks, run_fleet
from toppings.lab.reproduce.models import write_models
from toppings.lab.reproduce.modes import write_modes, write_steps
from toppings.lab.reproduce.popularity import top_tenth, write_popularity
from toppings.lab.summary import summarize
from toppings.lab.workload import LoadShape
from toppings.sim.runs import run_jobs

TINY = FleetSpec(num_instances=2, rates=(8.0,), policies=("random",), duration_s=2.0, seeds=1, num_adapters=9)


def read(out: Path, name: str) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """The JSON of an outcome, whose figures are there too; its claims as quantity: (published, ours)."""
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    content = json.loads((out / f"{name}.json").read_text())
    assert content["reproduces"].startswith("Toppings, USENIX ATC 2025, Fig.")
    assert content["differs"]
    assert content["machine"]["num_cores"] >= 1
    return content, {claim["quantity"]: (claim["published"], claim["ours"]) for claim in content["claims"]}


# --- simulated fleets ---


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return run_fleet(TINY)[0]


def at_loads(record: RunRecord, *points: tuple[float, float]) -> list[RunRecord]:
    return [
        replace(record, rate=rate, summary=replace(record.summary, slo_attainment=share))
        for rate, share in points
    ]


def test_the_load_that_breaks_the_objective_lies_between_the_rates_around_it(record: RunRecord) -> None:
    records = at_loads(record, (300.0, 0.97), (100.0, 1.0), (200.0, 0.995))
    load, falls = load_that_breaks(records, 0.99)
    assert load == pytest.approx(220.0)
    assert falls


def test_a_load_that_breaks_nothing_is_told_from_one_that_was_broken_from_the_start(
    record: RunRecord,
) -> None:
    assert load_that_breaks(at_loads(record, (100.0, 1.0), (200.0, 0.99)), 0.99) == (200.0, False)
    assert load_that_breaks(at_loads(record, (100.0, 0.9), (200.0, 1.0)), 0.99) == (100.0, True)


def test_kept_runs_are_taken_and_only_missing_ones_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_run = 0

    def count(jobs: Any, **options: Any) -> Any:
        nonlocal num_run
        num_run += len(jobs)
        return run_jobs(jobs, **options)

    monkeypatch.setattr(fleet_runs, "run_jobs", count)
    first = run_fleet(TINY, kept=tmp_path / "runs.jsonl")
    again = run_fleet(replace(TINY, seeds=2), kept=tmp_path / "runs.jsonl")
    assert num_run == 4  # a seed for each of two forms, then the other seed
    assert [r for r in again if r.seed == 0] == first
    run_fleet(replace(TINY, duration_s=3.0), kept=tmp_path / "runs.jsonl")
    assert num_run == 6  # another setting takes nothing from them


def test_a_prefill_interrupts_for_the_published_model_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(load_perf_model("published").to_json())
    specs = [TINY, replace(TINY, perf_model=str(own)), replace(TINY, prefill_interrupts=False)]
    assert [spec.model("bgmv").prefill_interrupts for spec in specs] == [True, False, False]


def test_without_seeds_or_rates_nothing_is_run() -> None:
    with pytest.raises(ValueError, match="seeds is 0; it must be at least 1"):
        replace(TINY, seeds=0)
    with pytest.raises(ValueError, match="there are no rates"):
        replace(TINY, rates=())


# --- popularity ---


def test_the_published_curve_gives_the_top_tenth_what_the_traces_gave_it(tmp_path: Path) -> None:
    write_popularity([], tmp_path)
    _, claims = read(tmp_path, "popularity")
    for num in (128, 256, 512):
        there, ours = claims[f"top 10 % of adapters, {num} adapters"]
        assert there == "70% … 73%"
        assert 69.0 < float(ours.rstrip("%")) < 74.0


def test_the_top_tenth_counts_an_adapter_in_part() -> None:
    assert top_tenth(np.full(15, 1 / 15)) == pytest.approx(0.1)
    assert top_tenth(np.array([0.6, 0.2, 0.1, 0.1])) == pytest.approx(0.24)


# --- measured ---


def answers(ttft_ms: float, tpt_ms: float) -> list[Answer]:
    return [Answer("a", 0.1 * i, 4 * tpt_ms, ttft_ms, num_tokens=4) for i in range(3)]


def make_comparison() -> ModesComparison:
    latencies = {"cached": (10.0, 5.0), "on_demand": (20.0, 8.0), "cpu_assisted": (11.0, 5.5)}
    results = []
    for mode, (ttft_ms, tpt_ms) in latencies.items():
        outcomes = {kind: answers(ttft_ms, tpt_ms) for kind in ("sequential", "poisson")}
        loads = {kind: summarize(each) for kind, each in outcomes.items()}
        results.append(ModeResult(mode, {"mode": mode}, loads, outcomes))
    spec = ModesSpec(base=Config(), modes=tuple(latencies), load=LoadShape(num_requests=3), load_ratio=1.5)
    return ModesComparison(spec, Survey({"a": 100}, 100, 10.0, 20.0), 0.5, 3.0, results)


def test_modes_stand_beside_the_published_ratios_and_say_that_the_link_is_emulated(tmp_path: Path) -> None:
    write_modes(make_comparison(), tmp_path)
    content, claims = read(tmp_path, "modes")
    assert claims["on_demand, TTFT / TPT / E2E over cached"] == ("1.82 / 1.80 / 1.81", "2.00 / 1.60 / 1.60")
    assert claims["cpu_assisted, TTFT / TPT / E2E over cached"] == (
        "1.06 / 1.06 / 1.07",
        "1.10 / 1.10 / 1.10",
    )
    assert any("emulated link, 0.5 GB/s" in each for each in content["differs"])
    assert "requests" not in content["data"]["modes"]["cached"]["poisson"]


@pytest.mark.parametrize(
    ("cpu_ms", "verdict"), [(12.0, "holds"), (30.0, "does not hold")], ids=["holds", "does_not"]
)
def test_steps_say_whether_the_published_order_holds(tmp_path: Path, cpu_ms: float, verdict: str) -> None:
    prefill_ms = {"cached": 10.0, "on_demand": 20.0, "cpu_assisted": cpu_ms}
    modes = [
        summarize_steps(
            mode,
            [LoggedStep("prefill", ms, 0.0, 0.0, 0.0, 4.0), LoggedStep("decode", 2.0, 0.0, 0.0, 0.0, 4.0)],
        )
        for mode, ms in prefill_ms.items()
    ]
    write_steps(StepReport(modes, [1.5]), tmp_path)
    _, claims = read(tmp_path, "steps")
    assert claims["mean prefill, ms"] == (
        "cached < cpu_assisted < on_demand",
        f"10.00 / {cpu_ms:.2f} / 20.00: {verdict}",
    )
    assert (
        claims["cached, mean ms of prefill / decode / load / overlapped load"][1]
        == "10.00 / 2.00 / 0.00 / 0.00"
    )


def test_ipc_tells_how_times_grow_with_the_receivers(tmp_path: Path) -> None:
    rows = {"shared memory": 200.0, "UNIX socket": 300.0}
    times = {
        "64 rows, 1 receivers": rows,
        "64 rows, 5 receivers": {"shared memory": 250.0, "UNIX socket": 900.0},
    }
    write_ipc(times, {"64": 10.0}, tmp_path)
    _, claims = read(tmp_path, "ipc")
    assert claims["64 rows, 5 receivers, shared memory"] == (
        "under 1 ms, nearly constant",
        "0.25 ms, 1.2x that with 1",
    )
    assert claims["64 rows, 5 receivers, UNIX socket"][1] == "0.90 ms, 3.0x that with 1"


def test_cpu_compares_with_all_cores_only(tmp_path: Path) -> None:
    row = {"workers_ms": 2.0, "torch_ms": 3.0, "workers_gflops": 1.0}
    times = {f"256 tokens, {cores} cores": row for cores in (1, 2)}
    measured = {"num_cores": 2, "rank": 64, "dtype": "bfloat16", "hidden": 64, "times": times}
    write_cpu(measured, tmp_path)
    _, claims = read(tmp_path, "cpu")
    assert claims == {
        "one process per core over torch's threads, 256 tokens, 2 cores": (
            "1.4x with 16 cores",
            "1.50x (2.00 ms)",
        )
    }


def test_models_stand_beside_the_published_fit_and_can_be_used(tmp_path: Path) -> None:
    batches = [
        tuple(BatchRow(rank, f"a{i}", 1, 10 * i) for i in range(num))
        for num in range(1, 9)
        for rank in (8, 64)
    ]
    decode = [Observation(rows, 30.0 + 0.01 * sum(row.rank for row in rows)) for rows in batches]
    prompts = [(BatchRow(rank, "a", tokens),) for tokens in range(16, 160, 16) for rank in (8, 64)]
    prefill = [Observation(rows, 20.0 + 0.1 * rows[0].num_tokens) for rows in prompts]
    model = fit_perf_model(decode, prefill, origin="made up")
    write_models(BatchProfile(model, decode, prefill, 0), tmp_path)
    _, claims = read(tmp_path, "models")
    there, ours = claims["R² of decode, mbgmv"]
    assert (there, ours.split(",")[0]) == ("0.96 (on the fitted steps)", "1.000")
    assert load_perf_model(str(tmp_path / "perf-model.json")).origin == "made up"


def test_the_table_holds_the_claims_of_all_verbs_that_wrote_there(tmp_path: Path) -> None:
    write_popularity([], tmp_path)
    write_modes(make_comparison(), tmp_path)
    table = (tmp_path / "comparison.md").read_text().splitlines()
    assert table[0] == "| figure | quantity | published | here |"
    assert {line.split(" | ")[0] for line in table[2:]} == {"| Fig. 12, left", "| Fig. 13, 14"}
