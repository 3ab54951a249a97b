"""A router in the test's own event loop, over fakes on real sockets."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.fakes import FakeServer, FakeToppings, FakeVllm, serving
from tests.waiting import PATIENCE_S, until
from toppings.cluster.router.app import Router, running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig

FAST = {
    "health_interval_s": 0.05,
    "health_timeout_s": PATIENCE_S,  # a busy machine's server is no hanging one
    "sync_interval_s": 0.2,
    "policy": "least_loaded",
}


class Client:
    """A client of one router."""

    def __init__(self, router: Router, url: str, session: aiohttp.ClientSession) -> None:
        self.router, self.url, self._session = router, url, session

    def call(self, method: str, path: str, body: object = None, **options: Any) -> Any:
        return self._session.request(method, self.url + path, json=body, **options)

    def complete(self, model: str = "small", path: str = "/v1/completions", **fields: Any) -> Any:
        body = {"model": model, "prompt": "hello", "max_tokens": 4, **fields}
        return self.call("POST", path, body)

    async def json(self, method: str, path: str, body: object = None) -> Any:
        async with self.call(method, path, body) as response:
            return await response.json(content_type=None)

    def outcomes(self) -> dict[str, int]:
        samples = next(iter(self.router.state.meters.ended.collect())).samples
        return {s.labels["outcome"]: int(s.value) for s in samples if s.name.endswith("_total")}

    def limit(self, instance_id: str, **settings: Any) -> None:
        """Limits of time for the router's own calls to one server, which the others need not keep to."""
        upstream = self.router.state.upstreams[instance_id]
        upstream.settings = replace(upstream.settings, **settings)

    def num_received(self) -> int:
        return int(next(iter(self.router.state.meters.received.collect())).samples[0].value)


async def records_in(file: Path, num: int) -> list[dict[str, Any]]:
    """The lines of a log, once there are so many."""
    await until(lambda: file.exists() and file.read_bytes().count(b"\n") >= num)
    return [json.loads(line) for line in file.read_text().splitlines()]


Start = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def start_router() -> Start:
    @asynccontextmanager
    async def start(
        *urls: str | InstanceConfig, records: Path | None = None, **settings: Any
    ) -> AsyncIterator[Client]:
        instances = tuple(
            InstanceConfig(url=url, instance_id=f"s{i}") if isinstance(url, str) else url
            for i, url in enumerate(urls)
        )
        config = RouterConfig(instances=instances, port=0, **{**FAST, **settings})
        async with running_router(config, records) as (router, url), aiohttp.ClientSession() as session:
            yield Client(router, url, session)
            router.state.fleet.check_integrity()

    return start


@pytest.fixture
def two_servers() -> Iterator[tuple[tuple[FakeServer, str], tuple[FakeServer, str]]]:
    """A Toppings server and a vLLM one, with their URLs."""
    first, second = FakeToppings(), FakeVllm()
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in (first, second)]
        yield (first, urls[0]), (second, urls[1])
