"""Servers that die, hang, fail and come back, while a real client asks."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import PATIENCE_S, until, wait_until
from toppings.cluster.router.calls import Call
from toppings.cluster.router.exchange import Exchange
from toppings.lab.http.server import free_port


@contextlib.contextmanager
def server_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "tests.cluster.fakes", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


async def statuses(client: Client, count: int, **fields: Any) -> list[int]:
    async def one() -> int:
        async with client.complete(**fields) as response:
            await response.read()
            return int(response.status)

    return await asyncio.gather(*(one() for _ in range(count)))


async def test_killed_server_every_request_ends_once(start_router: Start) -> None:
    """Waiting requests end well elsewhere, those with tokens get one clear error, none is lost or doubled.
    The killed server's streams have a token, and no second one."""
    with server_process("vllm", "0.3", "3600") as (process, doomed), serving(FakeVllm()) as healthy:
        async with start_router(doomed, healthy) as client:
            api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)

            async def ask() -> str:
                try:
                    options: Any = {"model": "small", "prompt": "x", "max_tokens": 8, "stream": True}
                    stream = await api.completions.create(**options)
                    return "".join([chunk.choices[0].text async for chunk in stream])
                except openai.APIError as error:
                    return f"error: {error.message}"

            started = [asyncio.create_task(ask()) for _ in range(8)]
            state = client.router.state
            await until(lambda: state.fleet.instance("s0").running)
            late = [asyncio.create_task(ask()) for _ in range(8)]
            await until(lambda: client.num_received() == 16)
            had_tokens = len(state.fleet.instance("s0").running)  # others' may be on their way
            process.kill()
            answers = await asyncio.wait_for(asyncio.gather(*started, *late), PATIENCE_S)
    whole = "".join(f"t{i} " for i in range(8))
    errors = [answer for answer in answers if answer.startswith("error")]
    assert all(answer == whole for answer in answers if answer not in errors)
    assert all("after the first token; the answer is incomplete" in error for error in errors)
    assert len(errors) >= had_tokens > 0
    assert client.outcomes() == {"answered": 16 - len(errors), "cut": len(errors)}
    assert client.num_received() == 16


async def test_stopped_server_keeps_nobody_waiting_and_serves_again_when_it_goes_on(
    start_router: Start,
) -> None:
    """SIGSTOP: its connections stay open, and nothing comes. Every request ends, whole or with an error."""
    with server_process("vllm", "0.2", "0.1") as (process, doomed), serving(FakeVllm()) as healthy:
        async with start_router(doomed, healthy, policy="least_loaded", health_timeout_s=1.0) as client:
            client.limit("s1", health_timeout_s=PATIENCE_S)
            state = client.router.state
            streams = asyncio.create_task(statuses(client, 8, stream=True))
            await until(lambda: state.fleet.instance("s0").running)
            process.send_signal(signal.SIGSTOP)
            try:
                later = [
                    asyncio.create_task(statuses(client, 8, stream=is_stream)) for is_stream in (True, False)
                ]
                ended = await asyncio.wait_for(asyncio.gather(streams, *later), PATIENCE_S)
                assert not state.upstreams["s0"].is_alive
                assert await statuses(client, 4) == [200] * 4
            finally:
                process.send_signal(signal.SIGCONT)
            await until(lambda: state.upstreams["s0"].is_alive)
            assert await statuses(client, 4) == [200] * 4
        outcomes = client.outcomes()
    assert [len(each) for each in ended] == [8, 8, 8]
    assert set(ended[1]) == set(ended[2]) == {200}
    assert set(outcomes) == {"answered", "cut"}
    assert outcomes["answered"] + outcomes["cut"] == client.num_received() == 32


