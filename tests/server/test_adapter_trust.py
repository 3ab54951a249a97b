"""Adapter administration that meets odd names, small pools, races, and a disk that does not do."""

import asyncio
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.server.conftest import Server
from tests.waiting import PATIENCE_S, until
from toppings.adapters import database
from toppings.adapters.capacity import Capacity
from toppings.adapters.errors import StateFullError
from toppings.adapters.layout import BaseShapes
from toppings.adapters.packed_dir import PackedDir
from toppings.adapters.records import AdapterRecord
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.state_lock import StateLock
from toppings.core import MODULES
from toppings.engine.client import EngineDeadError
from toppings.synth import AdapterShape, projection_sizes, write_adapters

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def settings(tmp_path: Path, adapters_dir: Path) -> dict[str, object]:
    return {"adapter_roots": [str(tmp_path), str(adapters_dir)]}


@pytest.fixture
def registry(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterRegistry]:
    """As the server's: its only writer, with bounds."""
    monkeypatch.setattr(database, "LOCK_WAIT_S", 0.2)
    sizes, num_layers = projection_sizes(model_dir)
    shapes = BaseShapes(num_layers, tuple(sizes[name] for name in MODULES))
    lock = StateLock.take(tmp_path / "state", "a test")
    capacity = Capacity(20_000, 10**9)
    registry = AdapterRegistry(tmp_path / "state", "base", shapes, "float32", capacity=capacity, lock=lock)
    yield registry
    registry.close()


async def load(server: Server, name: str, path: object = "adapter-00000", **more: object) -> tuple[int, str]:
    reply = await server.post(LOAD, lora_name=name, lora_path=str(path), **more)
    return reply.status_code, reply.text


def make_adapter(path: Path, model_dir: Path, rank: int, **config: object) -> Path:
    write_adapters(path, model_dir, AdapterShape(ranks=(rank,)), count=1)
    file = path / "adapter-00000" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return file.parent


# --- names ---


@pytest.mark.parametrize("name", ["base", "Base", "__base_model__"])
async def test_a_name_of_the_base_model_is_refused_in_vllms_words(server: Server, name: str) -> None:
    status, text = await load(server, name)
    assert status == 400
    assert (
        json.loads(text)["error"]["message"]
        == f"The lora adapter '{name}' conflicts with a served base model."
    )


@pytest.mark.parametrize("name", ["a/pin", "a/prefetch", "../a", "a//b", "/a"])
async def test_a_name_that_would_break_routes_is_refused(server: Server, name: str) -> None:
    status, text = await load(server, name)
    assert status == 400
    assert "not allowed" in text


@pytest.mark.parametrize("name", ["pin", "org/name", "pin/a", "a?b", "a%2Fb", "a#b", "mit Blank", "ключ"])
async def test_every_route_takes_every_name_that_is_allowed(server: Server, name: str) -> None:
    path = quote(name, safe="/")
    assert (await load(server, name))[0] == 200
    assert (await server.http.get(f"/v1/models/{path}")).json()["id"] == name
    assert (await server.complete(model=name)).json()["model"] == name
    reply = await server.post("/generate", inputs="hi", parameters={"adapter_id": name})
    assert reply.status_code == 200
    assert (await server.http.post(f"/adapters/{path}/pin")).json() == {"name": name, "is_pinned": True}
    assert (await server.http.delete(f"/adapters/{path}/pin")).json() == {"name": name, "is_pinned": False}
    assert (await server.http.post(f"/adapters/{path}/prefetch")).json() == {"name": name}
    assert [row["name"] for row in (await server.http.get("/adapters")).json()["adapters"]] == [name]
    assert (await server.http.delete(f"/adapters/{path}")).status_code == 200
    assert server.registry.count() == 0


# --- another base model ---


