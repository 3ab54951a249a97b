"""What measures stands apart: nothing that serves has imported it, and a verb is imported when it is asked
for. (test_rooms.py looks at imports as they are written.)"""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from toppings import command
from toppings.cli.profile import BATCHES, FLEETS

SERVING = (
    *("toppings.cli.serving", "toppings.cli.adapters", "toppings.cli.profile", "toppings.cli.synth"),
    *("toppings.llm", "toppings.server.app", "toppings.server.lifecycle"),
    *("toppings.cluster.router.app", "toppings.engine.process", "toppings.assist.worker"),
)
REPLICAS = ("toppings.cluster.ray_serve.replica", "toppings.cluster.ray_serve.app")
LAB = ("toppings.lab", "toppings.sim", "matplotlib")


def imported_by(code: str) -> set[str]:
    """Modules that a new process has then."""
    code += "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def lab_modules(modules: set[str]) -> list[str]:
    return sorted(name for name in modules if any(f"{name}.".startswith(f"{room}.") for room in LAB))


def test_what_serves_imports_nothing_that_measures() -> None:
    assert lab_modules(imported_by(f"import {', '.join(SERVING)}")) == []


def test_what_serves_imports_nothing_that_only_tests_and_ray_install() -> None:
    assert (
        imported_by(f"import {', '.join(SERVING)}") & {"psutil", "ray", "httpx", "requests", "openai"}
        == set()
    )


def test_replicas_on_ray_import_nothing_that_measures() -> None:
    pytest.importorskip("ray")
    assert lab_modules(imported_by(f"import {', '.join(REPLICAS)}")) == []


def test_the_simulator_imports_nothing_that_measures() -> None:
    modules = imported_by("import toppings.sim.runs, toppings.sim.readers")
    assert not any(name.startswith("toppings.lab") for name in modules)


def test_the_list_of_verbs_imports_none_of_them() -> None:
    code = "from typer.testing import CliRunner; from toppings.command import app; CliRunner().invoke(app)"
    own = {name for name in imported_by(code) if name.split(".")[0] in ("toppings", "numpy", "rich", "yaml")}
    assert own == {"toppings", "toppings.command"}


@pytest.mark.parametrize("name", command.VERBS)
def test_a_verb_says_what_the_list_of_verbs_says_of_it(name: str) -> None:
    assert command.load_verb(command.VERBS, name).get_short_help_str(200) == command.VERBS[name][1]


def test_a_misspelt_verb_is_told_what_was_meant() -> None:
    result = CliRunner().invoke(command.app, ["simulat"])
    assert result.exit_code == 2
    assert "Did you mean 'simulate'?" in result.output


def test_profile_has_a_verb_of_either_kind() -> None:
    group = command.load_verb(command.VERBS, "profile")
    context = typer.Context(group)
    assert group.list_commands(context) == ["cold-start", "products", "quantization", "batches"]
    assert group.get_command(context, "batches").get_short_help_str(200) == BATCHES["batches"][1]


def test_plan_is_of_a_cold_start_or_of_a_fleet() -> None:
    group = command.load_verb(command.VERBS, "plan")
    context = typer.Context(group)
    assert group.list_commands(context) == ["fleet"]
    assert group.get_command(context, "fleet").get_short_help_str(200) == FLEETS["fleet"][1]
