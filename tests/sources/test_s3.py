"""Adapters in an object store: fsspec's S3 client against moto's server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from toppings.adapters.stored_tensors import WEIGHTS_FILE
from toppings.sources.adapters import find_reference, parse_source
from toppings.sources.fetch import FetchError, FetchNotFound, Room
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is in the bucket `loras`, as local files; the adapter is `team/one`."""
    root = tmp_path_factory.mktemp("s3")
    write_model(root / "base", PRESETS["tiny"])
    write_adapters(root / "made", root / "base", AdapterShape(ranks=(4,)), count=1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = fsspec.filesystem("s3")
        system.mkdir("loras")
        for file in (root / "made" / "adapter-00000").iterdir():
            system.put_file(str(file), f"loras/team/one/{file.name}")
        system.pipe_file("loras/team/pickled/adapter_config.json", b"{}")
        system.pipe_file("loras/team/pickled/adapter_model.bin", b"pickle")
        yield root / "made" / "adapter-00000"
        server.stop()


def test_an_adapter_is_fetched_by_its_name(store: Path, tmp_path: Path) -> None:
    source = parse_source("s3://loras/team")
    found = source.find("one")
    assert found.where.startswith("s3://loras/team/one@")
    assert source.find("one").where == found.where
    path = found.bring(tmp_path / "one", Room(10**6, 60.0))
    assert (path / WEIGHTS_FILE).read_bytes() == (store / WEIGHTS_FILE).read_bytes()
    place = find_reference([source], "s3://loras/team/one")
    assert place is not None
    assert place.where == found.where


def test_what_is_not_there_or_too_large_is_said(store: Path, tmp_path: Path) -> None:
    source = parse_source("s3://loras/team,one,pickled,none")
    with pytest.raises(FetchNotFound, match="nothing is at s3://loras/team/none"):
        source.find("none")
    with pytest.raises(FetchError, match="never pickles"):
        source.find("pickled")
    assert not source.allows("other")
    with pytest.raises(FetchError, match="at most 1000 may be fetched"):
        source.find("one").bring(tmp_path / "one", Room(1000, 60.0))
    shutil.rmtree(tmp_path / "one", ignore_errors=True)
