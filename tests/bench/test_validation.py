"""Parts of a validation by themselves, and all of it on a tiny model: what it does, not how near it is."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.sim.builders import EXTENDED, make_config
from toppings.cluster.batch_row import BatchRow
from toppings.lab.batches.plan import Rows
from toppings.lab.outcome import Outcome
from toppings.lab.players.engine import PlayedStep, WallClock
from toppings.lab.simulation.cli import app
from toppings.lab.validation import calibration
from toppings.lab.validation.calibration import Batches, StepBench, Timed, drift, fit, simulated_batches
from toppings.lab.validation.command import run_validation
from toppings.lab.validation.comparison import AIMS, LoadResult, Replay, measures, misses
from toppings.lab.validation.loads import LOADS
from toppings.lab.validation.report import verdict
from toppings.lab.validation.validate import ValidationSpec
from toppings.sim.trace import Trace

RANKS = np.array([8, 16, 32, 64], dtype=np.int32)


def make_load_trace(index: int = 0, num: int = 30, seed: int = 0) -> Trace:
    return LOADS[index].make_trace(num, 5.0, RANKS, seed)


# --- loads ---


@pytest.mark.parametrize("index", range(len(LOADS)))
def test_a_load_has_exactly_the_requests_and_the_rate_that_were_asked_for(index: int) -> None:
    trace, same, other = (make_load_trace(index, seed=seed) for seed in (0, 0, 1))
    assert len(trace) == 30
    assert trace.rate == pytest.approx(5.0)
    assert np.array_equal(trace.arrivals_s, same.arrivals_s)
    assert not np.array_equal(trace.arrivals_s, other.arrivals_s)
    assert trace.prompt_tokens.max() + trace.response_tokens.max() < 512


def test_a_load_saturates_at_what_the_simulated_server_serves() -> None:
    config = make_config(EXTENDED, max_num_seqs=4)
    slow, fast = (
        LOADS[0].saturation_rate(30, replace(config, max_num_seqs=num), RANKS, 0) for num in (1, 16)
    )
    assert 0 < slow < fast


# --- calibration ---


def test_the_batches_of_a_simulated_load_hold_every_token_of_its_requests() -> None:
    trace = make_load_trace(1)
    batches = simulated_batches(make_config(EXTENDED, max_num_batched_tokens=64, max_num_seqs=16), trace)
    num_tokens = sum(row.num_tokens for kind in (batches.decode, batches.prefill) for b in kind for row in b)
    assert num_tokens == trace.prompt_tokens.sum() + trace.response_tokens.sum() - len(trace)
    assert all(row.num_tokens == 1 and row.num_context for batch in batches.decode for row in batch)


def timed_by(model: Any, batches: Batches, slowness: float = 1.0) -> list[Timed]:
    decode = [Timed(True, rows, slowness * model.decode.predict_batch(rows)) for rows in batches.decode]
    prefill = [Timed(False, rows, slowness * model.prefill.predict_batch(rows)) for rows in batches.prefill]
    return decode + prefill


@pytest.fixture(scope="module")
def batches() -> Batches:
    return simulated_batches(make_config(EXTENDED, max_num_seqs=16), make_load_trace(1))


def test_a_fit_finds_the_model_that_times_came_from(batches: Batches) -> None:
    model = fit(timed_by(EXTENDED, batches), "a test")
    for step in timed_by(EXTENDED, batches):
        form = model.decode if step.is_decode else model.prefill
        assert form.predict_batch(step.rows) == pytest.approx(step.ms, rel=1e-6)


def test_a_machine_that_becomes_slower_is_seen(batches: Batches) -> None:
    steps = timed_by(EXTENDED, batches) + timed_by(EXTENDED, batches, 1.2)
    assert drift(steps, EXTENDED) == pytest.approx(0.2)


class FakeDriver:
    """Each step takes 10 ms of a clock of its own; a decode batch is admitted in a step that is not timed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timed: list[Any] = []

    def decode_ms(self, rows: Any) -> list[float]:
        self.now += 0.03
        self.timed.append(rows)
        return [10.0, 30.0]

    def prefill_ms(self, rows: Any) -> list[float]:
        self.now += 0.01
        self.timed.append(rows)
        return [10.0]


def make_bench(monkeypatch: pytest.MonkeyPatch) -> tuple[StepBench, Any, list[Any]]:
    driver: Any = FakeDriver()
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: driver.now))
    own: list[Rows] = [(BatchRow(8, "a", 1, context),) for context in (10, 20)]
    prompts: list[Rows] = [(BatchRow(8, "a", tokens),) for tokens in (10, 20, 30)]
    return StepBench(driver, Batches(own, prompts), np.random.default_rng(0)), driver, own + prompts


def test_every_batch_is_timed_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, driver, rows = make_bench(monkeypatch)
    timed = bench.time_all()
    assert sorted(map(str, driver.timed)) == sorted(map(str, rows))
    assert {step.ms for step in timed if step.is_decode} == {20.0}
    bench.time_all()
    assert sorted(map(str, driver.timed)) == sorted(map(str, rows * 2))


