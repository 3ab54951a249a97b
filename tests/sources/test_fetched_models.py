"""Base models from a hub and from the web: in processes of their own, with the variables that a user sets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources.hub_server import Hub, running_hub
from toppings.model.config import ModelConfig
from toppings.sources import remote
from toppings.sources.fetch import FetchError, FetchNotFound
from toppings.sources.hub import split_id
from toppings.synth import PRESETS, write_model

CODE = """
from sys import argv
from toppings.sources.models import find_model
model = find_model(argv[1])
print(model.path, model.name)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub")
    write_model(path / "org" / "tiny", PRESETS["tiny"])
    (path / "org" / "tiny" / "modeling_tiny.py").write_text("raise SystemExit")
    (path / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"pickle")
    (path / "org" / "empty").mkdir()
    (path / "org" / "empty" / "README.md").write_text("nothing")
    return path


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with running_hub(root) as hub:
        yield hub


def find(hub: Hub, tmp_path: Path, reference: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    places = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-c", CODE, reference],
        env={**os.environ, **places, "HF_HUB_DISABLE_XET": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
def test_a_hub_id_is_fetched_once_without_code_or_pickles(hub: Hub, tmp_path: Path) -> None:
    first = find(hub, tmp_path, "org/tiny")
    assert first.returncode == 0, first.stderr
    path, name = first.stdout.split()
    assert name == "org/tiny"
    names = {file.name for file in Path(path).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(each.endswith((".py", ".bin")) for each in names)
    assert ModelConfig.from_checkpoint(Path(path)).num_layers == PRESETS["tiny"].layers
    assert find(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub.num_fetched["org/tiny/model.safetensors"] == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("reference", "token", "variables", "problem"),
    [
        ("org/none", "", {}, "no repository org/none"),
        ("org/tiny", "gated", {}, "org/tiny is gated: ask for access on its page, and set HF_TOKEN"),
        ("org/tiny", "", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("org/tiny@nowhere", "", {}, "has no such revision"),
        ("org/empty", "", {}, "has no config.json and no GGUF file"),
    ],
    ids=["missing", "gated", "offline", "revision", "no model"],
)
def test_what_cannot_be_had_is_said_in_one_line(
    hub: Hub, tmp_path: Path, reference: str, token: str, variables: dict[str, str], problem: str
) -> None:
    if token:
        hub.tokens["org/tiny"] = token
    result = find(hub, tmp_path, reference, **variables)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("toppings.sources.fetch.Fetch")
    assert problem in last


@pytest.mark.timeout(300)
def test_a_token_opens_a_restricted_repository(hub: Hub, tmp_path: Path) -> None:
    hub.tokens["org/tiny"] = "sesame"
    assert find(hub, tmp_path, "org/tiny", HF_TOKEN="sesame").returncode == 0


def test_a_model_on_the_web_is_mirrored_and_found_again(hub: Hub, tmp_path: Path) -> None:
    address = f"{hub.url}/org/tiny/resolve/main"
    path = remote.fetch_model(address, tmp_path)
    assert (path / "model.safetensors").read_bytes() == (hub.root / "org/tiny/model.safetensors").read_bytes()
    assert not (path / "pytorch_model.bin").exists()
    fetched = hub.num_fetched.copy()
    assert remote.fetch_model(address, tmp_path) == path
    assert hub.num_fetched == fetched


def test_a_fetch_that_was_cut_goes_on_and_is_whole(hub: Hub, tmp_path: Path) -> None:
    address = f"{hub.url}/org/tiny/resolve/main"
    hub.faults["org/tiny"] = "cut"
    with pytest.raises(FetchError, match=r"model\.safetensors gave \d+ bytes"):
        remote.fetch_model(address, tmp_path)
    [part] = tmp_path.glob("*/.main.part")
    assert (part / "config.json").exists()
    assert not list(tmp_path.glob("*/main"))
    hub.faults.clear()
    path = remote.fetch_model(address, tmp_path)
    assert (path / "model.safetensors").read_bytes() == (hub.root / "org/tiny/model.safetensors").read_bytes()
    assert hub.num_fetched["org/tiny/config.json"] == 1


def test_an_index_may_only_name_shards_beside_it(hub: Hub, root: Path, tmp_path: Path) -> None:
    folder = root / "org" / "bad"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../tiny/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FetchError, match="which is no safetensors file beside it"):
        remote.fetch_model(f"{hub.url}/org/bad/resolve/main", tmp_path)
    with pytest.raises(FetchNotFound, match="nothing is at"):
        remote.fetch_model(f"{hub.url}/org/none/resolve/main", tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", "", "")),
        ("org/name@v1.0", ("org/name", "", "v1.0")),
        ("org/name/some/file-Q4_0.gguf@main", ("org/name", "some/file-Q4_0.gguf", "main")),
        ("name", None),
        ("/org/name", None),
        ("org/../name", None),
        ("../name", None),
        ("org/name/../x.gguf", None),
        ("folder/file.gguf", None),
        ("org/name/more", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, parts: tuple[str, str, str] | None) -> None:
    assert split_id(text) == parts