async def test_an_adapter_of_another_base_is_loaded_with_a_warning(
    server: Server, tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_adapter(tmp_path / "other", model_dir, 4, base_model_name_or_path="org/other")
    status, text = await load(server, "a", path)
    doubt = "adapter 'a' says that it was trained on 'org/other'; the base model here is 'base'"
    expected = f"Success: LoRA adapter 'a' added successfully.\nWarning: {doubt}"
    assert (status, text) == (200, expected)
    assert doubt in caplog.text
    reply = await server.post("/load_lora_adapter", lora_name="b", lora_path=str(path))
    assert reply.json()["warning"] == doubt.replace("'a'", "'b'")


async def test_an_adapter_of_this_base_is_loaded_without(
    server: Server, tmp_path: Path, model_dir: Path
) -> None:
    path = make_adapter(tmp_path / "same", model_dir, 4, base_model_name_or_path="org/BASE")
    assert await load(server, "a", path) == (200, "Success: LoRA adapter 'a' added successfully.")


# --- room ---


async def test_an_adapter_larger_than_the_pool_is_refused_with_the_sizes(
    server: Server, tmp_path: Path, model_dir: Path
) -> None:
    status, text = await load(server, "huge", make_adapter(tmp_path / "huge", model_dir, 64))
    assert status == 400
    assert "the device pool has 20000 (device_pool_bytes)" in text
    assert (server.registry.count(), list((server.registry.state_dir / "packed").iterdir())) == (0, [])


async def test_a_pin_that_would_starve_another_adapter_is_refused_with_both_named(
    server: Server, tmp_path: Path, model_dir: Path
) -> None:
    for name in ("one", "other"):
        assert (await load(server, name, make_adapter(tmp_path / name, model_dir, 8)))[0] == 200
    reply = await server.http.post("/adapters/one/pin")
    assert reply.status_code == 400
    assert "pinning 'one'" in reply.text
    assert "too few for adapter 'other'" in reply.text
    assert (server.engine.pinned, server.registry.get("one").is_pinned) == ({}, False)


async def test_an_adapter_that_pinned_ones_leave_no_room_for_is_refused_with_them_named(
    server: Server, tmp_path: Path, model_dir: Path
) -> None:
    await load(server, "one", make_adapter(tmp_path / "one", model_dir, 8))
    assert (await server.http.post("/adapters/one/pin")).status_code == 200
    status, text = await load(server, "other", make_adapter(tmp_path / "other", model_dir, 8))
    assert status == 400
    assert "belong to 'one', pinned" in text


async def test_sglangs_pinned_load_that_cannot_be_pinned_leaves_nothing(server: Server) -> None:
    server.engine.pin_error = "no room"
    body = {"lora_name": "a", "lora_path": "adapter-00000", "pinned": True}
    assert (await server.post("/load_lora_adapter", **body)).status_code == 400
    assert server.registry.count() == 0


async def test_a_pinned_adapter_that_is_reloaded_is_pinned_in_the_engine_too(server: Server) -> None:
    await load(server, "a")
    await server.http.post("/adapters/a/pin")
    old_id = server.registry.get("a").adapter_id
    assert (await load(server, "a", "adapter-00000", load_inplace=True))[0] == 200
    new = server.registry.get("a")
    assert new.is_pinned
    assert server.engine.pinned == {old_id: False, new.adapter_id: True}


async def test_a_pinned_adapter_is_reloaded_while_the_engine_is_replaced(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done: the next engine reads in the registry what is pinned. The old generation goes, too."""
    await load(server, "a")
    await server.http.post("/adapters/a/pin")
    old_id = server.registry.get("a").adapter_id

    async def die(*_: object) -> None:
        raise EngineDeadError("the engine is restarting")

    monkeypatch.setattr(server.engine, "pin_adapter", die)
    assert (await load(server, "a", "adapter-00000", load_inplace=True))[0] == 200
    assert server.registry.get("a").is_pinned
    await until(lambda: old_id in server.engine.removed)


async def test_a_directory_that_does_not_answer_holds_up_its_own_request_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    is_dir = Path.is_dir

    def hang(path: Path, **more: Any) -> bool:
        assert answers.wait(PATIENCE_S)
        return is_dir(path, **more)

    monkeypatch.setattr(Path, "is_dir", hang)
    loading = asyncio.create_task(load(server, "a"))
    assert (await server.complete()).status_code == 200
    assert not loading.done()
    answers.set()
    assert (await loading)[0] == 200


async def test_a_reload_that_can_no_longer_be_pinned_says_so_everywhere(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await load(server, "a")
    await server.http.post("/adapters/a/pin")
    server.engine.pin_error = "no room"
    assert (await load(server, "a", "adapter-00000", load_inplace=True))[0] == 200
    assert not server.registry.get("a").is_pinned
    assert "adapter a is no longer pinned: no room" in caplog.text


# --- races ---


async def test_one_of_many_unloads_is_200_and_the_others_404(server: Server) -> None:
    await load(server, "a")
    replies = await asyncio.gather(*(server.post(UNLOAD, lora_name="a") for _ in range(16)))
    assert Counter(reply.status_code for reply in replies) == {200: 1, 404: 15}


async def test_one_of_many_loads_is_200_and_the_others_say_it_is_there(server: Server) -> None:
    replies = await asyncio.gather(*(load(server, "a") for _ in range(8)))
    assert Counter(status for status, _ in replies) == {200: 1, 400: 7}
    assert all("already been loaded" in text for status, text in replies if status == 400)


async def test_loads_unloads_and_pins_at_once_answer_only_what_they_may(server: Server) -> None:
    async def churn(i: int) -> set[int]:
        replies = [
            await server.post(LOAD, lora_name="a", lora_path="adapter-00000", load_inplace=bool(i % 2)),
            await server.http.post("/adapters/a/pin"),
            await server.complete(model="a"),
            await server.post(UNLOAD, lora_name="a"),
        ]
        return {reply.status_code for reply in replies}

    statuses = set().union(*await asyncio.gather(*(churn(i) for i in range(12))))
    assert statuses <= {200, 400, 404}
    server.registry.register_directory(None)
    packed = {int(file.stem) for file in (server.registry.state_dir / "packed").iterdir()}
    assert packed == set(server.registry.live_ids())


# --- disk ---


@pytest.fixture
async def locked(server: Server, registry: AdapterRegistry) -> "Iterator[Server]":  # type: ignore[misc]
    await load(server, "a")
    with closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield server
        other.execute("ROLLBACK")


async def test_a_locked_registry_holds_up_no_request(
    server: Server, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(server, "a")
    for name in ("LOCK_WAIT_S", "TURN_WAIT_S"):
        monkeypatch.setattr(database, name, PATIENCE_S)
    with closing(sqlite3.connect(registry.state_dir / "registry.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        unloads = [asyncio.create_task(server.post(UNLOAD, lora_name="a")) for _ in range(12)]
        await asyncio.sleep(0.01)
        for model in ("a", "base") * 4:
            assert (await server.complete(model=model)).status_code == 200
        assert not any(unload.done() for unload in unloads)
        other.execute("ROLLBACK")
        assert sorted([(await unload).status_code for unload in unloads]) == [200] + [404] * 11


async def test_a_locked_registry_is_503_with_the_reason(locked: Server) -> None:
    replies = [
        await locked.post(LOAD, lora_name="b", lora_path="adapter-00000"),
        await locked.post(UNLOAD, lora_name="a"),
        await locked.http.post("/adapters/a/pin"),
        await locked.post("/unload_lora_adapter", lora_name="a"),
    ]
    assert [reply.status_code for reply in replies] == [503] * 4
    assert all("locked by another process" in reply.text for reply in replies)
    assert locked.engine.pinned == {locked.registry.get("a").adapter_id: False}  # the pin was taken back
    assert [record.name for record in locked.registry.list()] == ["a"]


async def test_a_queue_of_loads_is_told_of_a_lock_as_soon_as_the_first(
    locked: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first has packed its adapter, for nothing."""
    num_packed = 0
    pack = PackedDir.pack

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal num_packed
        num_packed += 1
        return pack(*arguments, **more)

    monkeypatch.setattr(PackedDir, "pack", counted)
    answers = await asyncio.gather(*(load(locked, f"b{i}") for i in range(12)))
    assert {status for status, _ in answers} == {503}
    assert all("locked by another process" in text for _, text in answers)
    assert num_packed == 1
    assert (await load(locked, "later"))[0] == 503
    assert num_packed == 2


async def test_a_full_disk_is_507_with_the_reason(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toppings.adapters.packed_dir.pack_adapter", refuse)
    status, text = await load(server, "a")
    assert (status, json.loads(text)["error"]["type"]) == (507, "InsufficientStorageError")
    assert "No space left on device" in text
    reply = await server.post("/load_lora_adapter", lora_name="a", lora_path="adapter-00000")
    assert (reply.status_code, reply.json()["success"]) == (507, False)
    assert server.registry.count() == 0


async def test_an_unload_whose_file_cannot_be_deleted_is_done_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StateFullError("read-only")

    monkeypatch.setattr(PackedDir, "delete", refuse)
    await load(server, "a")
    assert (await server.post(UNLOAD, lora_name="a")).status_code == 200
    assert (await server.complete(model="a")).status_code == 404
    assert "stay until the next start" in caplog.text


async def test_an_adapter_that_may_not_be_entered_is_400_with_the_reason(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("toppings.adapters.packed_dir.read_checkpoint", refuse)
    status, text = await load(server, "a")
    assert status == 400
    assert "Permission denied" in text


# --- many ---


class LoopWatch:
    """How often the event loop had a turn for others."""

    def __init__(self) -> None:
        self.num_turns = 0

    async def __aenter__(self) -> "LoopWatch":
        self._task = asyncio.create_task(self._run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.num_turns += 1


@pytest.fixture
def many(registry: AdapterRegistry, adapters_dir: Path) -> AdapterRegistry:
    """Ten thousand rows of one adapter."""
    record = registry.register("a", adapters_dir / "adapter-00000")
    with registry._rows.change() as change:
        for i in range(10_000):
            change.insert({**_columns(record), "name": f"adapter-{i:05}"}, replace=False)
    return registry


def _columns(record: AdapterRecord) -> dict[str, object]:
    return {
        **vars(record),
        "targets": ",".join(record.targets),
        "invocation_tokens": "",
        "merge": "",
        "vocabulary": "",
    }


@pytest.mark.parametrize("route", ["/v1/models", "/adapters"])
async def test_ten_thousand_adapters_are_listed_without_holding_the_loop(
    many: AdapterRegistry, server: Server, route: str
) -> None:
    """They would be 50 to 150 ms in one piece; each of these is less than a hundredth of it."""
    async with LoopWatch() as watch:
        reply = await server.http.get(route)
    assert len(reply.json().get("data") or reply.json()["adapters"]) >= 10_001
    assert watch.num_turns > 100


async def test_listed_models_are_encoded_once(
    many: AdapterRegistry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (await server.http.get("/v1/models")).content
    monkeypatch.setattr("toppings.server.catalogue.adapter_card", None)
    assert (await server.http.get("/v1/models")).content == first
    many.remove("a")
    names = [card["id"] for card in (await server.http.get("/v1/models")).json()["data"]]
    assert names == ["base", *(f"adapter-{i:05}" for i in range(10_000))]


async def test_no_dialect_lists_the_adapters_to_find_one(
    many: AdapterRegistry, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterRegistry, "list", None)
    path = many.get("a").path
    for body in (
        {"inputs": "hi", "parameters": {"adapter_id": "adapter-00042"}},
        {"inputs": "hi", "parameters": {}, "lora_dir": "adapter-00042"},
        {"inputs": "hi", "parameters": {}, "lora_dir": path},
    ):
        assert (await server.post("/generate", **body)).status_code == 200
