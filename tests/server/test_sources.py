"""Adapters that come when a request first names them, from a directory, a hub and a web server."""

import asyncio
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.sources.hub_server import Hub
from tests.waiting import PATIENCE_S, until
from tests.warm import WARM
from toppings.adapters import packed_dir
from toppings.adapters.records import Origin
from toppings.adapters.registry import AdapterRegistry
from toppings.config import Config, ConfigError, ServerConfig
from toppings.server import lookups
from toppings.server.errors import ApiError
from toppings.server.resolver import drop_unconfigured
from toppings.server.source_cache import SourceCache
from toppings.sources.adapters import FETCHED, Found, parse_source
from toppings.sources.fetch import FetchError, Room

LOAD = "/v1/load_lora_adapter"
MAX_BYTES = 1_000_000


@pytest.fixture
def folder(tmp_path: Path, adapters_dir: Path) -> Path:
    return shutil.copytree(adapters_dir, tmp_path / "many")


@pytest.fixture
def settings(hub: Hub, folder: Path) -> dict[str, object]:
    return {
        "adapter_source": [f"dir:{folder}", "hub:org/*", f"{hub.url}/org,*-web"],
        "source_max_bytes": MAX_BYTES,
        "source_timeout_s": PATIENCE_S,
        "source_refresh_s": 1e-6,
    }


def repository(hub: Hub, name: str, adapters_dir: Path) -> Path:
    path: Path = shutil.copytree(adapters_dir / "adapter-00000", hub.root / "org" / name)
    return path


def left_behind(server: Server) -> list[Path]:
    """Files of fetches, and packed files that belong to no adapter."""
    state = server.registry.state_dir
    packed = {f"{adapter_id}.pack" for adapter_id in server.registry.live_ids()}
    fetching = state / FETCHED
    parts = list(fetching.rglob("*")) if fetching.exists() else []
    return [*parts, *(path for path in (state / "packed").iterdir() if path.name not in packed)]


async def test_a_directory_is_asked_when_a_request_names_what_it_holds(server: Server, folder: Path) -> None:
    assert (await server.http.get("/v1/models")).json()["data"][1:] == []
    for model, status in (("adapter-00001", 200), ("adapter-00001", 200), ("adapter-00009", 404)):
        assert (await server.complete(model=model)).status_code == status
    record = server.registry.get("adapter-00001")
    assert record.origin is Origin.SOURCE
    assert record.path.startswith(f"dir:{folder}/adapter-00001@")
    assert server.registry.count() == 1
    chat = {"model": "adapter-00002", "messages": [{"role": "user", "content": "hello"}]}
    assert (await server.post("/v1/chat/completions", **chat)).status_code in (200, 400)  # or no template
    assert server.registry.count() == 2
    generate = {"inputs": "hello", "lora_dir": "adapter-00000", "parameters": {"max_new_tokens": 2}}
    assert (await server.post("/generate", **generate)).status_code == 200
    assert server.registry.count() == 3


def test_a_directory_is_never_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the directory was listed")

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    source = parse_source(f"dir:{folder}")
    assert source.find("adapter-00000").path == folder / "adapter-00000"


async def test_no_client_is_told_where_the_server_keeps_what(
    server: Server, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (hub.root / "org/two/adapter_model.safetensors").write_bytes(b"no safetensors")
    (folder / "adapter-00001/adapter_config.json").write_text("[]")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "outside").symlink_to(tmp_path)
    names = ("org/two", "adapter-00001", "circle", "outside", "none", "x" * 256)
    replies = [await server.complete(model=name) for name in names]
    assert [reply.status_code for reply in replies] == [400, 400, 502, 404, 404, 404]
    assert all(name in reply.text for name, reply in zip(names, replies, strict=True))
    loaded = await server.post(LOAD, lora_name="mine", lora_path="org/two")
    assert "adapter mine: adapter_model.safetensors" in loaded.text
    monkeypatch.setattr(packed_dir, "pack_adapter", fail)
    replies.append(await server.complete(model="org/one"))
    assert (replies[-1].status_code, "Input/output error" in replies[-1].text) == (503, True)
    assert not any(str(tmp_path) in reply.text or FETCHED in reply.text for reply in (*replies, loaded))


@pytest.mark.parametrize("token", ["secret\n", "sec ret", "secreté"])
async def test_a_token_that_fits_no_header_is_refused_and_not_repeated(server: Server, token: str) -> None:
    body = {"adapter_id": "org/one", "adapter_source": "hub", "api_token": token}
    reply = await server.post("/generate", inputs="hello", parameters=body)
    assert reply.status_code == 422  # LoRAX's word for 400
    assert "api_token" in reply.text
    assert "sec" not in reply.text


