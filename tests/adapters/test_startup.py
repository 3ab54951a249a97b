"""What start-up options add to a registry, and what they take away."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.fixtures import SHAPES, write_adapter
from toppings.adapters.capacity import Capacity
from toppings.adapters.directories import find_adapters
from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.registry import AdapterRegistry, Origin
from toppings.adapters.state_lock import StateLock

SMALL_BYTES = 2 * 3 * 4 * 64 * 4  # more than an adapter of rank 4 on one projection takes


@pytest.fixture(params=[True, False], ids=["owner", "shared"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterRegistry]:
    """In memory and in SQLite alike."""
    lock = StateLock.take(tmp_path / "state", "a test", is_shared=not request.param)
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32", lock=lock)
    yield registry
    registry.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_adapter(tmp_path / "all" / name)
    return tmp_path / "all"


def names(registry: AdapterRegistry) -> list[str]:
    return [record.name for record in registry.list()]


def test_an_adapter_that_is_gone_from_the_directory_is_removed(
    registry: AdapterRegistry, directory: Path
) -> None:
    registry.register_directory(directory)
    shutil.rmtree(directory / "b")
    report = registry.register_directory(directory)
    assert (names(registry), [record.name for record in report.removed]) == (["a"], ["b"])


@pytest.mark.parametrize("other", [None, "other"])
def test_other_start_up_options_replace_those_before(
    registry: AdapterRegistry, directory: Path, tmp_path: Path, other: str | None
) -> None:
    registry.register_directory(directory)
    write_adapter(tmp_path / "other" / "c")
    registry.register_directory(None if other is None else tmp_path / other)
    assert names(registry) == ([] if other is None else ["c"])


def test_a_broken_adapter_is_no_longer_served(registry: AdapterRegistry, directory: Path) -> None:
    registry.register_directory(directory)
    (directory / "b" / "adapter_model.safetensors").write_bytes(b"12345")
    report = registry.register_directory(directory)
    assert (names(registry), list(report.failures)) == (["a"], ["b"])


@pytest.mark.parametrize("origin", [Origin.HTTP, Origin.CLI, Origin.LIBRARY])
def test_an_adapter_that_came_otherwise_stays(
    registry: AdapterRegistry, directory: Path, tmp_path: Path, origin: Origin
) -> None:
    kept = registry.register("kept", write_adapter(tmp_path / "kept"), origin=origin)
    shutil.rmtree(tmp_path / "kept")
    registry.register_directory(directory)
    registry.register_directory(None)
    assert registry.list() == [kept]


def test_start_up_options_win_a_name_and_say_so(
    registry: AdapterRegistry, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register("a", write_adapter(tmp_path / "elsewhere", rank=9), origin=Origin.HTTP)
    registry.register_directory(directory).log()
    assert (registry.get("a").rank, registry.get("a").origin) == (4, Origin.STARTUP)
    assert "adapter a, which was loaded while a server ran, gives way" in caplog.text


def test_an_unchanged_adapter_becomes_the_start_up_options_own(
    registry: AdapterRegistry, directory: Path
) -> None:
    loaded = registry.register("a", directory / "a", origin=Origin.HTTP)
    registry.register_directory(directory)
    assert registry.get("a").adapter_id == loaded.adapter_id
    registry.register_directory(None)
    assert names(registry) == []


def test_an_adapter_named_like_the_base_is_left_out(
    registry: AdapterRegistry, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(directory / "BASE")
    registry.register_directory(directory).log()
    assert names(registry) == ["a", "b"]
    assert "adapter BASE is left out" in caplog.text


def test_an_adapter_whose_name_the_base_has_now_is_left_out(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32")
    registry.register("renamed", write_adapter(tmp_path / "a"))
    registry.close()
    registry = AdapterRegistry(tmp_path / "state", "renamed", SHAPES, "float32")
    assert list(registry.register_directory(None).failures) == ["renamed"]
    assert names(registry) == []


def test_an_adapter_larger_than_the_pool_is_left_out_with_the_sizes(tmp_path: Path, directory: Path) -> None:
    registry = AdapterRegistry(
        tmp_path / "state", "base", SHAPES, "float32", capacity=Capacity(SMALL_BYTES, SMALL_BYTES)
    )
    write_adapter(directory / "huge", rank=400)
    report = registry.register_directory(directory)
    assert names(registry) == ["a", "b"]
    assert f"{SMALL_BYTES} (device_pool_bytes)" in str(report.failures["huge"])


def test_a_pool_that_was_made_smaller_leaves_out_what_no_longer_fits(tmp_path: Path, directory: Path) -> None:
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32")
    registry.register_directory(directory)
    registry.close()
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32", capacity=Capacity(64, 64))
    assert sorted(registry.register_directory(directory).failures) == ["a", "b"]
    assert names(registry) == []


def test_one_line_says_which_adapters_name_another_base(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("c", "d"):
        write_adapter(directory / name, base_model_name_or_path="org/other")
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32")
    registry.register_directory(directory).log()
    assert "2 adapters (c, d) say that they were trained on 'org/other'" in caplog.text
    assert names(registry) == ["a", "b", "c", "d"]


def test_a_strict_base_leaves_them_out(tmp_path: Path, directory: Path) -> None:
    write_adapter(directory / "c", base_model_name_or_path="org/other")
    write_adapter(directory / "d", base_model_name_or_path="org/Base")
    registry = AdapterRegistry(tmp_path / "state", "base", SHAPES, "float32", is_strict=True)
    assert list(registry.register_directory(directory).failures) == ["c"]
    assert names(registry) == ["a", "b", "d"]


# --- which adapters a directory holds ---


def test_a_directory_that_is_an_adapter_has_that_one(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one")
    write_adapter(path / "checkpoint-100")
    assert find_adapters(path) == ({"one": str(path)}, {})


def test_adapters_of_an_organisation_have_its_name_before_theirs(directory: Path) -> None:
    path = write_adapter(directory / "org" / "c")
    found, failures = find_adapters(directory)
    assert (sorted(found), found["org/c"], failures) == (["a", "b", "org/c"], str(path), {})


def test_weights_without_a_configuration_and_dead_links_are_named(directory: Path) -> None:
    (write_adapter(directory / "bare") / "adapter_config.json").unlink()
    (directory / "gone").symlink_to(directory / "nowhere")
    (directory / ".hidden").mkdir()
    (directory / "notes.txt").touch()
    found, failures = find_adapters(directory)
    assert (sorted(found), sorted(failures)) == (["a", "b"], ["bare", "gone"])
    assert "adapter_config.json is missing" in str(failures["bare"])


def test_a_directory_that_may_not_be_entered_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who is not root, whom permissions bind."""
    stat = os.stat

    def refuse(path: str, **options: object) -> os.stat_result:
        if str(path).startswith(f"{directory}/b/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refuse)
    found, failures = find_adapters(directory)
    assert list(found) == ["a"]
    assert str(failures["b"]) == f"cannot read adapter {directory}/b: Permission denied"


def test_a_directory_without_any_adapter_is_said_to_have_none(
    registry: AdapterRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        registry.register_directory(tmp_path / "empty").log()
    assert f"no adapters in {tmp_path / 'empty'}" in caplog.text


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="none"):
        find_adapters(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError):
        find_adapters(tmp_path / "file")
