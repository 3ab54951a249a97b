"""Sources that hang, go away or refuse: whom they keep waiting, and whom not."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.server.test_lifecycle import Running
from tests.sources.hub_server import Hub
from tests.waiting import until
from toppings.server import grants, lookups, resolver
from toppings.server.errors import ApiError
from toppings.server.lifecycle import listening_socket
from toppings.server.lookups import Lookups
from toppings.server.resolver import Resolver
from toppings.sources.adapters import Found, HubSource
from toppings.sources.fetch import FetchError, Room

LOAD = "/v1/load_lora_adapter"
WEIGHTS = "org/one/adapter_model.safetensors"


@pytest.fixture
def settings(hub: Hub, adapters_dir: Path) -> dict[str, object]:
    sources = [f"dir:{adapters_dir},adapter-*", "hub:org/*"]
    return {"adapter_source": sources, "max_queue": 4, "port": 0, "shutdown_timeout_s": 0.2}


class Hanging:
    """Calls that are let through once the test is over."""

    def __init__(self) -> None:
        self.num_calls, self.over = 0, threading.Event()

    def wait(self) -> None:
        self.num_calls += 1
        self.over.wait(60.0)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    hanging = Hanging()
    yield hanging
    hanging.over.set()


@pytest.fixture
def slow_hub(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> Hanging:
    """Whoever asks what it has waits."""
    find = HubSource.find

    def wait(self: HubSource, name: str, token: str | None = None) -> Found:
        hanging.wait()
        return find(self, name, token)

    monkeypatch.setattr(HubSource, "find", wait)
    return hanging


def resolver_of(server: Server) -> Resolver:
    assert server.state.resolver is not None
    return server.state.resolver


async def ended(tasks: "Sequence[asyncio.Task[Any]]", hanging: Hanging) -> None:
    hanging.over.set()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/generate"])
async def test_who_waits_for_a_source_has_no_place_in_the_queue(
    server: Server, slow_hub: Hanging, path: str
) -> None:
    chat: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    bodies: dict[str, dict[str, object]] = {
        "/v1/completions": {"prompt": "hi"},
        "/generate": {"inputs": "hi", "parameters": {"adapter_id": "org/one"}},
    }
    body = {"model": "org/one", **bodies.get(path, chat)}
    asking = [asyncio.create_task(server.post(path, **body)) for _ in range(8)]
    await until(lambda: server.state.num_open == 8)
    assert server.state.num_waiting == 0
    assert (await server.complete()).status_code == 200
    slow_hub.over.set()
    for reply in await asyncio.gather(*asking):
        assert reply.status_code in (200, 429), reply.text  # the queue's bound counts from now on
    assert server.state.num_open == 0


async def test_a_request_larger_than_the_queue_asks_no_source(server: Server, slow_hub: Hanging) -> None:
    assert (await server.complete(model="org/one", n=5)).status_code == 400
    assert slow_hub.num_calls == 0


async def test_slow_look_ups_and_fetches_keep_nothing_else_back(
    server: Server, hub: Hub, slow_hub: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"org/slow-{i}" for i in range(20)]
    asking = [asyncio.create_task(resolver_of(server).resolve(name)) for name in names]
    await until(lambda: slow_hub.num_calls == len(names))
    assert (await server.complete(model="adapter-00001")).status_code == 200
    await ended(asking, slow_hub)


async def test_downloads_that_trickle_keep_nothing_else_back(
    server: Server, hub: Hub, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring = Found.bring

    def wait(found: Found, directory: Path, room: Room) -> Path:
        if found.path is None:
            hanging.wait()
        return bring(found, directory, room)

    monkeypatch.setattr(Found, "bring", wait)
    loads = [asyncio.create_task(server.post(LOAD, lora_name=f"x{i}", lora_path="org/one")) for i in range(6)]
    await until(lambda: hanging.num_calls == resolver.FETCHES_AT_ONCE)
    assert (await server.complete(model="adapter-00001")).status_code == 200
    assert (await server.complete(model="org/none")).status_code == 404
    await ended(loads, hanging)
    assert [task.result().status_code for task in loads] == [200] * 6


class Looked:
    """A look-up that ends when it is told to."""

    def __init__(self) -> None:
        self.end, self.num = asyncio.Event(), 0

    async def look(self) -> str:
        self.num += 1
        await self.end.wait()
        return "found"


async def test_who_waits_is_bounded_in_all_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MAX_WAITING", 6)
    monkeypatch.setattr(lookups, "MAX_OF_NAME", 2)
    looked, several = Looked(), Lookups[str]()

    def ask(*key: str) -> "asyncio.Task[str]":
        return asyncio.create_task(several.once(key, looked.look))

    async def refused(*key: str) -> str:
        with pytest.raises(ApiError) as told:
            await several.once(key, looked.look)
        assert (told.value.status, told.value.headers) == (503, {"Retry-After": "1"})
        return told.value.message

    asking = [ask("a", "1"), ask("a", "2")]
    await asyncio.sleep(0)
    assert "too many ways" in await refused("a", "3")
    asking.append(ask("a", "1"))
    await asyncio.sleep(0)
    assert "wait for adapter 'a'" in await refused("a", "1")
    asking += [ask("b"), ask("b"), ask("c")]
    await asyncio.sleep(0)
    assert "wait for adapters" in await refused("d")
    looked.end.set()
    assert await asyncio.gather(*asking) == ["found"] * 6
    assert looked.num == 4
    assert await several.once(("d",), looked.look) == "found"


async def test_a_signal_ends_look_ups_and_fetches_with_503(
    server: Server, hub: Hub, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the threads that asked hang on: none of them is joined."""
    monkeypatch.setattr(HubSource, "find", lambda *_: hanging.wait())
    with listening_socket(server.state.config) as listener:
        running = Running(server, listener)
        asking = asyncio.create_task(running.post(model="org/one"))
        await until(lambda: hanging.num_calls == 1)
        running.stop.set()
        reply = await asking
        assert (reply.status_code, reply.headers.get("Retry-After")) == (503, "1"), reply.text
        assert "shutting down" in reply.text
        assert await running.task == 0
    threads = [each for each in threading.enumerate() if each.name.startswith("toppings-look")]
    assert threads
    assert all(thread.daemon for thread in threads)