def test_batches_get_their_share_of_a_loads_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, driver, _ = make_bench(monkeypatch)
    for _ in range(1000):
        bench.time_beside(5.0)
    assert driver.now == pytest.approx(5.0 * calibration.CALIBRATION_SHARE, rel=0.02)


@pytest.mark.parametrize(
    ("latency_ms", "gbps", "sizes"),
    [(2.0, 0.1, (1e6, 2e6, 4e6)), (0.0, 0.5, (3e6, 3e6)), (0.0, 2.0, (1e6, 5e6))],
)
def test_a_links_speed_and_latency_are_found(
    latency_ms: float, gbps: float, sizes: tuple[float, ...]
) -> None:
    points = np.array([(size, latency_ms + size / gbps / 1e6) for size in sizes])
    link = calibration.fit_link(points)
    assert link.latency_ms == pytest.approx(latency_ms, abs=1e-6)
    assert link.gbps == pytest.approx(gbps)


# --- comparison ---


def make_outcomes(slowness: float = 1.0, num: int = 10) -> list[Outcome]:
    return [Outcome("a", float(i), 500.0 * slowness, 100.0 * slowness, 5) for i in range(num)]


def make_result(*pairs: tuple[float, float]) -> LoadResult:
    """A replay for each (slowness of the engine, slowness of the simulator)."""
    step = PlayedStep((BatchRow(8, "a", 1, 10),), (), ms=10.0, is_cold=False)
    replays = [Replay(make_outcomes(e), make_outcomes(s), [step], EXTENDED, 0.0) for e, s in pairs]
    return LoadResult(LOADS[0], 5.0, 0.0, make_config(EXTENDED), make_load_trace(), replays)


def test_measures_are_the_latencies_and_the_throughput() -> None:
    measured = measures(make_outcomes())
    assert measured["tokens/s"] == pytest.approx(50 / 9.5)
    assert [measured[f"{name} mean"] for name in ("TTFT", "TPT", "E2E")] == pytest.approx([100, 100, 500])
    assert measured["TTFT p99"] == pytest.approx(100)


def test_an_error_is_the_median_of_the_replays_errors() -> None:
    result = make_result((1.0, 1.02), (1.2, 1.2), (1.0, 1.5))
    row = {c.measure: c for c in result.comparisons()}["TTFT mean"]
    assert row.error == pytest.approx(0.02)
    assert row.engine == pytest.approx(100.0)
    assert row.spread == pytest.approx(0.2)
    assert row.is_within


def test_what_is_beyond_its_aim_is_named() -> None:
    result = make_result((1.0, 1.15))
    assert {c.measure for _, c in misses([result])} == {"TTFT mean", "TPT mean"}
    assert verdict([result]).splitlines() == [
        f"{len(AIMS) - 2} of {len(AIMS)} errors are within their aims",
        "missed: steady, warm adapters, TTFT mean: +15.0%, aim 10%",
        "missed: steady, warm adapters, TPT mean: +15.0%, aim 10%",
    ]


def test_the_models_error_is_of_the_steps_that_were_run() -> None:
    replay = make_result((1.0, 1.0)).replays[0]
    ms = EXTENDED.decode.predict_batch(replay.steps[0].decode)
    assert replay.step_error == pytest.approx(ms / 10.0 - 1)


def test_a_stopped_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr("toppings.lab.players.engine.time", SimpleNamespace(perf_counter=lambda: now))
    clock = WallClock()
    assert clock.now() == 5.0
    with clock.stopped():
        now = 8.0
    assert clock.now() == 5.0
    now = 9.0
    assert clock.now() == 6.0


# --- all of it ---


def test_a_tiny_model_is_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ValidationSpec(
        preset="tiny", num_adapters=4, num_requests=6, replays=1, num_batches=8, num_threads=1
    )
    run_validation(spec, is_json=False, figures=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "validation.json",
        "validation.pdf",
        "validation.png",
    }
    report = json.loads((tmp_path / "validation.json").read_text())
    assert [load["load"]["name"] for load in report["loads"]] == [load.name for load in LOADS]
    for load in report["loads"]:
        assert load["num_requests"] == 6
        assert all(math.isfinite(row["error"]) for row in load["comparisons"])
        assert all(ms > 0 for times in load["replays"][0]["latencies_ms"].values() for ms in times["TTFT"])
    assert report["loads"][2]["emulated_link_gbps"] > 0
    table = capsys.readouterr().out
    assert "cold adapters" in table
    assert f"of {3 * len(AIMS)} errors are within their aims" in table


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--validate", "--rate", "3"), "--rate does not go with --validate"),
        (("--validate", "--trace", "t.csv"), "--trace does not go with --validate"),
        (("--synth", "poisson-chat", "--replays", "2"), "--replays is of --validate"),
        (("--synth", "poisson-chat", "--model", "m"), "--model is of --validate"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)


def test_a_number_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="replays is 0; it must be at least 1"):
        ValidationSpec(replays=0)