async def test_cut_stream_ends_with_one_error_event(start_router: Start) -> None:
    server = FakeVllm()
    server.behaviour.mode = "cut"
    with serving(server) as url:
        async with start_router(url) as client, client.complete(stream=True) as response:
            body = (await response.read()).decode()
    events = [event for event in body.split("\n\n") if event]
    assert len(events) == 3
    assert '"type":"UpstreamError"' in events[-1]
    assert "[DONE]" not in body


async def test_server_that_never_answers_is_given_up(start_router: Start) -> None:
    hanging, healthy = FakeVllm(), FakeVllm()
    with serving(hanging) as first, serving(healthy) as second:
        async with start_router(
            first, second, policy="first_fit", first_token_timeout_s=2.0, response_timeout_s=2.0
        ) as client:
            hanging.behaviour.mode = "hang"
            assert await statuses(client, 4, stream=True) == [200] * 4
            assert await statuses(client, 4) == [200] * 4
    assert len(healthy.seen) == 8


async def test_server_that_hangs_is_found_by_its_health_check(start_router: Start) -> None:
    """Long before a request's own limit: what waits there goes elsewhere."""
    hanging, healthy = FakeVllm(), FakeVllm()
    with serving(hanging) as first, serving(healthy) as second:
        async with start_router(first, second, policy="first_fit") as client:
            client.limit("s0", health_timeout_s=0.1)
            hanging.behaviour.mode = "hang"
            assert await asyncio.wait_for(statuses(client, 4, stream=True), PATIENCE_S) == [200] * 4
            assert not client.router.state.upstreams["s0"].is_alive


async def test_stream_that_stalls_ends_with_an_error(start_router: Start) -> None:
    server = FakeVllm()
    server.behaviour.token_s = 30.0
    with serving(server) as url:
        async with (
            start_router(url, idle_timeout_s=0.1) as client,
            client.complete(stream=True) as response,
        ):
            body = await response.text()
    assert "sent nothing for 0.1 s after the first token" in body


@pytest.mark.parametrize("mode", ["error", "busy"])
async def test_request_refused_by_one_server_is_answered_by_another(start_router: Start, mode: str) -> None:
    failing, healthy = FakeVllm(), FakeVllm()
    failing.behaviour.mode = mode
    with serving(failing) as first, serving(healthy) as second:
        async with start_router(first, second, policy="first_fit") as client:
            assert await statuses(client, 10) == [200] * 10
            assert client.outcomes() == {"answered": 10}


async def test_server_that_keeps_failing_is_passed_over(start_router: Start) -> None:
    failing, healthy = FakeVllm(), FakeVllm()
    failing.behaviour.mode = "error"
    with serving(failing) as first, serving(healthy) as second:
        async with start_router(first, second, policy="first_fit") as client:
            for _ in range(10):
                assert await statuses(client, 1) == [200]
    assert len(failing.seen) == 3


async def test_refusal_of_all_servers_is_passed_on_as_it_is(start_router: Start) -> None:
    servers = [FakeVllm(), FakeVllm()]
    for server in servers:
        server.behaviour.mode = "busy"
    with serving(servers[0]) as first, serving(servers[1]) as second:
        async with start_router(first, second) as client, client.complete() as response:
            error = (await response.json())["error"]
    assert (response.status, response.headers["Retry-After"]) == (429, "7")
    assert error["message"] == "the queue is full"
    assert [len(server.seen) for server in servers] == [1, 1]


async def test_all_servers_gone_is_503_with_retry_after(start_router: Start) -> None:
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(FakeVllm())) for _ in range(2)]
        async with start_router(*urls) as client:
            await asyncio.to_thread(stack.close)
            async with client.complete() as response:
                assert response.status in (503, 504)  # as the last one refused, or was seen to go down
                assert response.headers["Retry-After"] == "1"
            async with client.call("GET", "/ready") as ready:
                assert ready.status == 503
            assert sum(client.outcomes().values()) == 1
            assert "answered" not in client.outcomes()