@pytest.mark.parametrize("name", ["../many/adapter-00000", "/adapter-00000", "a/../adapter-00000", ".hidden"])
async def test_names_that_are_paths_reach_no_source(server: Server, name: str) -> None:
    assert (await server.complete(model=name)).status_code == 404
    assert server.registry.count() == 0


async def test_links_out_of_the_directory_are_refused(
    server: Server, folder: Path, adapters_dir: Path
) -> None:
    (folder / "outside").symlink_to(adapters_dir / "adapter-00000")
    (folder / "inside").symlink_to(folder / "adapter-00000")
    shutil.copytree(folder / "adapter-00000", folder / "half")
    (folder / "half" / "adapter_model.safetensors").unlink()
    (folder / "half" / "adapter_model.safetensors").symlink_to(
        adapters_dir / "adapter-00000" / "adapter_model.safetensors"
    )
    for name in ("outside", "half"):
        reply = await server.complete(model=name)
        assert (reply.status_code, "leads out of" in reply.text) == (502, True)
    assert (await server.complete(model="inside")).status_code == 200


async def test_one_fetch_serves_all_who_ask_at_once(server: Server, hub: Hub) -> None:
    replies = await asyncio.gather(*(server.complete(model="org/one") for _ in range(50)))
    assert {reply.status_code for reply in replies} == {200}
    assert hub.num_fetched["org/one/adapter_model.safetensors"] == 1
    assert server.registry.get("org/one").path == f"hub:org/one@{hub.revision('org/one')}"
    assert left_behind(server) == []


async def test_only_what_an_adapter_needs_is_fetched(server: Server, hub: Hub) -> None:
    (hub.root / "org/one/train.py").write_text("raise SystemExit")
    (hub.root / "org/one/adapter_model.bin").write_bytes(pickle.dumps({}))
    assert (await server.complete(model="org/one")).status_code == 200
    assert {name.rpartition("/")[2] for name in hub.num_fetched} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


