"""What can be checked of the images and of the script that installs, without building one."""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lean import lean_site, run_lean
from tests.model.test_gguf import write
from toppings.command import main
from toppings.config import Config

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/install.sh"
IMAGES = sorted((ROOT / "docker").glob("Dockerfile.*"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    """Name and arguments of a Dockerfile's instructions."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, arguments = line.split(maxsplit=1)
            yield name, arguments


def all_of(file: Path, wanted: str) -> list[str]:
    return [arguments for name, arguments in instructions(file) if name == wanted]


def copied(file: Path) -> list[str]:
    """What an image takes from the sources."""
    lines = [shlex.split(arguments) for arguments in all_of(file, "COPY")]
    return [source for line in lines for source in [w for w in line if not w.startswith("--")][:-1]]


def is_ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that fits the path or a directory above it decides."""
    ignored = False
    parents = [path, *map(str, Path(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        places = [p if "**/" not in line else Path(p).name for p in parents]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(p, pattern) for p in places):
            ignored = not line.startswith("!")
    return ignored


def calls_of_the_script() -> list[tuple[str, list[str]]]:
    """Who calls it, and with which arguments."""
    makefile = (ROOT / "Makefile").read_text().replace("$(PYTHON)", "python3").replace("$(VENV)", ".venv")
    calls = [("Makefile", line) for line in makefile.splitlines() if line.startswith(f"\t{SCRIPT}")]
    for file in IMAGES:
        calls += [(file.name, line) for line in all_of(file, "RUN") if SCRIPT in line]
    words = [(who, shlex.split(line.replace("$TORCH_INDEX_URL", "file:///torch"))) for who, line in calls]
    return [(who, line[line.index(SCRIPT) + 1 :]) for who, line in words]


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([ROOT / SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_the_makefile_and_each_image_call_the_script_with_options_it_knows() -> None:
    calls = calls_of_the_script()
    assert [who for who, _ in calls] == ["Makefile", "Makefile", "Dockerfile.cpu", "Dockerfile.cuda"]
    for who, arguments in calls:
        # An image's Python is not this machine's.
        result = run_script(*arguments, "--python", sys.executable, "--check")
        assert result.returncode == 0, (who, result.stderr)


def test_a_server_is_installed_without_what_tests_figures_and_ray_need() -> None:
    whole, serving = (arguments for who, arguments in calls_of_the_script() if who == "Makefile")
    assert set(EXTRAS) - {"cuda", "gguf", "otel", "remote"} == set(
        whole[whole.index("--extras") + 1].split(",")
    )
    assert "--extras" not in serving
    assert set(serving) < set(whole)


def test_unknown_extras_are_refused_by_name(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    result = run_script("--venv", str(venv), "--python", sys.executable, "--extras", "dev,nonsense")
    assert result.returncode == 2
    assert "unknown extra 'nonsense'" in result.stderr
    assert all(extra in result.stderr for extra in EXTRAS)
    assert not venv.exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--extra", "dev"], "unknown option --extra"),
        (["--venv"], "--venv needs a value"),
        (["--venv", ""], "--venv is empty"),
        (["--python", "/no/python"], "/no/python is no Python 3.11 or newer"),
    ],
)
def test_other_mistakes_are_named_too(arguments: list[str], problem: str) -> None:
    result = run_script(*arguments)
    assert result.returncode == 2
    assert problem in result.stderr


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_an_image_copies_what_exists_and_what_the_package_needs(file: Path) -> None:
    sources = copied(file)
    assert [s for s in sources if not (ROOT / s).exists() or is_ignored(s)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {project["readme"], *project["license-files"]}
    assert named | {"pyproject.toml", "constraints.txt", SCRIPT, "src"} <= set(sources)
    assert not is_ignored("src/toppings/demo/model/model.safetensors")


@pytest.mark.parametrize(
    "path",
    [".venv/bin/python", ".git/config", "logs/auto/server.log", "tests/test_cli.py", "src/a/__pycache__/b"],
)
def test_what_is_no_source_stays_out_of_images(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_an_image_serves_as_a_user_without_rights_on_the_port_that_is_checked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Config] = []

    def run_server(config: Config, _: object) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("toppings.server.lifecycle.run_server", run_server)
    [entry_point] = all_of(file, "ENTRYPOINT")
    monkeypatch.setattr(sys, "argv", [*json.loads(entry_point), "--adapters", "/adapters"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    [config] = configs
    assert config.server.host == "0.0.0.0"
    assert config.engine.device == file.suffix.removeprefix(".")
    assert all_of(file, "EXPOSE") == [str(config.server.port)]
    assert f"127.0.0.1:{config.server.port}/ready'" in all_of(file, "HEALTHCHECK")[0]
    assert all_of(file, "USER") == ["toppings"]
    assert {"/models", "/adapters", config.engine.state_dir} == set(json.loads(all_of(file, "VOLUME")[0]))


def test_documented_docker_commands_use_options_of_the_server() -> None:
    shown = (ROOT / "README.md").read_text() + (ROOT / "docs" / "deployment.md").read_text()
    commands = re.findall(r"docker run (?:.*\\\n)*.*", shown)
    options = {f"--{name.replace('_', '-')}" for name in Config().to_settings()}
    assert commands
    for command in commands:
        _, image, arguments = re.split(r"\s(toppings:\w+)", command)
        assert image.split(":")[1] in {file.suffix.removeprefix(".") for file in IMAGES}
        assert {word for word in arguments.split() if word.startswith("--")} <= options


def test_what_the_extra_brings_is_enough_to_read_a_gguf_file(tmp_path: Path) -> None:
    site = lean_site(tmp_path / "site", "gguf")
    assert not (site / "peft").exists()
    write(tmp_path / "model.gguf")
    arguments = str(tmp_path / "model.gguf"), str(tmp_path / "model"), str(os.getpid())
    done = run_lean(site, "toppings.model.gguf", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("verb", ["serve", "route", "adapters", "keys", "profile"])
def test_a_verb_needs_no_more_than_a_server_does(tmp_path: Path, verb: str) -> None:
    done = run_lean(lean_site(tmp_path / "site"), "toppings", verb, "--help")
    assert done.returncode == 0, done.stderr
