"""Adapters and base models in object stores: fsspec's S3 client against moto's server, its GCS client against
a server of ours."""

import asyncio
import errno
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path

import fsspec
import pytest

from tests.sources.gcs_server import running_store
from toppings.adapters.stored_tensors import WEIGHTS_FILE
from toppings.model.config import ModelConfig
from toppings.sources import mirror
from toppings.sources.adapters import find_reference, parse_source
from toppings.sources.fetch import FetchError, FetchNotFound, Opened, Room, fetch
from toppings.sources.mirror import PART, fetch_model
from toppings.sources.models import find_model
from toppings.sources.stores import StorePlace
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

BUCKET = "loras"
FETCH = "import sys; from pathlib import Path; from toppings.sources.mirror import fetch_model; "
FETCH += "fetch_model(sys.argv[1], Path(sys.argv[2]))"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the bucket: the adapters `team/one` and `team/pickled`, the model `models/tiny`."""
    root = tmp_path_factory.mktemp("stored") / BUCKET
    tiny = root / "models" / "tiny"
    write_model(tiny, PRESETS["tiny"])
    (tiny / "modeling_tiny.py").write_text("raise SystemExit")
    (tiny / "pytorch_model.bin").write_bytes(b"pickle")
    write_adapters(root / "team", tiny, AdapterShape(ranks=(4,)), count=1)
    (root / "team" / "adapter-00000").rename(root / "team" / "one")
    (root / "team" / "pickled").mkdir()
    (root / "team" / "pickled" / "adapter_config.json").write_text("{}")
    (root / "team" / "pickled" / "adapter_model.bin").write_bytes(b"pickle")
    return root


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest, content: Path) -> Iterator[str]:
    """The bucket's address."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gs":
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for credentials of its own
            with running_store(content.parent) as server:
                patch.setenv("STORAGE_EMULATOR_HOST", server.url)
                yield f"gs://{BUCKET}"
            return
        from moto.server import ThreadedMotoServer  # takes a second, with botocore

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = fsspec.filesystem("s3")
        system.mkdir(BUCKET)
        for file in filter(Path.is_file, content.rglob("*")):
            system.pipe_file(f"{BUCKET}/{file.relative_to(content)}", file.read_bytes())
        yield f"s3://{BUCKET}"
        server.stop()


def test_an_adapter_is_fetched_by_its_name(store: str, content: Path, tmp_path: Path) -> None:
    source = parse_source(f"{store}/team")
    found = source.find("one")
    assert found.where.startswith(f"{store}/team/one@")
    assert source.find("one").where == found.where
    path = found.bring(tmp_path / "one", Room(10**6, 60.0))
    assert (path / WEIGHTS_FILE).read_bytes() == (content / "team" / "one" / WEIGHTS_FILE).read_bytes()
    place = find_reference([source], f"{store}/team/one")
    assert place is not None
    assert place.where == found.where


def test_what_is_not_there_or_too_large_is_said(store: str, tmp_path: Path) -> None:
    source = parse_source(f"{store}/team,one,pickled,none")
    with pytest.raises(FetchNotFound, match=f"nothing is at {store}/team/none"):
        source.find("none")
    with pytest.raises(FetchError, match="never pickles"):
        source.find("pickled")
    assert not source.allows("other")
    with pytest.raises(FetchError, match="at most 1000 may be fetched"):
        source.find("one").bring(tmp_path / "one", Room(1000, 60.0))
    shutil.rmtree(tmp_path / "one", ignore_errors=True)


def test_a_model_is_mirrored_without_code_or_pickles_and_found_again(
    store: str, content: Path, tmp_path: Path
) -> None:
    found = find_model(f"{store}/models/tiny", str(tmp_path))
    assert found.name == "tiny"
    assert found.path.is_relative_to(tmp_path)
    original = content / "models" / "tiny"
    names = {file.name for file in found.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".py", ".bin")) for name in names)
    assert all((found.path / name).read_bytes() == (original / name).read_bytes() for name in names)
    assert ModelConfig.from_checkpoint(found.path).num_layers == PRESETS["tiny"].layers
    modified = {name: (found.path / name).stat().st_mtime_ns for name in names}
    assert find_model(f"{store}/models/tiny", str(tmp_path)) == found
    assert {name: (found.path / name).stat().st_mtime_ns for name in names} == modified


def test_a_mirror_that_was_cut_goes_on_and_believes_no_end(
    store: str, content: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SYNC_BYTES", 512)
    path = fetch_model(f"{store}/models/tiny", tmp_path)
    part = path.with_name(f".{path.name}.part")
    path.rename(part)
    weights = part / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    middle = len(whole) // 2  # the beginning is not read again, the end is: a power cut has damaged it
    weights.with_name(f"{weights.name}{PART}").write_bytes(
        b"#" * 100 + whole[100 : middle - 1000] + bytes(1000)
    )
    again = fetch_model(f"{store}/models/tiny", tmp_path)
    assert again == path
    assert (path / "model.safetensors").read_bytes() == b"#" * 100 + whole[100:]


def test_what_is_no_model_is_said(store: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"{store}/team/one is no base model|nothing is at"):
        fetch_model(f"{store}/team/one", tmp_path)
    with pytest.raises(FetchNotFound, match=f"nothing is at {store}/models/none"):
        fetch_model(f"{store}/models/none", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_answers_nobody_is_said_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, "s3://loras/models/tiny", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("toppings.sources.fetch.FetchError: s3://loras/models/tiny/")
    assert "cannot be fetched" in last


class Slow:
    """A store's client whose answers never come."""

    def __init__(self) -> None:
        self.loop = fsspec.asyn.get_loop()

    async def _info(self, path: str) -> None:
        await asyncio.sleep(3600)


def test_a_store_that_never_answers_is_waited_for_no_longer_than_a_fetch_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (Slow(), "loras"))
    place = StorePlace("s3://loras")
    with pytest.raises(FetchError, match="s3://loras/one cannot be fetched: FSTimeoutError"):
        place.look("one", Room(1, 0.05))


def test_whatever_a_stores_client_raises_is_told_as_not_to_be_had(tmp_path: Path) -> None:
    class Odd(Exception):
        pass

    class Body:
        def read(self, _: int) -> bytes:
            raise raised

        def close(self) -> None: ...

    class OddFiles:
        where = version = "s3://odd"
        is_restricted = False

        def sizes(self) -> dict[str, int | None]:
            return {"file": 10}

        def open(self, name: str, room: Room, start: int = 0) -> Opened:
            return Opened(Body())

    for number, error in enumerate((Odd("told"), ssl.SSLError("told"), IncompleteRead(b""), EOFError())):
        raised: Exception = error
        with pytest.raises(FetchError, match="s3://odd: file cannot be fetched: "):
            fetch(OddFiles(), tmp_path / str(number), Room(100, 60.0))
    raised = OSError(errno.EMFILE, "Too many open files")  # nobody's fault but this machine's
    with pytest.raises(OSError, match="Too many open files"):
        fetch(OddFiles(), tmp_path / "own", Room(100, 60.0))
