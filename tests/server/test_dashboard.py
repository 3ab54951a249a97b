"""The server's `/dashboard` over a fake engine: what it shows, to whom, and how it ends."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.conftest import Server
from tests.server.test_polling import NUM_REGISTERED, NUM_RESIDENT, SLACK, cost_ms, many, poll
from tests.waiting import until
from toppings.dashboard.feed import FIRM_S, LIFE_S, MAX_VIEWERS_EACH
from toppings.dashboard.page import EVENTS, HEADERS
from toppings.messages import AdapterStatus, ColdLayer, ColdStart, EngineStats, Span
from toppings.server.readings import MAX_COLD

__all__ = ["many"]
RUDE = "<script>alert(1)</script>"


def adapter(adapter_id: int, **fields: Any) -> AdapterStatus:
    told = {"is_on_host": True, "device_layers": 2, "num_layers": 2, "num_running": 0, "num_waiting": 0}
    return AdapterStatus(adapter_id, **{**told, "num_hits": 0, "is_pinned": False, **fields})


async def data(server: Server) -> dict[str, Any]:
    reply = await server.http.get("/dashboard/data")
    assert reply.status_code == 200
    told: dict[str, Any] = reply.json()
    return told


@asynccontextmanager
async def following(url: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """What a viewer knows after each event."""

    async def known(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        sections: dict[str, Any] = {}
        async for line in reply.aiter_lines():
            if line:
                sections |= json.loads(line.removeprefix("data: "))
                yield sections

    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", url + EVENTS) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        yield known(reply)


async def test_the_page_and_its_files_have_the_policys_headers(server: Server) -> None:
    for path in ("/dashboard", "/dashboard/static/app.js", "/dashboard/static/style.css"):
        reply = await server.http.get(path)
        assert reply.status_code == 200
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    assert reply.headers["content-type"].startswith("text/css")
    for path in ("nothing.js", "..%2Ffeed.py", "%2e%2e/feed.py"):
        assert (await server.http.get(f"/dashboard/static/{path}")).status_code == 404


async def test_it_tells_of_requests_by_tenant_and_model_as_they_run(server: Server) -> None:
    root = server.state.config.server.adapters
    server.registry.register("a", f"{root}/adapter-00000")
    server.state.metrics.recent._clock = lambda: 1e6  # the seconds that this takes are none
    server.engine.gate.clear()
    asked = [asyncio.create_task(server.complete(model=model, max_tokens=4)) for model in ("a", "a", "base")]
    await until(lambda: server.engine.num_pending == 3)
    told = await data(server)
    assert told["queue"]["rows"] == [
        {"tenant": "", "model": "a", "waiting": 2, "running": 0},
        {"tenant": "", "model": "base", "waiting": 1, "running": 0},
    ]
    assert (told["now"]["open"], told["now"]["waiting"]) == (3, 3)
    server.engine.gate.set()
    await asyncio.gather(*asked)
    server.app.state.feed._read_at = float("-inf")  # the next one need not be a period later
    told = await data(server)
    assert told["queue"]["rows"] == []
    assert told["now"]["ended"] == {"length": 3}
    assert told["now"]["tokens_per_s"] > 0
    assert told["latency"]["ttft"]["num"] == told["latency"]["tpt"]["num"] == 3
    assert told["cache"] == {"used": 256, "total": 1024, "prompt_tokens": 64, "found": 32}


async def test_it_tells_where_adapters_are(server: Server) -> None:
    root = server.state.config.server.adapters
    ids = [
        server.registry.register(f"a{number}", f"{root}/adapter-00000", replace=True).adapter_id
        for number in range(6)
    ]
    server.engine.adapters = [
        adapter(ids[0], num_hits=9, num_running=1),
        adapter(ids[1], device_layers=1, num_running=1),
        adapter(ids[2], device_layers=0),
        adapter(ids[3], device_layers=0, is_on_host=False, num_waiting=2),
        adapter(ids[4], num_hits=3, is_pinned=True),
    ]
    told = (await data(server))["adapters"]
    counts = {name: told[name] for name in ("registered", "device", "loading", "host", "reading")}
    assert counts == {"registered": 6, "device": 2, "loading": 1, "host": 1, "reading": 1}
    assert [(row["name"], row["place"]) for row in told["rows"]] == [
        *(("a3", "reading"), ("a1", "loading"), ("a0", "device"), ("a4", "device")),
    ]
    assert (told["rows"][1]["layers"], told["rows"][1]["num_layers"]) == (1, 2)
    assert told["host_bytes"] == [400, 1000]
    found = (await server.http.get("/dashboard/adapters?find=a&limit=3&offset=4")).json()
    assert found["num_found"] == 6
    assert [(row["name"], row["place"]) for row in found["rows"]] == [("a4", "device"), ("a5", "disk")]
    bad = await server.http.get("/dashboard/adapters?limit=0")
    assert (bad.status_code, "limit is '0'" in bad.text) == (400, True)


async def test_it_tells_of_the_latest_cold_starts(server: Server) -> None:
    server.registry.register("a", f"{server.state.config.server.adapters}/adapter-00000")
    layers = [
        *(ColdLayer(Span(-1.0, 2.04), 4), ColdLayer(None, 4, 4, 8, Span(2.0, 3.0))),
        *(ColdLayer(Span(2.0, 4.0), 4, 1, 2, Span(1.0, 2.0)), ColdLayer(None, 0)),
    ]
    server.engine.cold_start = ColdStart(
        "disk", 10.0, 20.0, 5.0, 2.0, rank=4, num_bytes=9, arrived_at=1e9, first_token_ms=40.0, layers=layers
    )
    assert (await data(server))["cold"] == {"num": 0, "latest": []}
    for _ in range(MAX_COLD + 3):
        await server.complete(model="a", max_tokens=1)
    server.app.state.feed._read_at = float("-inf")
    told = (await data(server))["cold"]
    assert told["num"] == MAX_COLD + 3
    assert [each["number"] for each in told["latest"]] == list(range(MAX_COLD + 3, 3, -1))
    latest = told["latest"][0]
    assert (latest["adapter"], latest["tier"], latest["rank"], latest["at"]) == ("a", "disk", 4, 1e9)
    assert (latest["first_token_ms"], latest["read_ms"]) == (40.0, 10.0)
    assert latest["places"] == ["device", "cpu", "both", "none"]
    assert latest["copies"] == [[-1.0, 2.0], None, [2.0, 4.0], None]
    assert latest["workers"] == [None, [2.0, 3.0], [1.0, 2.0], None]
    assert len(latest["request_id"]) == 32


async def test_names_travel_as_values_of_json(server: Server) -> None:
    server.engine.info = replace(server.engine.info, model_name=RUDE)
    reply = await server.http.get("/dashboard/data")
    assert reply.json()["about"]["model"] == RUDE
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_it_goes_on_while_the_engine_is_busy_or_gone(server: Server) -> None:
    gate = asyncio.Event()
    ask = server.engine.stats

    async def slow() -> EngineStats:
        await gate.wait()
        return await ask()

    server.engine.stats = slow  # type: ignore[method-assign]
    told = await data(server)
    assert (told["state"]["word"], told["adapters"], told["cache"]) == ("ready", None, None)
    gate.set()
    feed = server.app.state.feed
    feed._read_at = float("-inf")
    assert (await data(server))["cache"]["total"] == 1024
    server.engine.died.set()
    feed._read_at = float("-inf")
    told = await data(server)
    assert told["state"] == {"word": "no engine", "reason": "the engine has died"}
    assert told["cache"] is None


async def test_viewers_are_told_what_changes(server: Server, url: str) -> None:
    async with following(url) as events:
        assert (await anext(events))["now"]["open"] == 0
        server.engine.gate.clear()
        asked = asyncio.create_task(server.complete(max_tokens=2))
        async for known in events:
            if known["now"]["open"] == 1:
                break
        server.engine.gate.set()
        await asked
        async for known in events:
            if known["now"]["open"] == 0:
                break
        assert known["now"]["ended"] == {"length": 1}
    feed = server.app.state.feed
    await until(lambda: feed.num_viewers == 0)
    assert feed._producer is None


async def test_streams_end_where_the_server_does(server: Server, url: str) -> None:
    async with following(url) as events:
        await anext(events)
        server.app.state.feed.close()
        assert [known async for known in events][1:] == []


async def test_the_head_of_a_stream_has_an_end(server: Server, url: str) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(2):
            reply = await client.head(url + EVENTS)
            assert (reply.status_code, reply.content) == (200, b"")
            assert reply.headers["content-type"].startswith("text/event-stream")


async def test_too_many_viewers_are_told_to_come_back(server: Server) -> None:
    for _ in range(MAX_VIEWERS_EACH):
        assert server.app.state.feed.enter("127.0.0.1") is not None
    reply = await server.http.get(EVENTS)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "as many are looking at the dashboard as may at once" in reply.text


async def test_viewers_that_never_read_lock_nobody_out(server: Server, url: str) -> None:
    """Real connections, whose events the system takes for them: nothing tells them from readers but time."""
    feed, now = server.app.state.feed, [0.0]
    feed.clock = lambda: now[0]
    address = urlsplit(url)
    async with AsyncExitStack() as stack:
        for _ in range(MAX_VIEWERS_EACH):
            rude = stack.enter_context(socket.create_connection((address.hostname, address.port)))
            rude.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        await until(lambda: feed.num_viewers == MAX_VIEWERS_EACH)
        now[0] = FIRM_S
        events = await stack.enter_async_context(following(url))
        assert (await anext(events))["now"]["open"] == 0
        assert feed.num_viewers == MAX_VIEWERS_EACH
        server.engine.gate.clear()
        asked = asyncio.create_task(server.complete(max_tokens=2))
        async for known in events:
            if known["now"]["open"] == 1:
                break
        server.engine.gate.set()
        await asked
        now[0] += LIFE_S
        await until(lambda: feed.num_viewers == 0)  # though they are all still connected
        assert feed._producer is None


async def test_ten_thousand_adapters_cost_the_loop_little(many: Server) -> None:
    feed = many.app.state.feed

    async def read() -> None:
        feed._read_at = float("-inf")
        many.engine.adapters = [replace(each) for each in many.engine.adapters]  # all may have changed
        many.engine.adapters[0] = replace(
            many.engine.adapters[0], num_hits=many.engine.adapters[0].num_hits + 1
        )
        await feed.latest()

    assert await cost_ms(read) < 10 * SLACK
    told = (await many.http.get("/dashboard/data")).content
    assert len(told) < 32 * 2**10
    section = json.loads(told)["adapters"]
    assert (section["registered"], section["device"]) == (NUM_REGISTERED + 1, NUM_RESIDENT)
    assert await cost_ms(lambda: poll(many, "/dashboard/adapters")) < 5 * SLACK