async def test_a_download_is_given_up_at_a_signal_and_leaves_nothing(server: Server, hub: Hub) -> None:
    hub.faults["org/one"] = "slow"
    asking = asyncio.create_task(server.complete(model="org/one"))
    await until(lambda: hub.num_fetched[WEIGHTS] == 1)
    asked = resolver_of(server)
    [room] = asked._rooms
    asked.close()
    assert (await asking).status_code == 503
    await until(lambda: not asked._rooms and not asked._lookups._pending)
    with pytest.raises(FetchError, match="not wanted any more"):
        room.left_s("it")
    assert list((server.registry.state_dir / "fetching").rglob("*")) == []


# --- who may use what a token has brought ---


async def ask(server: Server, token: str) -> int:
    parameters = {"adapter_id": "org/one", "max_new_tokens": 2, "api_token": token}
    return (await server.post("/generate", inputs="hi", parameters=parameters)).status_code


class Counted:
    """Look-ups, which may go wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num, self.error = 0, ""
        find = HubSource.find

        def count(source: HubSource, name: str, token: str | None = None) -> Found:
            self.num += 1
            if self.error:
                raise FetchError(self.error)
            return find(source, name, token)

        monkeypatch.setattr(HubSource, "find", count)


async def test_a_wrong_token_is_asked_for_once(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["org/one"] = "sesame"
    assert await ask(server, "sesame") == 200
    counted = Counted(monkeypatch)
    assert set(await asyncio.gather(*(ask(server, "wrong") for _ in range(10)))) == {403}
    assert await ask(server, "wrong") == 403
    assert counted.num == 1


async def test_an_outage_of_the_hub_is_no_refusal_and_ends_no_grant(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["org/one"] = "sesame"
    assert await ask(server, "sesame") == 200
    counted = Counted(monkeypatch)
    counted.error = "org/one cannot be fetched: timed out"
    assert await ask(server, "other") == 502
    given = resolver_of(server)._grants._given
    [(key, (given_at, _))] = given.items()
    given[key] = (given_at, 0.0)  # it has to be asked for again
    num = counted.num
    assert [await ask(server, "sesame") for _ in range(2)] == [200, 200]
    assert counted.num == num + 1
    given[key] = (time.monotonic() - grants.OUTLIVES_S, 0.0)
    assert await ask(server, "sesame") == 502


async def test_a_grant_that_is_taken_back_ends(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["org/one"] = "sesame"
    assert await ask(server, "sesame") == 200
    hub.tokens["org/one"] = "another"
    given = resolver_of(server)._grants._given
    [(key, (given_at, _))] = given.items()
    given[key] = (given_at, 0.0)
    assert await ask(server, "sesame") == 403
    assert not given


# --- what a client has loaded from a source ---


@pytest.mark.parametrize(
    ("name", "told"), [("taken", "already been loaded"), ("a,b", "not allowed"), ("base", "base model")]
)
async def test_a_name_that_cannot_be_had_is_refused_before_anything_is_fetched(
    server: Server, hub: Hub, name: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await server.post(LOAD, lora_name="taken", lora_path="adapter-00001")).status_code == 200
    counted = Counted(monkeypatch)
    reply = await server.post(LOAD, lora_name=name, lora_path="hub:org/one")
    assert (reply.status_code, told in reply.text) == (400, True), reply.text
    assert (counted.num, hub.num_fetched) == (0, {})


async def test_loads_of_the_same_at_once_are_one_and_no_failure_is_remembered(
    server: Server, hub: Hub
) -> None:
    hub.faults["org/one"] = "short"
    body = {"lora_name": "mine", "lora_path": "hub:org/one"}
    assert (await server.post(LOAD, **body)).status_code == 502
    hub.faults.clear()
    before = hub.num_fetched[WEIGHTS]
    replies = await asyncio.gather(*(server.post(LOAD, **body) for _ in range(5)))
    assert [reply.status_code for reply in replies] == [200] * 5
    assert hub.num_fetched[WEIGHTS] == before + 1
    assert (await server.post(LOAD, **body)).status_code == 400
    assert (await server.post("/v1/unload_lora_adapter", lora_name="mine")).status_code == 200
    assert (await server.post(LOAD, **body)).status_code == 200


async def test_the_source_that_an_adapter_came_from_is_told(server: Server, hub: Hub) -> None:
    """LoRAX's header."""
    for name, source in (("org/one", "hub"), ("adapter-00001", "local")):
        reply = await server.post("/generate", inputs="hi", parameters={"adapter_id": name})
        assert (reply.status_code, reply.headers["x-adapter-source"]) == (200, source), reply.text


async def test_new_revisions_are_looked_for_by_a_few_at_once(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch, hanging: Hanging
) -> None:
    asked = resolver_of(server)
    names = ("org/one", "org/two")
    for name in names:
        assert (await server.complete(model=name)).status_code == 200
    asked._checked.clear()
    monkeypatch.setattr(resolver, "MAX_REFRESHES", 1)

    def wait(*_: object) -> Found:
        hanging.wait()
        raise FetchError("nobody answers")

    monkeypatch.setattr(HubSource, "find", wait)
    for name in names:
        assert (await server.complete(model=name)).status_code == 200
    await until(lambda: hanging.num_calls == 1)
    assert list(asked._checked) == ["org/one"]  # the other one's turn comes with a later request
    hanging.over.set()
    await until(lambda: not asked._tasks)
    assert asked._num_refreshing == 0
