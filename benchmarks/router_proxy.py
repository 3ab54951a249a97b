"""What the router costs: added latency, and short streaming requests a second on one core.

A stand-in server answers at once with 16 small events. The same requests go to it directly and through a
router; server, router and load generator are processes of their own. Latency is measured one request at a
time, throughput with 32 at once. The aim is at most 2 ms more at the median and at least 400 requests/s;
`router_cpu_ms` is the router's processor time per request, which is what limits it on one core and does not
depend on what else the machine does. Ends in one JSON line.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import aiohttp
from aiohttp import web

from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig

NUM_EVENTS = 16
EVENT = (
    b'data: {"id":"c","object":"text_completion","model":"base","choices":[{"index":0,"text":"tok "}]}\n\n'
)
BODY = {
    "model": "base",
    "prompt": "hello there, how are you today?",
    "max_tokens": NUM_EVENTS,
    "stream": True,
}
CONCURRENCY = 32


async def complete(request: web.Request) -> web.StreamResponse:
    await request.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(NUM_EVENTS):
        await response.write(EVENT)
        await asyncio.sleep(0)
    await response.write(b"data: [DONE]\n\n")
    return response


async def answer_ok(request: web.Request) -> web.Response:
    return web.Response()


async def answer_models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "base", "parent": None}]})


async def serve_stand_in(pipe: Connection) -> None:
    app = web.Application()
    app.add_routes(
        [
            web.post("/v1/completions", complete),
            web.get("/health", answer_ok),
            web.get("/v1/models", answer_models),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    pipe.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.to_thread(pipe.recv)
    await runner.cleanup()


async def serve_router(pipe: Connection, url: str) -> None:
    config = RouterConfig(instances=(InstanceConfig(url=url),), port=0)
    async with running_router(config) as (_, router_url):
        pipe.send(router_url)
        while await asyncio.to_thread(pipe.recv) == "cpu":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(usage.ru_utime + usage.ru_stime)


def run_process(serve: Callable[..., Any], *arguments: Any) -> None:
    asyncio.run(serve(*arguments))


def start(serve: Callable[..., Any], *arguments: str) -> tuple[Any, Connection, str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=run_process, args=(serve, theirs, *arguments), daemon=True
    )
    process.start()
    return process, ours, ours.recv()


async def one(session: aiohttp.ClientSession, url: str) -> float:
    started_at = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=BODY) as response:
        body = await response.read()
    assert body.count(b"data:") == NUM_EVENTS + 1, body[-200:]
    return (time.perf_counter() - started_at) * 1e3


async def measure_latency_ms(session: aiohttp.ClientSession, urls: list[str], count: int) -> list[float]:
    """Medians, the servers taking turns so that drift of the machine hits them alike."""
    times = [[await one(session, url) for url in urls] for _ in range(count)]
    return [median(column) for column in zip(*times, strict=True)]


async def measure_rate(session: aiohttp.ClientSession, url: str, count: int) -> float:
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await one(session, url)

    started_at = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    return count / (time.perf_counter() - started_at)


async def measure(direct: str, routed: str, router: Connection, count: int) -> dict[str, float]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await measure_rate(session, routed, max(CONCURRENCY, count // 10))
        direct_ms, routed_ms = await measure_latency_ms(session, [direct, routed], count // 4)
        direct_rate = await measure_rate(session, direct, count)
        router.send("cpu")
        cpu_before = router.recv()
        routed_rate = await measure_rate(session, routed, count)
        router.send("cpu")
        cpu_ms = (router.recv() - cpu_before) / count * 1e3
    return {
        "direct_ms": direct_ms,
        "routed_ms": routed_ms,
        "added_ms": routed_ms - direct_ms,
        "direct_requests_per_s": direct_rate,
        "routed_requests_per_s": routed_rate,
        "router_cpu_ms": cpu_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="few requests: checks that it runs")
    count = 40 if parser.parse_args().toy else 2000
    processes = [start(serve_stand_in)]
    processes.append(start(serve_router, processes[0][2]))
    result = asyncio.run(measure(processes[0][2], processes[1][2], processes[1][1], count))
    for process, pipe, _ in reversed(processes):
        pipe.send("stop")
        process.join(timeout=10)
    for name, value in result.items():
        print(f"{name:24s} {value:10.3f}")
    print(json.dumps({"benchmark": "router_proxy", "cores": os.cpu_count(), **result}))


if __name__ == "__main__":
    main()
