"""Base models from a hub and from the web: in processes of their own, with the variables that a user sets."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.sources.hub_server import Hub, running_hub
from toppings.model.config import ModelConfig
from toppings.sources import mirror
from toppings.sources.fetch import FetchError, FetchNotFound, Room
from toppings.sources.hub import split_id
from toppings.sources.web import open_url
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
    (path / "org" / "tiny" / "consolidated.safetensors").write_bytes(b"the same once more")
    write_model(path / "org" / "parted", PRESETS["tiny"])
    shard = "model-00001-of-00001.safetensors"
    (path / "org" / "parted" / "model.safetensors").rename(path / "org" / "parted" / shard)
    index = json.dumps({"weight_map": {"a": shard, "b": shard}})
    (path / "org" / "parted" / "model.safetensors.index.json").write_text(index)
    (path / "org" / "parted" / "other.safetensors").write_bytes(b"of another purpose")
    (path / "org" / "pickled").mkdir()
    (path / "org" / "pickled" / "config.json").write_text("{}")
    (path / "org" / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
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


def test_a_hub_id_is_fetched_once_without_code_or_pickles(hub: Hub, tmp_path: Path) -> None:
    first = find(hub, tmp_path, "org/tiny")
    assert first.returncode == 0, first.stderr
    path, name = first.stdout.split()
    assert name == "org/tiny"
    names = {file.name for file in Path(path).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(each.endswith((".py", ".bin")) for each in names)
    assert "consolidated.safetensors" not in names
    assert ModelConfig.from_checkpoint(Path(path)).num_layers == PRESETS["tiny"].layers
    assert find(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub.num_fetched["org/tiny/model.safetensors"] == 1


@pytest.mark.parametrize(
    ("reference", "token", "variables", "problem"),
    [
        ("org/none", "", {}, "no repository org/none"),
        ("org/tiny", "sesame", {}, "org/tiny is gated: ask for access on its page, and set HF_TOKEN"),
        ("org/tiny", "", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("org/tiny@nowhere", "", {}, "has no such revision"),
        ("org/empty", "", {}, "has no config.json and no GGUF file"),
        ("org/pickled", "", {}, "only safetensors are read, never pickles"),
    ],
    ids=["missing", "gated", "offline", "revision", "no model", "pickle"],
)
def test_what_cannot_be_had_is_said_in_one_line(
    hub: Hub, tmp_path: Path, reference: str, token: str, variables: dict[str, str], problem: str
) -> None:
    if token:
        hub.tokens["org/tiny"] = token
        hub.gated.add("org/tiny")
    result = find(hub, tmp_path, reference, **variables)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("toppings.sources.fetch.Fetch")
    assert problem in last


def test_a_token_opens_a_restricted_repository(hub: Hub, tmp_path: Path) -> None:
    hub.tokens["org/tiny"] = "sesame"
    assert find(hub, tmp_path, "org/tiny", HF_TOKEN="sesame").returncode == 0


def test_a_model_on_the_web_is_mirrored_and_found_again(hub: Hub, tmp_path: Path) -> None:
    address = f"{hub.url}/org/tiny/resolve/main"
    path = mirror.fetch_model(address, tmp_path)
    assert (path / "model.safetensors").read_bytes() == (hub.root / "org/tiny/model.safetensors").read_bytes()
    assert not (path / "consolidated.safetensors").exists()
    assert not (path / "pytorch_model.bin").exists()
    fetched = hub.num_fetched.copy()
    assert mirror.fetch_model(address, tmp_path) == path
    assert hub.num_fetched == fetched


def test_a_fetch_that_was_cut_goes_on_and_is_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SYNC_BYTES", 512)
    address = f"{hub.url}/org/tiny/resolve/main"
    hub.faults["org/tiny"] = "cut"
    with pytest.raises(FetchError, match=r"model\.safetensors has \d+ bytes; \d+ were announced"):
        mirror.fetch_model(address, tmp_path)
    [part] = tmp_path.glob("*/.main.part")
    assert (part / "config.json").exists()
    assert not list(tmp_path.glob("*/main"))
    hub.faults.clear()
    path = mirror.fetch_model(address, tmp_path)
    assert (path / "model.safetensors").read_bytes() == (hub.root / "org/tiny/model.safetensors").read_bytes()
    assert hub.num_fetched["org/tiny/config.json"] == 1
    half = (path / "model.safetensors").stat().st_size // 2
    assert hub.ranges == [f"model.safetensors {half - 2 * mirror.SYNC_BYTES}"]


def test_only_what_an_index_names_is_fetched(hub: Hub, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    path = mirror.fetch_model(f"{hub.url}/org/parted/resolve/main", tmp_path)
    assert {file.name for file in path.glob("*.safetensors")} == {shard}
    fetched = find(hub, tmp_path, "org/parted")
    assert fetched.returncode == 0, fetched.stderr
    assert {file.name for file in Path(fetched.stdout.split()[0]).glob("*.safetensors")} == {shard}


@pytest.mark.parametrize("is_told", [True, False])
def test_a_file_that_grows_for_ever_ends_and_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    monkeypatch.setattr("toppings.sources.remote.MAX_UNTOLD_BYTES", 1 << 20)
    hub.faults["org/tiny"] = "endless"
    if not is_told:
        hub.untold.add("org/tiny")
    problem = "goes on after" if is_told else "is larger than 1048576 bytes"
    with pytest.raises(FetchError, match=rf"model\.safetensors {problem}"):
        mirror.fetch_model(f"{hub.url}/org/tiny/resolve/main", tmp_path)
    assert list(tmp_path.rglob("model.safetensors*")) == []


def test_what_has_neither_mark_nor_length_is_known_by_its_content(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    hub.untold.add("org/tiny")
    address = f"{hub.url}/org/tiny/resolve/main"
    first = mirror.fetch_model(address, tmp_path)
    assert mirror.fetch_model(address, tmp_path) == first
    config = root / "org" / "tiny" / "generation_config.json"
    before = config.read_text() if config.exists() else None
    config.write_text('{"temperature": 0.25}')
    again = mirror.fetch_model(address, tmp_path)
    assert again != first
    assert (again / config.name).read_text() == '{"temperature": 0.25}'
    config.unlink() if before is None else config.write_text(before)


def test_what_the_web_refuses_or_sends_elsewhere_is_said(hub: Hub, tmp_path: Path) -> None:
    address = f"{hub.url}/org/tiny/resolve/main"
    hub.faults["org/tiny"] = "elsewhere"
    with pytest.raises(FetchError, match=r"redirects elsewhere, to http://127\.0\.0\.2:9: not followed"):
        mirror.fetch_model(address, tmp_path)
    hub.refused.add("org/tiny")
    with pytest.raises(FetchError, match="answers 401 Unauthorized"):
        mirror.fetch_model(address, tmp_path)


def test_a_head_that_trickles_ends_with_the_time() -> None:
    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(0.01):
                connection.sendall(b"x")

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        with pytest.raises(FetchError, match=r"/x has not come within 0\.2 s"):
            open_url(url, Room(1000, 0.2))
        over.set()
        thread.join()


def test_an_index_may_only_name_shards_beside_it(hub: Hub, root: Path, tmp_path: Path) -> None:
    folder = root / "org" / "bad"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../tiny/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FetchError, match="which is no safetensors file beside it"):
        mirror.fetch_model(f"{hub.url}/org/bad/resolve/main", tmp_path)
    with pytest.raises(FetchNotFound, match="nothing is at"):
        mirror.fetch_model(f"{hub.url}/org/none/resolve/main", tmp_path)


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