async def test_a_pickle_instead_of_safetensors_is_refused(server: Server, hub: Hub) -> None:
    weights = hub.root / "org/one/adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    reply = await server.complete(model="org/one")
    assert (reply.status_code, "never pickles" in reply.text) == (502, True)
    (hub.root / "org/two/adapter_model.safetensors").write_bytes(pickle.dumps([1] * 100))
    assert "safetensors is truncated or corrupt" in (await server.complete(model="org/two")).text
    assert left_behind(server) == []


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("elsewhere", "redirects elsewhere, to http://127.0.0.2:9"),
        ("short", "were announced"),
        ("cut", "adapter_model.safetensors"),
        ("endless", "goes on after"),
        ("slow", "has not come within 1 s"),
    ],
)
async def test_a_fetch_that_goes_wrong_is_said_and_leaves_nothing(
    server: Server, hub: Hub, fault: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults["org/one"] = fault
    limit_s = 1.0 if fault == "slow" else PATIENCE_S
    monkeypatch.setattr(server.state.resolver, "_config", _with(server, source_timeout_s=limit_s))
    reply = await server.complete(model="org/one")
    assert reply.status_code == 502
    assert problem in reply.text
    loaded = await server.post(LOAD, lora_name="mine", lora_path="org/one")
    assert loaded.status_code == 502
    assert problem in loaded.text
    assert left_behind(server) == []
    again = await server.complete(model="org/one")  # remembered
    assert again.text == reply.text
    assert hub.num_fetched["org/one/adapter_model.safetensors"] == 2
    monkeypatch.setattr(server.state.resolver, "_config", _with(server))
    assert (await server.complete(model="org/two")).status_code == 200


async def test_a_failure_is_forgotten_after_a_while(
    server: Server, hub: Hub, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "FAILURE_S", 0.01)
    assert (await server.complete(model="org/late")).status_code == 404
    repository(hub, "late", adapters_dir)
    await asyncio.sleep(0.02)
    assert (await server.complete(model="org/late")).status_code == 200


async def test_a_remembered_failure_holds_nobody_who_was_told(server: Server) -> None:
    asked = server.state.resolver
    assert asked is not None
    depths = []
    for _ in range(3):
        with pytest.raises(ApiError) as told:
            await asked.resolve("org/none")
        depths.append(len(traceback.extract_tb(told.value.__traceback__)))
    assert depths[1] == depths[2]
    [(_, remembered)] = asked._lookups._failures.values()
    assert (remembered.__traceback__, remembered.__cause__) == (None, None)


async def test_failures_are_forgotten_though_nobody_asks_for_them_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = server.state.resolver
    assert asked is not None
    monkeypatch.setattr(lookups, "FAILURE_S", 0.01)
    for i in range(3):
        assert (await server.complete(model=f"org/none-{i}")).status_code == 404
        await asyncio.sleep(0.02)
    assert len(asked._lookups._failures) == 1


async def test_two_dialects_that_bring_one_adapter_at_once_both_have_it(server: Server, hub: Hub) -> None:
    asked = server.state.resolver
    assert asked is not None
    found = await asyncio.gather(*(asked.resolve("org/one", kind=kind) for kind in (None, "hub")))
    ids = [None if record is None else record.adapter_id for record in found]
    assert ids == [server.registry.get("org/one").adapter_id] * 2  # when it was last checked may differ
    assert hub.num_fetched["org/one/adapter_model.safetensors"] == 1


async def test_what_was_unloaded_is_counted_no_longer(server: Server) -> None:
    asked = server.state.resolver
    assert asked is not None
    for name in ("adapter-00000", "adapter-00001"):
        assert (await server.complete(model=name)).status_code == 200
        assert (await server.post("/v1/unload_lora_adapter", lora_name=name)).status_code == 200
    assert (await server.complete(model="adapter-00002")).status_code == 200
    assert (list(asked._held), list(asked._checked)) == (["adapter-00002"], ["adapter-00002"])


async def test_patterns_say_who_may_be_asked_for(server: Server, hub: Hub, adapters_dir: Path) -> None:
    shutil.copytree(hub.root / "org/one", hub.root / "other/one")
    reply = await server.complete(model="other/one")
    assert reply.status_code == 404
    assert hub.num_fetched == {}


async def test_an_adapter_of_another_base_is_refused_by_name(
    server: Server, hub: Hub, adapters_dir: Path
) -> None:
    file = hub.root / "org/one/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "meta/llama-9"}))
    reply = await server.complete(model="org/one")
    assert reply.status_code == 400
    assert "trained on 'meta/llama-9'; the base model here is 'base'" in reply.text
    assert left_behind(server) == []


async def test_a_new_revision_is_a_new_generation(server: Server, hub: Hub, adapters_dir: Path) -> None:
    await server.complete(model="org/one")
    old = server.registry.get("org/one")
    shutil.copy(adapters_dir / "adapter-00001" / "adapter_model.safetensors", hub.root / "org/one")
    shutil.copy(adapters_dir / "adapter-00001" / "adapter_config.json", hub.root / "org/one")
    assert (await server.complete(model="org/one")).status_code == 200  # which looks for a new one
    await until(lambda: server.registry.get("org/one").adapter_id != old.adapter_id)
    new = server.registry.get("org/one")
    assert (old.rank, new.rank) == (4, 8)
    assert new.path.endswith(hub.revision("org/one"))


@pytest.mark.parametrize("is_gated", [False, True])
async def test_what_a_token_has_brought_is_for_those_whose_token_may_read_it(
    server: Server, hub: Hub, is_gated: bool
) -> None:
    hub.tokens["org/one"] = "sesame"
    if is_gated:
        hub.gated.add("org/one")

    async def ask(**parameters: object) -> int:
        body = {"adapter_id": "org/one", "adapter_source": "hub", "max_new_tokens": 2, **parameters}
        reply = await server.post("/generate", inputs="hello", parameters=body)
        return reply.status_code

    assert await ask() == (502 if is_gated else 424)  # as LoRAX says that there is none
    assert await ask(api_token="sesame") == 200
    assert await ask(api_token="wrong") == 403
    assert await ask() == 403
    assert (await server.complete(model="org/one")).status_code == 403
    assert await ask(api_token="sesame") == 200
    assert hub.num_fetched["org/one/adapter_model.safetensors"] == 1


async def test_another_source_that_has_the_name_grants_nothing(
    server: Server, hub: Hub, folder: Path, adapters_dir: Path
) -> None:
    hub.tokens["org/one"] = "sesame"
    body = {"adapter_id": "org/one", "adapter_source": "hub", "max_new_tokens": 2, "api_token": "sesame"}
    assert (await server.post("/generate", inputs="hello", parameters=body)).status_code == 200
    shutil.copytree(adapters_dir / "adapter-00000", folder / "org" / "one")
    asked = {"adapter_id": "org/one", "max_new_tokens": 2, "api_token": "wrong"}
    assert (await server.post("/generate", inputs="hello", parameters=asked)).status_code == 403


async def test_loraxs_sources_are_asked_alone(server: Server, hub: Hub) -> None:
    async def ask(name: str, source: str) -> int:
        body = {"adapter_id": name, "adapter_source": source, "max_new_tokens": 2}
        return (await server.post("/generate", inputs="hello", parameters=body)).status_code

    assert await ask("adapter-00000", "hub") == 424
    assert await ask("org/two", "local") == 424
    assert await ask("adapter-00000", "local") == 200
    assert await ask("org/two", "hub") == 200
    assert await ask("org/two", "pbase") == 422


@pytest.mark.parametrize("are_configured", [True, False])
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("hub:other/one@main", "start the server with --adapter-source 'hub:other/*'"),
        ("s3://bucket/loras/one", "start the server with --adapter-source 's3://bucket/loras'"),
        ("http://host/one", "start the server with --adapter-source 'http://host'"),
        ("hub:one", "hub:one is no repository of a hub; write hub:org/name"),
        ("s3://bucket", "s3://bucket names no adapter"),
        ("ftp://host/one", "ftp://host/one is no place of a source; one begins with hub:, s3://, "),
    ],
)
async def test_a_place_that_no_source_allows_is_told_what_would_allow_it(
    server: Server, place: str, reason: str, are_configured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not are_configured:
        monkeypatch.setattr(server.state, "resolver", None)
    reply = await server.post(LOAD, lora_name="x", lora_path=place)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "lora_path")
    assert reason in reply.json()["error"]["message"]


