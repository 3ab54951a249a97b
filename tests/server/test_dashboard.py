"""The server's `/dashboard` over a fake engine: what it shows, to whom, and how it ends."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx

from tests.server.conftest import Server
from tests.server.test_polling import NUM_REGISTERED, NUM_RESIDENT, SLACK, cost_ms, many, poll
from tests.waiting import until
from toppings.dashboard.page import EVENTS, HEADERS
from toppings.messages import AdapterStatus, EngineStats

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
    server.app.state.feed.num_viewers = 64
    reply = await server.http.get(EVENTS)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "64 are looking at the dashboard already" in reply.text


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
