"""Processes that are stopped or killed: what is sent is answered or refused, and nobody waits for long."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import aiohttp
import httpx
import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.cluster.test_faults import server_process
from tests.cluster.test_router_process import body, router
from tests.waiting import PATIENCE_S, until
from toppings.cluster.router.bodies import Budget
from toppings.cluster.router.settings import RouterConfig

NOBODY_WAITS_LONGER_S = 10.0
NEVER = "3600"
"""Seconds until a server's first token."""
DEFAULTS = {
    name: getattr(RouterConfig(), name)
    for name in ("health_interval_s", "health_timeout_s", "unhealthy_after")
}


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def _ask(client: Client, *, is_stream: bool, max_tokens: int = 4) -> tuple[int, bytes]:
    async with client.complete(stream=is_stream, max_tokens=max_tokens) as response:
        return response.status, await response.content.read()


def test_defaults_find_a_stopped_server_in_time() -> None:
    config = RouterConfig()
    rounds = config.unhealthy_after * (config.health_interval_s + config.health_timeout_s)
    assert rounds + config.health_timeout_s < NOBODY_WAITS_LONGER_S


async def test_requests_on_a_stopped_server_are_answered_by_another(start_router: Start) -> None:
    with server_process("vllm", NEVER, "0") as (process, doomed), serving(FakeVllm()) as healthy:
        async with start_router(doomed, healthy, policy="first_fit", **DEFAULTS) as client:
            client.limit("s1", health_timeout_s=PATIENCE_S)
            waiting = [asyncio.create_task(_ask(client, is_stream=i % 2 == 0)) for i in range(6)]
            await until(lambda: len(client.router.state.flights.on("s0")) == 6)
            with stopped(process.pid):
                async with asyncio.timeout(PATIENCE_S):
                    answers = await asyncio.gather(*waiting)
                assert [status for status, _ in answers] == [200] * 6
                assert not client.router.state.upstreams["s0"].is_alive  # nobody is sent there any more
                assert (await _ask(client, is_stream=True))[0] == 200
            assert client.outcomes() == {"answered": 7}


async def test_streams_of_a_stopped_server_end_with_an_error(start_router: Start) -> None:
    with server_process("vllm", "0", "0.05") as (process, url):
        async with start_router(url, **DEFAULTS) as client:
            streams = [asyncio.create_task(_ask(client, is_stream=True, max_tokens=999)) for _ in range(3)]
            await until(lambda: len(client.router.state.fleet.instance("s0").running) == 3)
            with stopped(process.pid):
                async with asyncio.timeout(PATIENCE_S):
                    answers = await asyncio.gather(*streams)
            assert all(b"fell silent after the first token" in text for _, text in answers)
            assert client.outcomes() == {"cut": 3}
            await until(lambda: client.router.state.upstreams["s0"].is_alive)
            assert (await _ask(client, is_stream=True))[0] == 200


async def test_streams_that_go_on_outlive_health_checks_that_fail(start_router: Start) -> None:
    """A server that is slow to answer its checks, but not silent to its clients: how a check fails is told to
    the router here, since a silence that ends a check would be one of the stream's on a busy machine."""
    server = FakeVllm()
    server.behaviour.token_s = 0.02
    with serving(server) as url:
        limits = {"health_timeout_s": PATIENCE_S, "health_interval_s": 3600.0, "unhealthy_after": 1}
        async with start_router(url, **limits) as client:
            state = client.router.state
            stream = asyncio.create_task(_ask(client, is_stream=True, max_tokens=50))
            await until(lambda: state.fleet.instance("s0").running)
            state.note_failure(state.upstreams["s0"], is_silent=True)
            assert not state.upstreams["s0"].is_alive
            assert (await stream)[1].endswith(b"[DONE]\n\n")


async def test_without_another_server_the_stopped_ones_requests_are_refused_in_time(
    start_router: Start,
) -> None:
    with server_process("vllm", NEVER, "0") as (process, url):
        async with start_router(url, **DEFAULTS) as client:
            waiting = [asyncio.create_task(_ask(client, is_stream=i % 2 == 0)) for i in range(4)]
            await until(lambda: len(client.router.state.flights) == 4)
            with stopped(process.pid):
                async with asyncio.timeout(PATIENCE_S):
                    answers = await asyncio.gather(*waiting)
            assert {status for status, _ in answers} <= {503, 504}
            assert client.outcomes() == {"error": 4}


def test_stopped_router_goes_on_with_its_streams_when_it_wakes() -> None:
    server = FakeVllm()
    server.behaviour.token_s = 0.1
    with (
        serving(server) as url,
        router(url) as (process, routed),
        httpx.Client(base_url=routed, timeout=PATIENCE_S) as client,
    ):
        with client.stream("POST", "/v1/completions", json=body(20)) as response:
            events = response.iter_lines()
            text = next(events)
            with stopped(process.pid):
                time.sleep(3.0)
            text += "".join(events)
        assert text.endswith("data: [DONE]")
        assert text.count('"text"') == 20
        assert client.get("/ready").status_code == 200


async def test_a_fleet_of_which_one_is_killed_loses_nothing(start_router: Start) -> None:
    """Sent is answered and refused; the killed server's streams end with one error."""
    with ExitStack() as stack:
        process, doomed = stack.enter_context(server_process("vllm", "0", "0.02"))
        healthy = stack.enter_context(serving(FakeVllm()))
        async with start_router(doomed, healthy) as client:
            asked = [
                asyncio.create_task(_ask(client, is_stream=i % 2 == 0, max_tokens=50)) for i in range(20)
            ]
            await until(lambda: client.router.state.fleet.instance("s0").running)
            process.kill()
            async with asyncio.timeout(PATIENCE_S):
                answers = await asyncio.gather(*asked)
            assert all(status == 200 for status, _ in answers)
            assert sum(client.outcomes().values()) == client.num_received() == 20
            assert not client.router.state.flights


async def test_half_sent_requests_are_closed_in_time(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url, head_timeout_s=0.3, body_timeout_s=0.3) as client:
            host, port = client.url.removeprefix("http://").split(":")
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n"
            for text, answer in ((b"", b""), (head[:30], b""), (head + b'{"pro', b"HTTP/1.1 408")):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(text)
                async with asyncio.timeout(PATIENCE_S):
                    try:
                        got = await reader.readuntil(b"\r\n\r\n") if answer else await reader.read()
                    except ConnectionResetError:
                        got = b""
                assert got.startswith(answer)
                writer.close()
            async with aiohttp.ClientSession() as session, session.get(f"{client.url}/health") as response:
                assert response.status == 200
                await asyncio.sleep(0.5)  # idle between two requests, which no head's limit ends
                async with session.get(f"{client.url}/health") as again:
                    assert again.status == 200


async def test_who_is_still_sending_when_the_router_stops_is_answered(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url) as client:
            host, port = client.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
            await until(lambda: client.router.budget.readings)
            answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(PATIENCE_S):
            head, _, told = (await answer).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 503")
        assert {b"connection: close", b"retry-after: 1"} <= set(head.lower().split(b"\r\n"))
        assert b"the router is stopping" in told
        assert client.outcomes() == {"error": 1}


async def test_a_body_that_is_there_is_read_though_the_router_stops() -> None:
    budget = Budget(100)
    await budget.close()
    async with budget.reading(PATIENCE_S):
        pass
    with pytest.raises(TimeoutError):
        async with budget.reading(PATIENCE_S):
            await asyncio.Event().wait()
    assert not budget.readings
