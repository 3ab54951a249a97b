"""The router's `/dashboard`: servers, requests on their way, and why they went where they went."""

import asyncio
import json
import socket
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeToppings, serving
from tests.waiting import until
from toppings.cluster.policies import POLICIES
from toppings.cluster.router.decisions import MAX_KEPT, MAX_SERVERS
from toppings.cluster.router.readings import MAX_SERVERS as MAX_TOLD
from toppings.cluster.snapshot import RequestSnapshot
from toppings.command import app
from toppings.dashboard.feed import FIRM_S, LIFE_S, MAX_VIEWERS_EACH
from toppings.dashboard.page import EVENTS, HEADERS


async def data(client: Client) -> dict[str, Any]:
    client.router.dashboard.feed._read_at = float("-inf")  # no wait for a period to pass
    async with client.call("GET", "/dashboard/data") as reply:
        assert reply.status == 200
        told: dict[str, Any] = await reply.json()
        return told


def stop_clocks(client: Client) -> None:
    """The seconds that a test takes are none."""
    client.router.state.recent._clock = lambda: 1e6
    client.router.state.decisions._clock = lambda: 1e6


async def complete(client: Client, **fields: Any) -> str:
    """The server that answered."""
    body = {"model": "small", "prompt": "hello", "max_tokens": 4, **fields}
    async with client.call("POST", "/v1/completions", body) as reply:
        await reply.read()
        assert reply.status == 200
        return str(reply.headers["X-Toppings-Instance"])


async def test_the_page_has_the_policys_headers(two_servers: Any, start_router: Start) -> None:
    async with start_router(two_servers[0][1]) as client:
        for path in ("/dashboard", "/dashboard/static/app.js"):
            async with client.call("GET", path) as reply:
                assert reply.status == 200
                assert {name: reply.headers[name] for name in HEADERS} == HEADERS
        async with client.call("GET", "/dashboard/static/nothing.js") as reply:
            assert reply.status == 404
        async with client.call("HEAD", EVENTS) as reply:
            assert (reply.status, reply.content_type) == (200, "text/event-stream")


async def test_it_tells_of_servers_and_of_what_went_through(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second, policy="round_robin") as client:
        stop_clocks(client)
        for stream in (False, True):
            await complete(client, stream=stream)
        await until(lambda: not len(client.router.state.flights))
        told = await data(client)
        assert [(each["id"], each["state"], each["kind"]) for each in told["servers"]["rows"]] == [
            ("s0", "up", "toppings"),
            ("s1", "up", "openai"),
        ]
        assert (told["about"]["kind"], told["about"]["policy"]) == ("router", "round_robin")
        assert told["about"]["rule"] == "the open servers in turn"
        assert told["state"] == {"word": "ready", "reason": ""}
        assert told["now"]["ended"] == {"answered": 2}
        assert told["latency"]["ttft"]["num"] == 1
        assert told["latency"]["tpt"]["num"] == 2
        async with client.call("GET", "/dashboard/adapters?find=smal") as reply:
            found = await reply.json()
        assert found["num_found"] == 1
        assert found["rows"][0]["name"] == "small"
        assert "s0" in found["rows"][0]["device"]
        async with client.call("GET", "/dashboard/adapters?offset=x") as reply:
            assert (reply.status, "offset is 'x'" in await reply.text()) == (400, True)


async def test_requests_on_their_way_are_told_by_model(two_servers: Any, start_router: Start) -> None:
    (server, url), _ = two_servers
    server.behaviour.first_token_s = 3600.0
    async with start_router(url) as client:
        asked = asyncio.create_task(complete(client, stream=True))
        await until(lambda: len(client.router.state.flights) == 1)
        told = await data(client)
        assert told["queue"]["rows"] == [{"tenant": "", "model": "small", "waiting": 1, "running": 0}]
        assert told["servers"]["rows"][0]["in_flight"] == told["servers"]["rows"][0]["waiting"] == 1
        assert told["adapters"]["rows"][0]["requests"] == 1
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_why_a_request_went_where_it_went_is_told_while_somebody_looks(
    two_servers: Any, start_router: Start
) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second, policy="lora_affinity") as client:
        stop_clocks(client)
        await complete(client)
        assert (await data(client))["decisions"] == []
        chosen = await complete(client)
        [told] = (await data(client))["decisions"]
        assert told["server"] == chosen
        assert (told["model"], told["tenant"]) == ("small", "")
        assert len(told["request_id"]) == 32
        assert "has the adapter on its device" in told["why"]
        of_chosen, other = told["servers"]
        assert (of_chosen["id"], of_chosen["is_chosen"], of_chosen["place"]) == (chosen, True, "device")
        assert not other["is_chosen"]
        assert {"requests", "load_ms", "step_ms", "why_not"} <= of_chosen.keys()