async def test_server_that_comes_back_gets_requests_again(start_router: Start) -> None:
    port = str(free_port())
    with server_process("vllm", "0", "0", port) as (process, url):
        async with start_router(url) as client:
            process.kill()
            process.wait()
            assert await statuses(client, 2) == [503, 503]
            with server_process("vllm", "0", "0", port):
                await until(lambda: client.router.state.upstreams["s0"].is_alive)
                assert await statuses(client, 2) == [200, 200]


async def test_unhealthy_server_gets_no_requests(start_router: Start) -> None:
    sick, healthy = FakeVllm(), FakeVllm()
    with serving(sick) as first, serving(healthy) as second:
        async with start_router(first, second, policy="first_fit") as client:
            sick.behaviour.is_healthy = False
            await until(lambda: not client.router.state.upstreams["s0"].is_alive)
            assert await statuses(client, 4) == [200] * 4
    assert sick.seen == []


async def test_restarted_router_serves_the_same_servers(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        for _ in range(2):
            async with start_router(url) as client:
                assert await statuses(client, 3) == [200] * 3


async def test_waiting_request_is_moved_where_it_waits_less(start_router: Start) -> None:
    """The first server is slow to start; when the second one is added, dlora moves what waits."""
    slow, fast = FakeVllm(), FakeVllm()
    slow.behaviour.first_token_s = 30.0
    with serving(slow) as first, serving(fast) as second:
        async with start_router(first, policy="dlora") as client:
            tasks = asyncio.create_task(statuses(client, 6, stream=True))
            await until(lambda: len(client.router.state.flights) == 6)
            await client.json("POST", "/instances", {"url": second, "id": "s1"})
            await until(lambda: len(fast.seen) >= 4)
            moved = len(fast.seen)
            slow.behaviour.mode = "error"
            slow.behaviour.is_healthy = False  # what is still there is set free by the health check
            assert await asyncio.wait_for(tasks, PATIENCE_S) == [200] * 6
    assert moved >= 4
    assert client.outcomes() == {"answered": 6}


async def test_no_request_is_moved_to_a_server_that_has_refused_it(start_router: Start) -> None:
    """The first server has no load, since it takes nothing: dlora would move all that waits at the second."""
    refusing, slow = FakeVllm(), FakeVllm()
    refusing.behaviour.mode = "busy"
    slow.behaviour.first_token_s = 0.5
    with serving(refusing) as first, serving(slow) as second:
        async with start_router(first, second, policy="dlora", migration_interval_s=0.02) as client:
            assert await statuses(client, 6, stream=True) == [200] * 6
            assert len(refusing.seen) <= 6
            assert client.outcomes() == {"answered": 6}


async def test_a_move_to_a_server_that_has_closed_leaves_the_request_where_it_can_be(
    start_router: Start,
) -> None:
    with serving(FakeVllm()) as first, serving(FakeVllm()) as second:
        async with start_router(first, second) as client:
            state = client.router.state
            place = client.router.guard.book.anybody().enter(1)
            call = Call("/v1/completions", b"{}", "small", is_stream=True)
            flight = state.make_flight(call, place, Exchange("mine"))
            state.fleet.set_open("s1", False)
            flight.move_to = "s1"
            choice = state.place(flight)
            state.flights.end(flight)
            assert choice is not None
            assert choice.instance_id == "s0"


async def test_a_server_is_not_to_blame_for_the_routers_own_delay(start_router: Start) -> None:
    """The router itself is held up for longer than a stream may say nothing; what came meanwhile counts."""
    server = FakeVllm()
    server.behaviour.token_s = 0.05
    with serving(server) as url:
        async with (
            start_router(url, idle_timeout_s=1.5, health_interval_s=60.0) as client,
            client.complete(stream=True, max_tokens=20) as response,
        ):
            await response.content.readany()
            wait_until(lambda: not server.running)  # holds the loop, the router's as well
            time.sleep(1.5)
            assert (await response.read()).endswith(b"[DONE]\n\n")
            assert client.router.state.upstreams["s0"].num_failures == 0
