"""Traces, as a collector receives them: from the caller over the router and the server to the engine."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.fakes import FakeVllm
from tests.cluster.fakes import serving as serving_fake
from tests.otlp import Collector, Received, collecting
from tests.server.conftest import Server
from tests.server.test_engine_loss import Serving
from tests.waiting import PATIENCE_S, until, wait_until
from toppings.cluster.router.app import Router, running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.config import Config, ConfigError
from toppings.core import MODULES
from toppings.server import traces
from toppings.server.records import keeping_records
from toppings.synth import AdapterShape, write_adapters
from toppings.tracing import Span, Tracing, check_endpoint, open_tracing

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CALLER = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
DEMO = Path(__file__).parents[2] / "src" / "toppings" / "demo" / "model"
SERVER, CLIENT = 2, 3  # kinds


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as collector:
        yield collector


@pytest.fixture
async def traced(server: Server, collector: Collector, tmp_path: Path) -> AsyncIterator[Server]:
    config = Config.from_settings({"otlp_traces_endpoint": collector.url}, server.state.config)
    with keeping_records(server.app, config, tmp_path):
        yield server


async def spans(collector: Collector, *, last: str) -> list[Received]:
    await until(lambda: any(span.name.startswith(last) for span in collector.of(TRACE)))
    return collector.of(TRACE)


async def ask(server: Server, headers: dict[str, str], **body: Any) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 4, **body}
    return await server.http.post("/v1/completions", json=body, headers=headers)


async def test_a_request_is_a_part_of_its_callers_trace(traced: Server, collector: Collector) -> None:
    await ask(traced, {**FROM_CALLER, "X-Request-Id": "mine"}, temperature=0.5)
    found = {span.name: span for span in await spans(collector, last="text_completion")}
    whole = found["text_completion base"]
    assert (whole.parent, whole.kind, whole.service, whole.is_error) == (CALLER, SERVER, "toppings", False)
    assert (
        whole.attributes.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "base",
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.usage.output_tokens": 4,
            "gen_ai.response.finish_reasons": ["length"],
            "http.response.status_code": 200,
            "toppings.request_id": "mine",
            "toppings.start": "base",
        }.items()
    )
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    assert {part.parent for part in parts} == {whole.id}
    assert whole.start <= parts[0].start
    assert all(before.end == after.start for before, after in pairwise(parts))
    assert parts[-1].end <= whole.end


async def test_traces_are_made_beside_the_event_loop_and_what_is_too_much_is_counted(
    server: Server, collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: set[str] = set()
    goes_on = threading.Event()
    serve = Tracing.serve

    def slow(self: Tracing, *args: Any) -> Span:
        makers.add(threading.current_thread().name)
        goes_on.wait(PATIENCE_S)
        return serve(self, *args)

    monkeypatch.setattr(Tracing, "serve", slow)
    monkeypatch.setattr(traces, "MAX_WAITING", 2)
    config = Config.from_settings({"otlp_traces_endpoint": collector.url}, server.state.config)
    with keeping_records(server.app, config, tmp_path):
        await ask(server, FROM_CALLER)
        await until(lambda: makers)
        for _ in range(3):
            assert (await ask(server, FROM_CALLER)).status_code == 200
        metrics = (await server.http.get("/metrics")).text
        goes_on.set()
    assert makers == {"backlog-traces"}
    assert 'toppings:log_dropped_total{file="traces"} 1.0' in metrics
    await until(lambda: sum(s.name.startswith("text_completion") for s in collector.of(TRACE)) == 3)


async def test_what_failed_is_told(traced: Server, collector: Collector) -> None:
    traced.engine.error = "the device is gone"
    await ask(traced, FROM_CALLER)
    [span] = await spans(collector, last="text_completion")
    assert (span.is_error, span.attributes["toppings.outcome"]) == (True, "error")


async def test_a_caller_that_samples_decides(traced: Server, collector: Collector) -> None:
    await ask(traced, NOT_SAMPLED)
    await ask(traced, {"traceparent": "nonsense"})
    await until(lambda: collector.spans)
    assert not collector.of(TRACE)  # the other one began a trace of its own


async def test_no_collector_costs_no_request(server: Server, tmp_path: Path) -> None:
    config = Config.from_settings({"otlp_traces_endpoint": "http://127.0.0.1:9"}, server.state.config)
    with keeping_records(server.app, config, tmp_path):
        assert (await ask(server, FROM_CALLER)).status_code == 200


async def test_a_router_stands_between_its_caller_and_its_server(
    traced: Server, url: str, collector: Collector
) -> None:
    config = RouterConfig(
        instances=(InstanceConfig(url=url, instance_id="s0"),), port=0, otlp_traces_endpoint=collector.url
    )
    async with running_router(config) as (_, address), httpx.AsyncClient(base_url=address) as http:
        body = {"prompt": "hello", "max_tokens": 2}
        await http.post("/v1/completions", json=body, headers=FROM_CALLER)
        found = {span.name: span for span in await spans(collector, last="route")}
        await until(lambda: {"text_completion base"} <= {span.name for span in collector.of(TRACE)})
    found = {span.name: span for span in collector.of(TRACE)}
    route, attempt = found["route /v1/completions"], found["attempt"]
    assert (route.parent, route.kind, route.service) == (CALLER, SERVER, "toppings-router")
    assert (attempt.parent, attempt.kind) == (route.id, CLIENT)
    assert attempt.attributes["toppings.instance"] == route.attributes["toppings.instance"] == "s0"
    assert route.attributes["toppings.policy"] == "rank_aware"
    assert found["text_completion base"].parent == attempt.id


async def test_a_router_tells_of_every_server_that_it_tried(
    traced: Server, url: str, collector: Collector
) -> None:
    servers = {"gone": "http://127.0.0.1:9", "s0": url}
    instances = tuple(InstanceConfig(url=at, instance_id=name) for name, at in servers.items())
    config = RouterConfig(instances=instances, policy="first_fit", port=0, otlp_traces_endpoint=collector.url)
    async with running_router(config) as (router, address), httpx.AsyncClient(base_url=address) as http:
        router.state.upstreams["gone"].is_alive = True
        router.state.fleet.is_open[:] = True
        reply = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=FROM_CALLER)
        assert reply.status_code == 200
        await spans(collector, last="route")
    tried = [span for span in collector.of(TRACE) if span.name == "attempt"]
    assert {span.attributes["toppings.instance"] for span in tried} <= set(servers)
    assert [span.is_error for span in tried] == [*[True] * (len(tried) - 1), False]


FAILURES: dict[str, dict[str, object]] = {
    "ok": {"model": "nobody"},
    "error": {},
    "cut": {"stream": True},
    "hang": {"stream": True},  # and the client leaves
    "gone": {},
}
"""How a server behaves, and what it is asked."""


async def test_a_routers_spans_say_what_failed_and_who_left(collector: Collector) -> None:
    fake = FakeVllm()
    with serving_fake(fake) as url:
        config = RouterConfig(
            instances=(InstanceConfig(url=url, instance_id="s0"),),
            port=0,
            otlp_traces_endpoint=collector.url,
            health_interval_s=3600.0,  # one that hangs is not found to be down before its client leaves
            health_timeout_s=PATIENCE_S,
        )
        async with running_router(config) as (router, address), httpx.AsyncClient(base_url=address) as http:
            told = {mode: await _failed(mode, fake, router, http, collector) for mode in FAILURES}

    def status(span: Received) -> tuple[object, bool]:
        return span.attributes.get("http.response.status_code"), span.is_error

    assert {mode: status(spans["route"]) for mode, spans in told.items()} == {
        **{"ok": (404, False), "error": (500, True), "cut": (200, True)},
        **{"hang": (499, False), "gone": (503, True)},
    }
    outcomes = {mode: spans["route"].attributes["toppings.outcome"] for mode, spans in told.items()}
    assert outcomes == {
        **{"ok": "refused", "error": "error", "cut": "cut", "gone": "error", "hang": "abort"},
    }
    assert "nobody" in str(told["ok"]["route"].attributes["toppings.error"])
    assert {mode: status(spans["attempt"]) for mode, spans in told.items() if "attempt" in spans} == {
        **{"error": (500, True), "cut": (200, True), "hang": (None, True)},
    }


async def _failed(
    mode: str, fake: FakeVllm, router: Router, http: httpx.AsyncClient, collector: Collector
) -> dict[str, Received]:
    """The spans of one request, by the first words of their names."""
    trace = f"{list(FAILURES).index(mode) + 1:032x}"
    fake.behaviour.mode = mode
    router.state.fleet.is_open[:] = mode != "gone"
    body = {"prompt": "a", "max_tokens": 4, **FAILURES[mode]}
    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
    num_seen = len(fake.seen)
    asking = asyncio.create_task(http.post("/v1/completions", json=body, headers=headers, timeout=PATIENCE_S))
    if mode == "hang":
        await until(lambda: len(fake.seen) > num_seen)
        asking.cancel()
    await asyncio.wait({asking})
    await until(lambda: any(span.name.startswith("route") for span in collector.of(trace)))
    return {span.name.split()[0]: span for span in collector.of(trace)}


def test_a_cold_start_is_seen_layer_by_layer(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(tmp_path / "adapters", DEMO, AdapterShape(ranks=(64,), targets=MODULES), count=1)
    options = ("--mode", "cpu_assisted", "--link-gbps", "0.01", "--adapters", str(tmp_path / "adapters"))
    chunks = ("--max-num-batched-tokens", "32", "--max-num-seqs", "4")
    serving = Serving(tmp_path, *options, *chunks, "--otlp-traces-endpoint", collector.url)
    try:
        body = {"model": "adapter-00000", "prompt": "word " * 60, "max_tokens": 2, "temperature": 0}
        reply = httpx.post(f"{serving.url}/v1/completions", json=body, headers=FROM_CALLER, timeout=60)
        assert reply.status_code == 200, reply.text
        record = httpx.get(f"{serving.url}/cold_starts").json()["cold_starts"][0]["cold_start"]
        wait_until(lambda: any(span.parent == CALLER for span in collector.of(TRACE)))
    finally:
        serving.close()
    found = collector.of(TRACE)
    [whole] = [span for span in found if span.parent == CALLER]
    assert whole.attributes["toppings.adapter"] == "adapter-00000"
    assert whole.attributes["toppings.start"] == "cold"

    def named(name: str) -> list[Received]:
        return [span for span in found if span.name == name and span.parent == whole.id]

    [queue], [read], [load] = named("queue"), named("adapter read"), named("adapter load")
    copies, slices, steps = named("adapter copy"), named("adapter cpu"), named("prefill step")
    assert (load.attributes["toppings.rank"], load.attributes["toppings.tier"]) == (64, "disk")
    assert read.end <= queue.end <= steps[0].start
    assert len(steps) == len(record["steps"]) > 1
    assert [span.attributes["toppings.tokens"] for span in steps] == [
        s["num_tokens"] for s in record["steps"]
    ]
    landed = [layer for layer in record["layers"] if layer["load"] is not None]
    assert len(copies) == len({layer["load"]["to_ms"] for layer in landed})
    assert {span.attributes["toppings.layer"] for span in slices} == {
        i for i, layer in enumerate(record["layers"]) if layer["num_slices"]
    }
    assert slices
    assert all(span.attributes["toppings.slices"] for span in slices)
    assert all(whole.start <= span.start <= span.end <= whole.end for span in [queue, read, *copies, *steps])


def test_the_endpoint_is_a_url_with_otlps_path_where_it_has_none() -> None:
    assert check_endpoint("http://c:4318") == check_endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert check_endpoint("https://c/own/path") == "https://c/own/path"
    for wrong in ("c:4318", "grpc://c:4317", "http://"):
        with pytest.raises(ConfigError, match="otlp_traces_endpoint is"):
            check_endpoint(wrong)


def test_it_is_off_by_default() -> None:
    assert not open_tracing(Config().server.otlp_traces_endpoint, "toppings").is_on
    assert not open_tracing(RouterConfig().otlp_traces_endpoint, "toppings").is_on
    headers: dict[str, str] = {}
    Tracing().serve("a", FROM_CALLER, 0, {}).inject(headers)
    assert headers == {}
