"""Servers that pass their health checks and answer with what is no answer."""

import asyncio
import random
from typing import Any

import pytest

from tests.cluster.conftest import Start
from tests.cluster.fakes import FakeToppings, FakeVllm, serving
from tests.cluster.hostile import CHUNKED, EVENTS, HTML, JSON, Script, closing_idle_ones, head, hostile
from tests.waiting import PATIENCE_S

NOISE = random.Random(3).randbytes(4096)
EVENT = b"data: {}\n\n"
LIMITS: dict[str, Any] = {"max_answer_bytes": 2**20, "max_attempts": 1}

NO_ANSWERS = {
    "random bytes": Script([NOISE]),
    "a body of random bytes": Script([head(JSON), NOISE]),
    "a page": Script([head(HTML), b"<html>hello</html>"]),
    "a page in place of a stream": Script([head(EVENTS), b"<html>hello</html>"]),
    "JSON that is no object": Script([head(JSON), b"5"]),
    "half a head": Script([b"HTTP/1.1 200 OK\r\nContent-"]),
    "an endless head": Script([b"HTTP/1.1 200 OK\r\n", b"X-More: %s\r\n" % (b"x" * 1000)], repeats=True),
    "an endless header": Script([b"HTTP/1.1 200 OK\r\nX-More: ", b"x" * 1000], repeats=True),
    "an endless body": Script([head(JSON), b" " * 2**16], repeats=True),
    "chunks that are none": Script([head(JSON, CHUNKED), b"zzz\r\n"]),
    "a stream without an event": Script([head(EVENTS)]),
    "a redirect": Script(
        [b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]
    ),
    "nothing at all": Script([]),
}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("script", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
async def test_what_is_no_answer_is_told_as_502(start_router: Start, script: Script, is_stream: bool) -> None:
    async with hostile(script) as url, start_router(url, **LIMITS) as client:
        async with client.complete(stream=is_stream) as response:
            error = (await response.json())["error"]
        assert (response.status, error["type"]) == (502, "UpstreamError")
        assert "s0" in error["message"]
        assert client.outcomes() == {"error": 1}


@pytest.mark.parametrize("script", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
async def test_what_is_no_answer_is_asked_of_another_server(start_router: Start, script: Script) -> None:
    async with hostile(script) as bad:
        with serving(FakeVllm()) as good:
            limits = {**LIMITS, "max_attempts": 2}
            async with start_router(bad, good, policy="first_fit", **limits) as client:
                async with client.complete() as response:
                    assert response.status == 200
                assert client.outcomes() == {"answered": 1}


async def test_idle_connections_that_a_server_has_closed_are_no_failures_of_it(start_router: Start) -> None:
    """All requests meet one at once, as after a while in which a busy router could not let them go."""
    async with (
        closing_idle_ones(4) as url,
        start_router(url, health_interval_s=3600.0, sync_interval_s=3600.0) as client,
    ):

        async def ask() -> int:
            async with client.complete() as response:
                await response.read()
                return int(response.status)

        for _ in range(3):
            assert await asyncio.gather(*(ask() for _ in range(4))) == [200] * 4
        upstream = client.router.state.upstreams["s0"]
        assert (upstream.is_alive, upstream.num_failures) == (True, 0)


async def test_server_that_never_ends_its_head_is_told_as_504(start_router: Start) -> None:
    half = Script([b"HTTP/1.1 200 OK\r\nContent-"], hangs=True)
    limits = {**LIMITS, "response_timeout_s": 1.0}
    async with hostile(half) as url, start_router(url, **limits) as client, client.complete() as response:
        assert response.status == 504
        assert "gave no answer within 1 s" in await response.text()


@pytest.mark.parametrize(
    ("script", "limit_s", "reason", "num_errors"),
    [
        (Script([head(EVENTS), EVENT], repeats=True), 0.5, "was not done in 0.5 s", 0),
        (Script([head(EVENTS), EVENT]), PATIENCE_S, "ended the stream without [DONE]", 2),
    ],
    ids=["without end", "ends too soon"],
)
async def test_stream_that_is_none_ends_with_an_error_event(
    start_router: Start, script: Script, limit_s: float, reason: str, num_errors: int
) -> None:
    """What is no answer counts as a 5xx, in a row as others do; our own limit counts as nothing."""
    limits = {"stream_timeout_s": limit_s, "health_interval_s": 3600.0}
    async with hostile(script) as url, start_router(url, **limits) as client:
        for _ in range(2):
            async with client.complete(stream=True) as response:
                *_, last = (await response.content.read()).rstrip().split(b"\n\n")
            assert b'"code":502' in last
            assert reason.encode() in last
        assert client.outcomes() == {"cut": 2}
        upstream = client.router.state.upstreams["s0"]
        assert (upstream.num_errors, upstream.num_failures, upstream.is_alive) == (num_errors, 0, True)


async def test_noise_after_an_event_counts_as_no_answer(start_router: Start) -> None:
    """Where both came at once nothing has been passed on, and the answer itself says it."""
    noisy = Script([head(EVENTS), EVENT, NOISE], hangs=True)
    async with hostile(noisy) as url, start_router(url, **LIMITS) as client:
        async with client.complete(stream=True) as response:
            assert b"sent what is no event" in await response.content.read()
        assert client.outcomes() in ({"cut": 1}, {"error": 1})


async def test_reports_without_sense_do_not_end_the_watch(start_router: Start) -> None:
    """Numbers that no server has, among them such as would take the router for ever to count."""
    senseless: list[dict[str, Any]] = [
        {"running_ranks": [-1]},
        {"running_ranks": [2**40]},
        {"kv_tokens_total": 0},
        {"kv_tokens_total": -5},
        {"kv_tokens_used": -1},
        {"num_running": -3},
        {"on_device": [1]},
        {"perf_model": {"a": [[[]]]}},
    ]
    server = FakeToppings()
    with serving(server) as url:
        async with start_router(url) as client:
            for stats in senseless:
                server.extra_stats = stats
                await asyncio.sleep(0.15)
                async with client.complete() as response:
                    assert response.status == 200
                async with client.call("GET", "/instances") as response:
                    assert response.status == 200
