"""The registry when its disk or another process does not let it write."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.adapters.fixtures import SHAPES, write_adapter
from tests.waiting import PATIENCE_S
from toppings.adapters import database
from toppings.adapters.errors import AdapterError, StateError, StateFullError
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.rows import check_rows
from toppings.adapters.state_lock import StateLock


def open_owned(state_dir: Path) -> AdapterRegistry:
    if state_dir.exists():
        check_rows(state_dir)
    return AdapterRegistry(state_dir, "base", SHAPES, "float32", lock=StateLock.take(state_dir, "a test"))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterRegistry]:
    monkeypatch.setattr(database, "LOCK_WAIT_S", 0.2)
    registry = open_owned(tmp_path / "state")
    registry.register("a", write_adapter(tmp_path / "a"))
    yield registry
    registry.close()


@pytest.fixture
def locked(registry: AdapterRegistry) -> Iterator[AdapterRegistry]:
    with closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield registry
        other.execute("ROLLBACK")


def test_look_ups_go_on_while_a_write_waits_for_another_process(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(database, "TURN_WAIT_S", PATIENCE_S)
    record = registry.get("a")
    with (
        ThreadPoolExecutor() as pool,
        closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        writes = [pool.submit(registry.set_pinned, "a", True) for _ in range(4)]
        for _ in range(100):
            assert (registry.get("a"), registry.get_by_id(record.adapter_id)) == (record, record)
            assert (registry.list(), registry.count()) == ([record], 1)
        assert not any(write.done() for write in writes)
        other.execute("ROLLBACK")
        for write in writes:
            write.result()
    assert registry.get("a").is_pinned


def test_look_ups_of_those_who_share_it_go_on_too(registry: AdapterRegistry) -> None:
    reader = AdapterRegistry(registry.state_dir, "base", SHAPES, "float32")
    with closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert reader.get("a") == registry.get("a")
        assert AdapterRegistry(registry.state_dir, "base", SHAPES, "float32").count() == 1
    reader.close()


WRITES: dict[str, Callable[[AdapterRegistry, Path], object]] = {
    "remove": lambda registry, _: registry.remove("a"),
    "pin": lambda registry, _: registry.set_pinned("a", True),
    "register": lambda registry, path: registry.register("b", write_adapter(path / "b")),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_meets_a_lock_changes_nothing_and_says_why(
    locked: AdapterRegistry, tmp_path: Path, write: str
) -> None:
    before = locked.list()
    with pytest.raises(StateError, match="locked by another process"):
        WRITES[write](locked, tmp_path)
    assert locked.list() == before
    assert len(list((locked.state_dir / "packed").iterdir())) == 1


def test_a_queue_of_writes_does_not_wait_one_after_the_other(
    locked: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCKED_WAIT_S", 0.0)
    monkeypatch.setattr(database, "LOCKED_MEMORY_S", 1e6)
    monkeypatch.setattr(database, "LOCK_WAIT_S", 3.0)
    started_at = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        writes = [pool.submit(locked.remove, "a") for _ in range(16)]
    assert all(isinstance(write.exception(), StateError) for write in writes)
    assert time.monotonic() - started_at < 16 * 3.0


def test_a_lock_that_is_given_up_is_forgotten(registry: AdapterRegistry) -> None:
    with closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateError):
            registry.remove("a")
        other.execute("ROLLBACK")
    assert registry.remove("a").name == "a"


def test_a_full_disk_is_told_as_such_and_changes_nothing(registry: AdapterRegistry) -> None:
    [[pages]] = registry._rows._db._writer.execute("PRAGMA page_count").fetchall()
    registry._rows._db._writer.execute(f"PRAGMA max_page_count = {pages}")
    before = registry.list()
    fields = {
        **vars(before[0]),
        "name": "x" * 2**20,
        "targets": "q_proj",
        "invocation_tokens": "",
        "merge": "",
        "vocabulary": "",
    }
    with pytest.raises(StateFullError, match="full"), registry._rows.change() as change:
        change.insert(fields, replace=False)
    assert registry.list() == before
    registry.set_pinned("a", True)


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_a_damaged_registry_is_one_line_with_advice(tmp_path: Path, damage: str) -> None:
    registry = open_owned(tmp_path / "state")
    registry.register("a", write_adapter(tmp_path / "a"))
    registry.close()
    file = tmp_path / "state" / "registry.sqlite"
    content = file.read_bytes()
    file.write_bytes(b"garbage " * 1000 if damage == "garbage" else content[:100] + b"\xff" * 8000)
    with pytest.raises(StateError, match=r"registry\.sqlite is damaged.*delete it") as told:
        open_owned(tmp_path / "state")
    assert "\n" not in str(told.value)


def test_a_registry_of_an_earlier_version_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with closing(sqlite3.connect(tmp_path / "state" / "registry.sqlite")) as old:
        old.execute("CREATE TABLE base (fields TEXT NOT NULL)")
    with pytest.raises(StateError, match="another version of Toppings; delete it"):
        open_owned(tmp_path / "state")


COLUMNS = "invocation_tokens", "merge", "vocabulary", "step_rank"
"""Of versions 3, 4, 5 and 6."""


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_registry_of_a_version_before_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    registry = open_owned(tmp_path / "state")
    registry.register("a", write_adapter(tmp_path / "a"))
    registry.close()
    with closing(sqlite3.connect(tmp_path / "state" / "registry.sqlite", isolation_level=None)) as old:
        for column in COLUMNS[version - 2 :]:
            old.execute(f"ALTER TABLE adapters DROP COLUMN {column}")
        old.execute(f"PRAGMA user_version = {version}")
    for _ in range(2):
        registry = open_owned(tmp_path / "state")
        record = registry.get("a")
        assert (record.invocation_tokens, record.merge, record.vocabulary) == ((), None, None)
        assert record.step_rank == record.rank
        registry.close()


def test_a_start_that_changes_nothing_writes_nothing(registry: AdapterRegistry, tmp_path: Path) -> None:
    """So that a server starts on a full disk."""
    registry.register_directory(write_adapter(tmp_path / "all" / "b").parent)
    [[before]] = registry._rows._db._writer.execute("SELECT total_changes()").fetchall()
    registry.register_directory(tmp_path / "all")
    registry.clean_up()
    assert registry._rows._db._writer.execute("SELECT total_changes()").fetchall() == [(before,)]


# --- packed files ---


def test_a_packed_directory_that_was_deleted_is_made_again(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.get("a")
    for file in (registry.state_dir / "packed").iterdir():
        file.unlink()
    (registry.state_dir / "packed").rmdir()
    registry.open_packed(record.adapter_id).close()
    registry.register("b", write_adapter(tmp_path / "b"))


def test_a_packed_file_that_cannot_be_made_again_is_told_once(
    registry: AdapterRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = registry.get("a")
    Path(record.packed_path).unlink()
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    for _ in range(3):
        with pytest.raises(AdapterError):
            registry.open_packed(record.adapter_id)
    assert caplog.text.count("making it again") == 1
