"""`toppings reproduce`: every verb at toy size, through the command line; servers are fake."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.bench import fake_server
from toppings.lab.modes import compare as bench_modes
from toppings.lab.reproduce.cli import VERBS, reproduce_app
from toppings.synth import PRESETS, write_model

NUM_ADAPTERS = 4
OUTCOMES = {
    "modes": "Fig. 13, 14",
    "steps": "Fig. 15",
    "popularity": "Fig. 12, left",
    "ipc": "Fig. 12, right",
    "cpu": "Fig. 17",
    "models": "Fig. 11",
    "testbed": "Fig. 18",
    "simulation-bgmv": "Fig. 19",
    "simulation-mbgmv": "Fig. 19",
}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(reproduce_app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `all --quick` leaves, with a tiny model and servers that have none."""
    work = tmp_path_factory.mktemp("reproduce")
    write_model(work / "model", PRESETS["tiny"])
    for i in range(NUM_ADAPTERS):
        (work / "adapters" / f"adapter-{i}").mkdir(parents=True)
    settings = {
        "model": str(work / "model"),
        "adapters": str(work / "adapters"),
        "state_dir": str(work / "state"),
        "num_threads": 1,
        "kv_cache_bytes": "8MiB",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    (work / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        fake = functools.partial(bench_modes.compare_modes, command=_fake_server)
        patch.setattr(bench_modes, "compare_modes", fake)
        result = invoke("all", "--quick", "--config", work / "config.yaml", "--out", work / "out")
    assert result.exit_code == 0, result.exception
    return work / "out"


def _fake_server(config_file: Path) -> list[str]:
    return [sys.executable, fake_server.__file__, str(config_file)]


def read(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return content


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_verb_leaves_figures_and_their_data(out: Path, name: str) -> None:
    content = read(out, name)
    assert content["reproduces"] == f"Toppings, USENIX ATC 2025, {OUTCOMES[name]}"
    assert content["claims"]
    assert content["differs"]
    assert content["data"]
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_one_table_has_the_claims_of_all_verbs(out: Path) -> None:
    table = (out / "comparison.md").read_text()
    num_claims = sum(len(read(out, name)["claims"]) for name in OUTCOMES)
    assert len(table.splitlines()) == 2 + num_claims
    assert all(f"| {figure} |" in table for figure in OUTCOMES.values())


def test_steps_are_those_of_the_servers_that_modes_started(out: Path) -> None:
    order = read(out, "steps")["claims"][0]
    assert order["published"] == "cached < cpu_assisted < on_demand"
    assert order["ours"].endswith(": holds")


def test_the_model_that_was_fitted_can_be_simulated_with(out: Path, tmp_path: Path) -> None:
    arguments = (
        "--quick",
        "--policies",
        "random",
        "--perf-model",
        out / "perf-model.json",
        "--out",
        tmp_path,
    )
    assert invoke("testbed", *arguments).exit_code == 0
    origin = read(out, "models")["data"]["origin"]
    assert f"step times: {origin}" in read(tmp_path, "testbed")["differs"]


def test_every_verb_is_a_command() -> None:
    names = {command.name for command in reproduce_app.registered_commands}
    assert names == {*VERBS, "all"}
    assert {name.split("-")[0] for name in OUTCOMES} == set(VERBS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("simulation", "--rates", "fast"), "rates are 'fast'"),
        (("simulation", "--rates", "0"), "rates are '0'"),
        (("testbed", "--policies", "best"), "'best'"),
        (("testbed", "--perf-model", "none.json"), "none.json"),
        (("simulation", "--mode", "magic"), "'magic'"),
        (("simulation", "--duration", "0"), "duration_s is 0"),
        (("simulation", "--trace", "none.csv"), "none.csv"),
        (("modes", "--requests", "0"), "num_requests is 0"),
        (("modes", "--config", "none.yaml"), "none.yaml"),
        (("models", "--seconds", "0"), "seconds is 0"),
        (("popularity", "--trace", "none.csv"), "none.csv"),
        (("steps",), "no step log below"),
    ],
)
def test_a_wrong_option_is_named(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, ValueError | OSError)
    assert reason in str(result.exception)