async def test_a_request_that_goes_elsewhere_is_told_so(start_router: Start) -> None:
    broken, good = FakeToppings(), FakeToppings()
    broken.behaviour.mode = "error"
    with serving(broken) as bad_url, serving(good) as url:
        async with start_router(bad_url, url, policy="first_fit") as client:
            stop_clocks(client)
            await data(client)
            assert await complete(client) == "s1"
            second, first = (await data(client))["decisions"]
            assert (first["server"], second["server"]) == ("s0", "s1")
            assert second["why"] == "s0 did not take it; no other could take it"
            assert [each["why_not"] for each in second["servers"]] == ["", "did not take it"]


async def test_decisions_are_bounded(start_router: Start) -> None:
    server = FakeToppings()
    with serving(server) as url:
        async with start_router(*[url] * (MAX_SERVERS + 3), policy="least_loaded") as client:
            stop_clocks(client)
            await data(client)
            await asyncio.gather(*(complete(client, max_tokens=1) for _ in range(MAX_KEPT + 5)))
            told = (await data(client))["decisions"]
            assert len(told) == MAX_KEPT
            assert {len(each["servers"]) for each in told} == {MAX_SERVERS}
            numbers = [each["number"] for each in told]
            assert numbers == sorted(numbers, reverse=True)


async def test_streams_end_with_the_router(two_servers: Any, start_router: Start) -> None:
    async with start_router(two_servers[0][1]) as client:
        async with client.call("GET", EVENTS) as reply:
            first = await reply.content.readuntil(b"\n\n")
            assert json.loads(first.removeprefix(b"data: "))["about"]["kind"] == "router"
            await client.router.dashboard.close(None)  # type: ignore[arg-type]
            await reply.content.read()
            assert reply.content.at_eof()
        await until(lambda: client.router.dashboard.feed.num_viewers == 0)


async def test_viewers_that_never_read_lock_nobody_out_of_a_router(
    two_servers: Any, start_router: Start
) -> None:
    async with start_router(two_servers[0][1]) as client, AsyncExitStack() as stack:
        feed, now = client.router.dashboard.feed, [0.0]
        feed.clock = lambda: now[0]
        address = urlsplit(client.url)
        for _ in range(MAX_VIEWERS_EACH):
            rude = stack.enter_context(socket.create_connection((address.hostname, address.port)))
            rude.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        await until(lambda: feed.num_viewers == MAX_VIEWERS_EACH)
        async with client.call("GET", EVENTS) as reply:
            assert (reply.status, "at once; ask again" in await reply.text()) == (503, True)
        now[0] = FIRM_S
        reply = await stack.enter_async_context(client.call("GET", EVENTS))
        assert (await reply.content.readuntil(b"\n\n")).startswith(b"data: ")
        assert feed.num_viewers == MAX_VIEWERS_EACH
        now[0] += LIFE_S
        await until(lambda: feed.num_viewers == 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_says_what_it_looks_for(policy: str) -> None:
    assert POLICIES[policy].rule


async def test_top_shows_a_router(two_servers: Any, start_router: Start) -> None:
    async with start_router(two_servers[0][1], two_servers[1][1]) as client:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["top", client.url, "--once"])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert any(line.startswith("router, least_loaded (") and line.endswith("): ready") for line in lines)
    assert f"│ s0 │ up │ 0 │ 0 │ 0 │ 2 │ {two_servers[0][1]} │" in lines


async def test_of_many_servers_those_that_are_down_and_the_busiest_are_told(start_router: Start) -> None:
    with serving(FakeToppings()) as url:
        async with start_router(*[url] * (MAX_TOLD + 5)) as client:
            upstreams = client.router.state.upstreams
            for upstream in upstreams.values():
                upstream.is_alive = True  # whatever its checks say on a busy machine
            first, busy = list(upstreams)[-2:]
            upstreams[first].is_draining = True
            client.router.state.dispatcher.sent(RequestSnapshot("r", None, 0, 8, 8.0), busy)
            told: Any = (await client.router.dashboard._readings.read())["servers"]
            assert [each["id"] for each in told["rows"]][:2] == [first, busy]
            assert (len(told["rows"]), told["num_more"]) == (MAX_TOLD, 5)
            client.router.state.dispatcher.ended("r")
