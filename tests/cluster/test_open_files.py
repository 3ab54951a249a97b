"""A router that may open no more files: it says so, and thinks nothing ill of its servers."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import until
from toppings.cluster.router import app
from toppings.cluster.router.settings import RouterConfig
from toppings.cluster.router.upstream import Health


@contextmanager
def no_further_file() -> Iterator[None]:
    """All descriptors below the limit are in use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def _ask(client: Client, **fields: Any) -> tuple[int, str]:
    async with client.complete(**fields) as response:
        return response.status, await response.text()


async def test_requests_are_503_and_the_server_is_not_blamed(start_router: Start) -> None:
    server = FakeVllm()
    with serving(server) as url:
        async with start_router(url, health_interval_s=3600.0) as client:
            upstream = client.router.state.upstreams["s0"]
            server.behaviour.max_sent = 4
            idle = asyncio.create_task(_ask(client))  # leaves a connection of the client's open
            streams = [asyncio.create_task(_ask(client, stream=True, max_tokens=100)) for _ in range(6)]
            await until(lambda: len(server.running) == 6)  # no connection to the server is left over
            await idle
            held = asyncio.create_task(_ask(client, stream=True, max_tokens=100))
            async with client.call("GET", "/health"):
                await until(lambda: len(server.running) == 7)
            with no_further_file():
                assert await upstream.check_health() is Health.UNASKED
                await client.router.monitor.check(upstream)
                status, text = await _ask(client)
            assert status == 503
            assert "the router has too many files open" in text
            assert (upstream.is_alive, upstream.num_failures) == (True, 0)
            server.behaviour.max_sent = None
            answers = await asyncio.gather(*streams, held)
            assert all(text.endswith("[DONE]\n\n") for _, text in answers)
            assert client.outcomes() == {"error": 1, "answered": 8}


def test_the_limit_is_raised_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen: list[int] = []

    async def look(config: RouterConfig) -> None:
        seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    monkeypatch.setattr(app, "_serve", look)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
    try:
        app.run_router(RouterConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert seen == [limits[1]]