async def test_adapters_are_loaded_from_sources_by_their_place(server: Server, hub: Hub) -> None:
    for place, name in (("org/one", "bare"), ("hub:org/one", "spelt"), (f"{hub.url}/org/no-web", "none")):
        reply = await server.post(LOAD, lora_name=name, lora_path=place)
        assert reply.status_code == (404 if name == "none" else 200), reply.text
    record = server.registry.get("bare")
    assert (record.origin, record.path) == (Origin.HTTP, f"hub:org/one@{hub.revision('org/one')}")
    assert (await server.post(LOAD, lora_name="x", lora_path="other/one")).status_code == 404
    assert left_behind(server) == []


async def test_a_web_server_is_asked_for_the_files_by_name(
    server: Server, hub: Hub, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "main"
    path = repository(hub, "a-web", adapters_dir)
    source = parse_source(f"{hub.url}/org/a-web/resolve,{revision}")
    found = source.find(revision)
    assert found.where.startswith(f"{hub.url}/org/a-web/resolve/main@")
    (path / "adapter_config.json").write_text("{}")
    assert source.find(revision).where != found.where


async def test_a_web_server_that_wants_a_password_is_told_as_not_to_be_had(
    server: Server, hub: Hub, adapters_dir: Path
) -> None:
    repository(hub, "a-web", adapters_dir)
    hub.refused.add("org/a-web")
    with pytest.raises(FetchError, match=r"resolve/main/adapter_config\.json answers 401"):
        parse_source(f"{hub.url}/org/a-web/resolve,main").find("main")
    assert left_behind(server) == []


async def test_a_change_that_has_no_mark_is_seen(server: Server, hub: Hub, adapters_dir: Path) -> None:
    path = repository(hub, "a-web", adapters_dir)
    hub.untold.add("org/a-web")
    source = parse_source(f"{hub.url}/org/a-web/resolve,main")
    first = source.find("main")
    assert source.find("main").where == first.where
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert source.find("main").where != first.where


class Held:
    """What a source finds, held until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()
        bring = Found.bring

        def wait(found: Found, directory: Path, room: Room) -> Path:
            if found.where.startswith("hub:"):
                self.begun.set()
                self.let_go.wait(60.0)
            return bring(found, directory, room)

        monkeypatch.setattr(Found, "bring", wait)


@pytest.mark.parametrize("does_load", [True, False], ids=["loads", "unloads"])
async def test_a_refresh_undoes_nothing_that_a_client_did_meanwhile(
    server: Server, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, does_load: bool
) -> None:
    await server.complete(model="org/one")
    shutil.copy(folder / "adapter-00001" / "adapter_config.json", hub.root / "org/one")
    shutil.copy(folder / "adapter-00001" / "adapter_model.safetensors", hub.root / "org/one")
    held = Held(monkeypatch)
    assert (await server.complete(model="org/one")).status_code == 200
    await until(held.begun.is_set)
    if does_load:
        body = {"lora_name": "org/one", "lora_path": "adapter-00002", "load_inplace": True}
        assert (await server.post(LOAD, **body)).status_code == 200
    else:
        assert (await server.post("/v1/unload_lora_adapter", lora_name="org/one")).status_code == 200
    mine = server.registry.find_named("org/one")
    held.let_go.set()
    asked = server.state.resolver
    assert asked is not None
    await until(lambda: not asked._tasks)
    assert server.registry.find_named("org/one") == mine
    assert left_behind(server) == []


async def test_a_first_fetch_gives_way_to_what_a_client_loads_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    asking = asyncio.create_task(server.complete(model="org/one"))
    await until(held.begun.is_set)
    assert (await server.post(LOAD, lora_name="org/one", lora_path="adapter-00002")).status_code == 200
    mine = server.registry.get("org/one")
    held.let_go.set()
    assert (await asking).status_code == 200
    assert server.registry.get("org/one") == mine


FETCH = """
import sys
from pathlib import Path
from toppings.sources.adapters import fetch_place, parse_source
from toppings.sources.fetch import Room
with fetch_place(Path(sys.argv[2])) as part:
    parse_source(sys.argv[1]).find("main").bring(part, Room(10**9, 600.0))
"""


async def test_what_was_being_fetched_when_a_server_was_killed_goes_and_is_fetched_anew(
    server: Server, hub: Hub, adapters_dir: Path, config: Config
) -> None:
    repository(hub, "one-web", adapters_dir)
    hub.faults["org/one-web"] = "slow"
    state = server.registry.state_dir
    source = f"{hub.url}/org/one-web/resolve"
    environment = {**os.environ, WARM: "0"}
    fetching = subprocess.Popen([sys.executable, "-c", FETCH, source, str(state)], env=environment)
    await until(lambda: any(state.rglob("adapter_model.safetensors")))
    fetching.kill()
    fetching.wait()
    assert left_behind(server) != []
    hub.faults.clear()
    drop_unconfigured(server.registry, config.server)
    assert left_behind(server) == []
    assert (await server.complete(model="org/one")).status_code == 200


def test_a_directory_of_any_size_costs_the_same(
    folder: Path, registry: AdapterRegistry, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the system at a start and for a first request, with one adapter beside it and with
    thousands."""
    calls: list[str] = []

    def counted(name: str) -> None:
        call = getattr(os, name)

        def count(*args: object, **options: object) -> object:
            calls.append(name)
            return call(*args, **options)

        monkeypatch.setattr(os, name, count)

    for name in ("stat", "lstat", "readlink", "open", "scandir", "listdir"):
        counted(name)

    def ask() -> list[str]:
        calls.clear()
        source = parse_source(f"dir:{folder}")
        drop_unconfigured(registry, config.server)
        source.find("adapter-00000")
        return sorted(calls)

    few = ask()
    for i in range(3000):
        (folder / f"other-{i}").symlink_to("adapter-00001")
    assert ask() == few
    assert {"scandir", "listdir"}.isdisjoint(few)
    assert len(few) < 100


async def test_after_a_restart_those_that_came_first_leave_first(server: Server) -> None:
    for name in ("org/two", "adapter-00001", "org/one"):
        await server.complete(model=name)
    assert list(SourceCache(server.registry)) == ["org/two", "adapter-00001", "org/one"]


async def test_the_least_recently_asked_for_leaves(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 2 * 4 * 2 * (32 + 32) * 4  # bytes: about two adapters of rank 4 fit
    await server.complete(model="adapter-00000")
    num_bytes = server.registry.get("adapter-00000").num_bytes
    bounded = _with(server, source_cache_bytes=3 * num_bytes + one)
    monkeypatch.setattr(server.state.resolver, "_config", bounded)
    for name in ("adapter-00002", "adapter-00000", "org/one", "adapter-00000", "org/two"):
        assert (await server.complete(model=name)).status_code == 200
    await until(lambda: "adapter-00002" not in {record.name for record in server.registry.list()})
    names = {record.name for record in server.registry.list()}
    assert {"adapter-00000", "org/two"} <= names
    held = [r for r in server.registry.list() if r.origin is Origin.SOURCE]
    assert sum(record.num_bytes for record in held) <= 3 * num_bytes + one


def _with(server: Server, **settings: Any) -> ServerConfig:
    return replace(server.state.config.server, **settings)


def test_what_is_no_source_is_refused_by_name(tmp_path: Path) -> None:
    for text in ("ftp://x/y", "hub:", f"dir:{tmp_path}/none", "plain"):
        with pytest.raises(ConfigError, match="adapter_source"):
            parse_source(text)


async def test_adapters_go_with_their_source(server: Server, registry: AdapterRegistry) -> None:
    await server.complete(model="adapter-00000")
    await server.complete(model="org/one")
    drop_unconfigured(registry, Config.from_settings({"adapter_source": ["hub:org/*"]}).server)
    assert [record.name for record in registry.list()] == ["org/one"]
