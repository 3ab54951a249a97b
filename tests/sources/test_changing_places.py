"""Places whose content changes while it is fetched, and those that call forbidden what is absent."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import get_loop

from tests.sources.hub_server import Hub, running_hub
from toppings.sources import mirror
from toppings.sources.adapters import parse_source
from toppings.sources.fetch import FetchChanged, FetchDenied, FetchError, Room
from toppings.sources.mirror import PART, fetch_model
from toppings.sources.remote import RemoteFiles
from toppings.sources.stores import StorePlace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "hub" / "org" / "one"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text('{"rev": "A"}')
    (folder / WEIGHTS).write_bytes(b"weights A")
    with running_hub(tmp_path / "hub") as hub:
        yield hub


@pytest.mark.parametrize("is_untold", [False, True], ids=["marked", "unmarked"])
def test_an_adapter_is_of_one_revision_or_not_fetched(hub: Hub, tmp_path: Path, is_untold: bool) -> None:
    """The second file is another one by now, of the same length."""
    if is_untold:
        hub.untold.add("org/one")
    source = parse_source(f"{hub.url}/org/one/resolve")
    found = source.find("main")
    (hub.root / "org/one" / WEIGHTS).write_bytes(b"weights B")
    with pytest.raises(FetchChanged, match=rf"{WEIGHTS} has changed since it was looked for"):
        found.bring(tmp_path / "first", Room(1000, 60.0))
    path = source.find("main").bring(tmp_path / "second", Room(1000, 60.0))
    assert (path / WEIGHTS).read_bytes() == b"weights B"


def test_a_resumed_mirror_is_of_one_revision(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SYNC_BYTES", 16)
    weights = hub.root / "org/one/x.gguf"
    weights.write_bytes(b"A" * 500)
    files = RemoteFiles(f"{hub.url}/org/one/resolve/main", ["x.gguf"])
    half = mirror._Mirror(files, tmp_path / "cache")
    half.part.mkdir(parents=True)
    (half.part / f"x.gguf{PART}").write_bytes(b"A" * 400)
    weights.write_bytes(b"B" * 500)
    with pytest.raises(FetchChanged, match=r"x\.gguf has changed"):
        half.whole()
    whole = fetch_model(f"{hub.url}/org/one/resolve/main/x.gguf", tmp_path / "cache")
    assert whole.read_bytes() == b"B" * 500


class Changing:
    """A store's client, of one file."""

    def __init__(self) -> None:
        self.loop = get_loop()
        self.content = b"A" * 10
        self.error: Exception | None = None

    async def _info(self, path: str) -> dict[str, object]:
        if self.error is not None:
            raise self.error
        return {"type": "file", "size": len(self.content), "ETag": self.content.decode()}

    async def _cat_file(self, path: str, start: int, end: int) -> bytes:
        return self.content[start:end]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Changing:
    store = Changing()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (store, "loras"))
    return store


def test_a_stores_file_is_the_one_that_was_found(store: Changing) -> None:
    place, room = StorePlace("s3://loras"), Room(1000, 60.0)
    found = place.look("one", room)
    assert found is not None
    under_way = place.open("one", room, found)
    assert under_way.body.read(10) == b"A" * 10
    store.content = b"B" * 10
    with pytest.raises(FetchChanged, match="s3://loras/one has changed"):
        under_way.body.read(10)
    with pytest.raises(FetchChanged, match="s3://loras/one has changed"):
        place.open("one", room, found)


class CodedError(Exception):
    code = 401


@pytest.mark.parametrize(
    "error", [PermissionError("Forbidden"), OSError("Forbidden: loras/one"), CodedError("who are you?")]
)
def test_a_stores_refusal_is_known(store: Changing, error: Exception) -> None:
    store.error = error
    with pytest.raises(FetchDenied, match="s3://loras/one is not there, or may not be read"):
        StorePlace("s3://loras").look("one", Room(1000, 60.0))
    store.error = OSError("broken")
    with pytest.raises(FetchError, match="broken") as told:
        StorePlace("s3://loras").look("one", Room(1000, 60.0))
    assert not isinstance(told.value, FetchDenied)


def test_what_is_forbidden_is_absent_where_it_is_not_needed(hub: Hub, tmp_path: Path) -> None:
    """As of a bucket that may not be listed."""
    hub.hides_absent = True
    source = parse_source(f"{hub.url}/org/one/resolve")
    path = source.find("main").bring(tmp_path / "one", Room(1000, 60.0))
    assert {file.name for file in path.iterdir()} == {CONFIG, WEIGHTS}
    (hub.root / "org/one" / WEIGHTS).unlink()
    with pytest.raises(
        FetchDenied, match=rf"{WEIGHTS} answers 403 Forbidden: it is not there, or may not be"
    ):
        source.find("main")


def test_a_new_revision_leaves_one_older_one(hub: Hub, tmp_path: Path) -> None:
    weights = hub.root / "org/one/x.gguf"
    address, cache = f"{hub.url}/org/one/resolve/main", tmp_path / "cache"

    def fetch(name: str, content: bytes) -> Path:
        (hub.root / "org/one" / name).write_bytes(content)
        return fetch_model(f"{address}/{name}", cache)

    fetched = [fetch("x.gguf", bytes([65 + i]) * 10) for i in range(2)]
    assert all(path.exists() for path in fetched)
    given_up = mirror._Mirror(RemoteFiles(address, ["x.gguf"]), cache)
    weights.write_bytes(b"Z")
    other = mirror._Mirror(RemoteFiles(address, ["x.gguf"]), cache)
    other.part.mkdir(parents=True)
    third = fetch("x.gguf", b"C" * 10)
    assert [path.exists() for path in (*fetched, third)] == [False, True, True]
    assert not other.part.exists()
    assert given_up.whole() == fetched[1].parent
    assert third.read_bytes() == b"C" * 10
    elsewhere = cache / "0123456789abcdef" / "other"
    elsewhere.mkdir(parents=True)
    assert fetch("x.gguf", b"D" * 10).exists()
    assert elsewhere.exists()
