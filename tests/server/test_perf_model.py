"""The performance model that a server tells routers: where it comes from, and what /stats says."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import FakeEngineClient
from tests.server.conftest import Server
from toppings.adapters.registry import AdapterRegistry
from toppings.cluster.measured import BASE, describe_base, perf_model_path, read_perf_model
from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.cluster.report import read_report
from toppings.config import Config, EngineConfig
from toppings.engine.spawn import Spawner
from toppings.server import lifecycle
from toppings.server.app import create_app
from toppings.text import TextModel

CONFIG = EngineConfig(num_threads=2)


@pytest.fixture
def model(registry: AdapterRegistry) -> PerfModel:
    """As measured for the registry's base model."""
    return replace(load_perf_model("published"), origin="here", details={BASE: describe_base(registry)})


def keep(model: PerfModel, registry: AdapterRegistry, config: EngineConfig = CONFIG) -> Path:
    path = perf_model_path(config, registry.state_dir)
    path.write_text(model.to_json())
    return path


def test_what_was_measured_here_is_found(registry: AdapterRegistry, model: PerfModel) -> None:
    assert read_perf_model("", CONFIG, registry) is None
    keep(model, registry)
    assert read_perf_model("", CONFIG, registry) == model


@pytest.mark.parametrize("other", [{"num_threads": 1}, {"dtype": "float16"}])
def test_what_was_measured_with_other_settings_is_not(
    registry: AdapterRegistry, model: PerfModel, other: dict[str, object]
) -> None:
    keep(model, registry, replace(CONFIG, **other))  # type: ignore[arg-type]
    assert read_perf_model("", CONFIG, registry) is None


def test_what_was_measured_for_another_base_model_is_not_and_a_warning_says_so(
    registry: AdapterRegistry, model: PerfModel, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(replace(model, details={BASE: "2 layers, q_proj 8x8"}), registry)
    with caplog.at_level(logging.WARNING):
        assert read_perf_model("", CONFIG, registry) is None
    assert f"{path} was measured for another base model" in caplog.text


def test_a_file_that_is_named_or_shipped_comes_first(registry: AdapterRegistry, model: PerfModel) -> None:
    keep(model, registry)
    assert read_perf_model("published:mbgmv", CONFIG, registry) == load_perf_model("published:mbgmv")


def test_a_damaged_file_is_an_error_that_says_what_to_do(registry: AdapterRegistry, model: PerfModel) -> None:
    path = keep(model, registry)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"JSON is malformed|truncated") as raised:
        read_perf_model("", CONFIG, registry)
    assert str(path) in str(raised.value)
    assert "run `toppings profile batches` again, or delete the file" in str(raised.value)


async def test_stats_tell_routers_the_costs_and_the_limit(
    engine: FakeEngineClient, registry: AdapterRegistry, text: TextModel, config: Config, model: PerfModel
) -> None:
    server = Server(engine, registry, text, config)
    server.app = create_app(engine, registry, text, config, model)
    server.http = server.client_from("127.0.0.1")
    report = read_report((await server.http.get("/stats")).content)
    assert report.read_perf_model() == model
    assert report.max_num_seqs == engine.info.max_num_seqs == 8
    await server.http.aclose()


async def test_stats_of_a_server_that_has_no_model_tell_none(server: Server) -> None:
    content = (await server.http.get("/stats")).json()
    assert (content["perf_model"], content["max_num_seqs"]) == (None, 8)


async def test_a_server_does_not_start_with_a_file_that_is_none(
    config: Config, tmp_path: Path, engine: FakeEngineClient, registry: AdapterRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Client:
        @staticmethod
        async def start(config: EngineConfig, **_: object) -> FakeEngineClient:
            return engine

    monkeypatch.setattr(lifecycle, "EngineClient", Client)
    monkeypatch.setattr(lifecycle, "_hold_state", lambda config: None)
    monkeypatch.setattr(lifecycle, "_registry", lambda config, lock: registry)
    file = tmp_path / "model.json"
    file.write_text('{"origin": 3}')
    config = replace(config, server=replace(config.server, perf_model_file=str(file)))
    with pytest.raises(ValueError, match="cannot read performance model") as raised:
        await lifecycle._start(config, Spawner(stays=False))
    assert str(file) in str(raised.value)
    assert engine.died.is_set(), "the engine was left running"
