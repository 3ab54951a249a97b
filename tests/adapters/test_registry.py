import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.adapters.fixtures import SHAPES, make_tensors, open_registry, tensor_key, write_adapter
from tests.warm import WARM
from toppings.adapters import recent_names
from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound, StateError
from toppings.adapters.layout import BaseShapes
from toppings.adapters.packed import check_packed
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.state_lock import StateLock


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return open_registry(tmp_path / "state")


def packed_files(registry: AdapterRegistry) -> list[str]:
    return sorted(os.listdir(registry.state_dir / "packed"))


def test_registered_adapter_is_found_by_name_and_id(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a", rank=5, modules=("k_proj", "up_proj")))
    assert registry.get("a") == registry.get_by_id(record.adapter_id) == record
    assert (record.rank, record.targets, record.base_model) == (5, ("k_proj", "up_proj"), "tiny")
    assert record.num_bytes == check_packed(record.packed_path).layout.num_bytes
    assert (registry.list(), registry.count()) == ([record], 1)


def test_names_of_ids_outlive_their_adapters_but_not_for_ever(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_names, "MAX_NAMES", 3)
    names = recent_names.RecentNames(registry)
    first = registry.register("a", write_adapter(tmp_path / "a")).adapter_id
    assert names.of(first) == "a"
    registry.purge(registry.remove("a").adapter_id)
    assert (names.of(first), names.of(first + 1)) == ("a", None)
    for number in range(3):
        names.note(first + number + 1, "b")
    assert names.of(first) is None


def test_registered_adapter_survives_reopening(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    registry.close()
    assert open_registry(registry.state_dir).get("a") == record


def test_second_process_view_sees_what_the_first_writes(registry: AdapterRegistry, tmp_path: Path) -> None:
    reader = open_registry(registry.state_dir)
    record = registry.register("a", write_adapter(tmp_path / "a"))
    assert reader.get_by_id(record.adapter_id) == record


def test_taken_name_is_refused(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    with pytest.raises(AdapterExists, match="'a'"):
        registry.register("a", write_adapter(tmp_path / "b"))
    assert registry.list() == [record]


def test_replacing_makes_a_new_generation_and_keeps_the_old_readable(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    old = registry.register("a", write_adapter(tmp_path / "a"))
    registry.set_pinned("a", True)
    new = registry.register("a", write_adapter(tmp_path / "b", rank=9), replace=True)
    assert new.adapter_id > old.adapter_id
    assert new.is_pinned
    assert registry.list() == [new]
    assert registry.open_packed(old.adapter_id).layout.max_rank == 4


def test_purged_generation_is_gone(registry: AdapterRegistry, tmp_path: Path) -> None:
    old = registry.register("a", write_adapter(tmp_path / "a"))
    new = registry.register("a", tmp_path / "a", replace=True)
    registry.purge(old.adapter_id)
    registry.purge(new.adapter_id)  # live: not touched
    with pytest.raises(AdapterNotFound):
        registry.get_by_id(old.adapter_id)
    assert packed_files(registry) == [f"{new.adapter_id}.pack"]


def test_id_is_never_used_again(registry: AdapterRegistry, tmp_path: Path) -> None:
    first = registry.register("a", write_adapter(tmp_path / "a"))
    registry.purge(registry.remove("a").adapter_id)
    registry.close()
    assert open_registry(registry.state_dir).register("a", tmp_path / "a").adapter_id > first.adapter_id


def test_removed_name_is_free_at_once(registry: AdapterRegistry, tmp_path: Path) -> None:
    removed = registry.register("a", write_adapter(tmp_path / "a"))
    registry.remove("a")
    with pytest.raises(AdapterNotFound, match="'a'"):
        registry.get("a")
    with pytest.raises(AdapterNotFound):
        registry.remove("a")
    assert registry.count() == 0
    assert registry.get_by_id(removed.adapter_id).name == "a"
    assert registry.register("a", tmp_path / "a").adapter_id != removed.adapter_id


def test_pin_is_remembered(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    assert registry.set_pinned("a", True).is_pinned
    assert registry.live_ids(is_pinned=True) == [record.adapter_id]
    assert not registry.set_pinned("a", False).is_pinned
    with pytest.raises(AdapterNotFound):
        registry.set_pinned("b", True)


def test_failed_registration_leaves_nothing(registry: AdapterRegistry, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[tensor_key(0, "q_proj", "A")][0, 0] = float("nan")
    with pytest.raises(AdapterError):
        registry.register("a", write_adapter(tmp_path / "a", tensors=tensors))
    with pytest.raises(AdapterNotFound):
        registry.register("a", tmp_path / "none")
    assert (registry.count(), packed_files(registry)) == (0, [])


def test_overflow_while_packing_leaves_nothing(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "state", dtype="float16")
    tensors = {key: tensor * 1e5 for key, tensor in make_tensors().items()}
    with pytest.raises(AdapterError, match="float16"):
        registry.register("a", write_adapter(tmp_path / "a", tensors=tensors))
    assert packed_files(registry) == []


def test_failed_replacement_keeps_the_old_adapter(registry: AdapterRegistry, tmp_path: Path) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    with pytest.raises(AdapterError):
        registry.register("a", write_adapter(tmp_path / "b", use_dora=True), replace=True)
    assert registry.get("a") == record


@pytest.mark.parametrize("name", ["", " a", "a ", "a,b", "a\nb", "a\0", "x" * 257])
def test_name_that_would_break_lists_is_refused(registry: AdapterRegistry, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="not allowed"):
        registry.register(name, write_adapter(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a", "org/model-v1.2", "mit Leerzeichen", "ключ", "x" * 256])
def test_ordinary_name_is_accepted(registry: AdapterRegistry, tmp_path: Path, name: str) -> None:
    registry.register(name, write_adapter(tmp_path / "a"))
    assert registry.get(name).name == name


def test_registry_of_another_base_model_is_refused(registry: AdapterRegistry) -> None:
    with pytest.raises(ValueError, match="another base model"):
        open_registry(registry.state_dir, shapes=BaseShapes(SHAPES.num_layers + 1, SHAPES.sizes))
    with pytest.raises(ValueError, match="float16"):
        open_registry(registry.state_dir, dtype="float16")


# --- directories ---


def test_directory_registers_what_can_be_and_reports_the_rest(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / "all" / name)
    write_adapter(tmp_path / "all" / "bad", r=0)
    (tmp_path / "all" / "not-an-adapter").mkdir()
    report = registry.register_directory(tmp_path / "all")
    assert [record.name for record in report.registered] == ["a", "b"]
    assert list(report.failures) == ["bad"]
    assert [record.name for record in registry.list()] == ["a", "b"]
    assert len(packed_files(registry)) == 2


def test_unchanged_directory_is_skipped_and_changed_one_registered_again(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / "all" / name)
    registry.register_directory(tmp_path / "all")
    before = registry.get("a")
    write_adapter(tmp_path / "all" / "b", rank=9)
    report = registry.register_directory(tmp_path / "all")
    assert (report.num_unchanged, [record.name for record in report.registered]) == (1, ["b"])
    assert (registry.get("a"), registry.get("b").rank) == (before, 9)


def test_missing_directory_is_an_error(registry: AdapterRegistry, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="none"):
        registry.register_directory(tmp_path / "none")


def test_what_utf8_cannot_write_is_refused_by_name_and_the_rest_registered(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    for name in ("a", "z"):
        write_adapter(tmp_path / "all" / name)
    write_adapter(tmp_path / "all" / "half", base_model_name_or_path="a\ud800b")
    write_adapter(tmp_path / "all" / os.fsdecode(b"odd\xff"))
    report = registry.register_directory(tmp_path / "all")
    assert [record.name for record in report.registered] == ["a", "z"]
    assert "base_model_name_or_path is no valid Unicode" in str(report.failures.pop("half"))
    [error] = report.failures.values()
    assert "odd" in str(error)
    report.log()


def test_a_path_that_utf8_cannot_write_is_refused_by_name(registry: AdapterRegistry, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / os.fsdecode(b"caf\xe9") / "a")
    with pytest.raises(AdapterError, match=r"caf\\udce9.*half of a surrogate pair"):
        registry.register("a", path)
    report = registry.register_directory(path.parent)
    assert (report.registered, list(report.failures)) == ([], ["a"])
    assert packed_files(registry) == []


# --- damage ---


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "fifo"])
def test_damaged_packed_file_is_made_again(registry: AdapterRegistry, tmp_path: Path, damage: str) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    file = Path(record.packed_path)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(content[:100] if damage == "short" else b"?" * len(content))
    registry.open_packed(record.adapter_id).close()
    assert file.read_bytes() == content


def test_packed_file_whose_place_is_taken_leaves_no_temporary_one(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    file = Path(record.packed_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(StateError, match="cannot keep the packed file"):
        registry.open_packed(record.adapter_id)
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_damaged_packed_file_with_a_changed_source_is_an_error(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    write_adapter(tmp_path / "a", rank=9)
    Path(record.packed_path).unlink()
    with pytest.raises(AdapterError, match="has changed since"):
        registry.open_packed(record.adapter_id)
    assert packed_files(registry) == []


def test_vanished_source_does_not_matter_while_the_packed_file_is_whole(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    record = registry.register("a", write_adapter(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    registry.open_packed(record.adapter_id).close()


def test_clean_up_deletes_removed_adapters_and_leftovers(registry: AdapterRegistry, tmp_path: Path) -> None:
    kept = registry.register("kept", write_adapter(tmp_path / "a"))
    registry.register("gone", tmp_path / "a")
    registry.remove("gone")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = registry.state_dir / "packed"
    (leftovers / f"{dead.pid}-abc.tmp").touch()
    (leftovers / f"{os.getpid()}-abc.tmp").touch()
    (leftovers / "77.pack").touch()
    registry.clean_up()
    assert packed_files(registry) == sorted([f"{kept.adapter_id}.pack", f"{os.getpid()}-abc.tmp"])


def test_the_only_writer_keeps_no_file_of_anybody_who_seems_to_be_writing(tmp_path: Path) -> None:
    """In a container the number of the server that left it is that of the one which finds it."""
    lock = StateLock.take(tmp_path, "a test")
    registry = AdapterRegistry(tmp_path, "tiny", SHAPES, "float32", lock=lock)
    (tmp_path / "packed" / f"{os.getpid()}-abc.tmp").touch()
    registry.clean_up()
    assert packed_files(registry) == []
    registry.close()


# --- crashes and concurrency ---

_REGISTER_FOR_EVER = """
import sys
from pathlib import Path
from tests.adapters.fixtures import open_registry
registry = open_registry(Path(sys.argv[1]))
i = 0
while True:
    registry.register(f"a{i % 5}", Path(sys.argv[2]), replace=True)
    i += 1
"""


def test_registry_is_whole_after_kill_9_at_any_moment(registry: AdapterRegistry, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    registry.close()
    seen: set[int] = set()
    for pause in (0.003, 0.011, 0.02):
        args = [sys.executable, "-c", _REGISTER_FOR_EVER, str(registry.state_dir), str(tmp_path / "a")]
        writer = subprocess.Popen(args, env={**os.environ, WARM: "0"})
        survivor = open_registry(registry.state_dir)
        while not (set(survivor.live_ids()) - seen):
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for record in survivor.list():
            assert check_packed(record.packed_path).digest == record.digest
        seen |= set(survivor.live_ids())
        fresh = survivor.register("fresh", tmp_path / "a", replace=True)
        assert fresh.adapter_id > max(seen)
        survivor.clean_up()
        assert packed_files(survivor) == sorted(f"{i}.pack" for i in survivor.live_ids())
        survivor.close()


def test_many_threads_may_register_look_up_and_remove(registry: AdapterRegistry, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")

    def churn(thread: int) -> None:
        for i in range(8):
            name = f"{thread}-{i}"
            record = registry.register(name, path)
            assert registry.get(name) == record
            if i % 2:
                registry.purge(registry.remove(name).adapter_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert registry.count() == 16
    assert packed_files(registry) == sorted(f"{i}.pack" for i in registry.live_ids())


def test_one_of_several_threads_wins_a_name(registry: AdapterRegistry, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")

    def try_register(_: int) -> bool:
        try:
            registry.register("same", path)
        except AdapterExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(try_register, range(8))) == 1
    assert len(packed_files(registry)) == 1
