"""`toppings profile batches` on a tiny model: what it times, what it writes, what it leaves."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fitting import Observation, fit_linear
from toppings.cluster.measured import is_of_base, perf_model_path
from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DECODE_FORMS,
    PREFILL_FORMS,
    batch_features,
    load_perf_model,
)
from toppings.command import app
from toppings.config import EngineConfig
from toppings.core import Batch
from toppings.engine.base import open_registry
from toppings.engine.model_runner import ModelRunner, StepInFlight
from toppings.lab.batches.driver import NUM_DECODE_STEPS, BatchDriver
from toppings.lab.batches.engine import AdapterEngine, engine_with_adapters
from toppings.lab.batches.plan import Rows, decode_batches, prefill_batches
from toppings.lab.batches.steps import StepTimes
from toppings.synth import PRESETS, AdapterShape, write_model

SETTINGS = {"num_threads": 1, "kv_cache_bytes": 8 * 2**20, "max_num_seqs": 8, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_model(path, PRESETS["tiny"])
    return path


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterEngine]:
    state = str(tmp_path_factory.mktemp("state"))
    config = EngineConfig(model=str(model), state_dir=state, **SETTINGS)  # type: ignore[arg-type]
    with engine_with_adapters(config, AdapterShape(ranks=(4, 8)), lambda *_: None) as own:
        yield own


@pytest.fixture
def driver(own: AdapterEngine) -> Iterator[BatchDriver]:
    yield BatchDriver(own.engine, {record.name: record.adapter_id for record in own.records})
    assert not own.engine.has_requests
    own.engine.check_integrity()


@pytest.fixture
def steps(own: AdapterEngine, monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """What the model really ran, step by step."""
    names = {record.adapter_id: record for record in own.records}
    seen: list[Rows] = []
    start = ModelRunner.start

    def recorded(self: ModelRunner, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        rows = []
        for item in batch.items:
            record = names.get(item.request.adapter_id or 0)
            name, rank = (record.name, record.rank) if record else (None, 0)
            rows.append(BatchRow(rank, name, item.num_tokens, item.request.num_computed_tokens))
        seen.append(tuple(rows))
        return start(self, batch, previous)

    monkeypatch.setattr(ModelRunner, "start", recorded)
    return seen


def test_what_is_timed_is_the_batch_that_was_asked_for(
    own: AdapterEngine, driver: BatchDriver, steps: list[Rows]
) -> None:
    ranks = {record.name: record.rank for record in own.records}
    limits, rng = driver.limits(own.config.max_num_batched_tokens), np.random.default_rng(0)
    for rows in decode_batches(ranks, limits, 20, rng):
        steps.clear()
        assert len(driver.decode_ms(rows)) == NUM_DECODE_STEPS
        asked, ran = batch_features(rows), np.mean([batch_features(r) for r in steps[1:]], axis=0)
        assert len(steps) == 1 + NUM_DECODE_STEPS
        assert ran == pytest.approx(asked, abs=2.0 * len(rows))  # contexts grow by one a step
        assert np.delete(ran, CONTEXT_TOKENS).tolist() == np.delete(asked, CONTEXT_TOKENS).tolist()
    for rows in prefill_batches(ranks, limits, 20, 64, rng):
        steps.clear()
        assert len(driver.prefill_ms(rows)) == 1
        assert [batch_features(r).tolist() for r in steps] == [batch_features(rows).tolist()]


def test_no_timed_step_waits_for_an_adapter(own: AdapterEngine) -> None:
    layers = {status.device_layers for status in own.engine.stats(0).adapters}
    assert layers == {own.registry.shapes.num_layers}
    assert {record.rank for record in own.records} == {4, 8}
    assert own.link_gbps() > 0
    assert own.disk_gbps() > 0


def test_a_sequence_that_does_not_fit_is_told(own: AdapterEngine, driver: BatchDriver) -> None:
    too_long = BatchRow(0, num_tokens=own.engine.info.max_model_len)
    with pytest.raises(RuntimeError, match="the engine refused a sequence of 4096 tokens"):
        driver.prefill_ms((too_long,))


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["profile", "batches", *arguments])


@pytest.fixture(scope="module")
def profiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, EngineConfig]:
    """The command's result, where its files are, and the settings of a server that would read them."""
    work = tmp_path_factory.mktemp("profiled")
    settings = {**SETTINGS, "model": str(model), "state_dir": str(work / "state")}
    options = [text for name, v in settings.items() for text in (f"--{name.replace('_', '-')}", str(v))]
    files = ["--json", str(work / "out.json"), "--figure", str(work / "out.svg")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/bin/toppings", "profile", "batches"])
        result = invoke("--seconds", "0.5", "--ranks", "4,8", *options, *files)
    return result, work, EngineConfig(**settings)  # type: ignore[arg-type]


def test_every_form_is_reported_on_held_out_batches(profiled: tuple[Result, Path, EngineConfig]) -> None:
    result = profiled[0]
    assert result.exit_code == 0, result.output
    for kind, forms in (("decode", set(DECODE_FORMS)), ("prefill", set(PREFILL_FORMS))):
        rows = [line.split() for line in result.output.splitlines() if line.split()[:1] == [kind]]
        assert {row[1] for row in rows} == forms
        assert all(any(cell.endswith("%") for cell in row) for row in rows)
    assert "held-out batches" in result.output


def test_the_json_is_a_model_that_routers_and_the_simulator_load(
    profiled: tuple[Result, Path, EngineConfig],
) -> None:
    _, work, config = profiled
    model = load_perf_model(str(work / "out.json"))
    kept = perf_model_path(config, work / "state")
    assert load_perf_model(str(kept)) == model
    assert load_perf_model(f"{work / 'out.json'}:bgmv").decode_form == "bgmv"
    assert model.link_gbps is not None
    assert model.details["command"] == "toppings profile batches"
    assert "<svg" in (work / "out.svg").read_text()


def test_the_models_coefficients_are_those_of_a_fit_to_the_steps_in_the_json(
    profiled: tuple[Result, Path, EngineConfig],
) -> None:
    _, work, _ = profiled
    content = json.loads((work / "out.json").read_text())
    steps = [step for step in content["steps"]["decode"] if not step["is_held_out"]]
    features = np.array([step["features"] for step in steps])
    refit = fit_linear(features, np.array([step["ms"] for step in steps]), ("steps", "rank_sum"))
    assert content["decode_forms"]["mbgmv"]["coefficients"] == pytest.approx(refit.coefficients, rel=1e-2)


def test_the_users_registry_is_left_alone(profiled: tuple[Result, Path, EngineConfig]) -> None:
    _, work, config = profiled
    kept = perf_model_path(config, work / "state")
    assert list((work / "state").iterdir()) == [kept]
    registry = open_registry(config)
    assert registry.count() == 0
    assert is_of_base(load_perf_model(str(kept)), registry)
    registry.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seconds", "0"), "seconds is 0"),
        (("--ranks", "8,x"), "ranks are '8,x'"),
        (("--targets", "z"), "target 'z' is unknown"),
        (("--figure", "out.xyz"), "figure is out.xyz"),
        (("--max-num-seqs", "many"), "max_num_seqs is 'many'"),
    ],
)
def test_bad_option_is_named_before_anything_is_measured(
    options: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    result = invoke("--model", str(model), "--state-dir", str(tmp_path / "state"), *options)
    assert message in str(result.exception)
    assert not list(tmp_path.rglob("*.pack"))


def test_a_step_that_fails_is_no_time(
    driver: BatchDriver, monkeypatch: pytest.MonkeyPatch, own: AdapterEngine
) -> None:
    def fail(self: ModelRunner, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        raise ArithmeticError("broken")

    monkeypatch.setattr(ModelRunner, "start", fail)
    with pytest.raises(RuntimeError, match="broken"):
        driver.decode_ms((BatchRow(0, num_context=20),))


def test_observations_are_medians() -> None:
    times = iter(([5.0, 1.0], [100.0]))
    kind = StepTimes([(BatchRow(8),), (BatchRow(16),)], lambda _: next(times))
    kind.take(0)
    kind.take(0)
    assert kind.observations() == [Observation((BatchRow(8),), 5.0)]
