"""What the router costs: added latency, and short streaming requests a second on one core.

A stand-in server answers at once with 16 small events, in two ways: in a `burst`, and `paced`, an event every
2 ms, each of which the router has to pass on by itself, as it has to with a model's tokens. The same requests
go to it directly and through a router. Latency is measured one request at a time, the two ways in turn; the
router's rate with many at once. The aims: at most 2 ms more at the median, at least 400 requests/s.

Server, router and load generator are processes of their own; where there are two cores or more, the router
has one to itself and the others share the rest. `router_busy` is how much of its core the router used while
its rate was measured: where it is well below 1, something else was the limit. `router_cpu_ms` is its
processor time per request, which does not depend on what else the machine does. Ends in one JSON line.
"""

import asyncio
import json
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import aiohttp
from aiohttp import web

from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.lab.child import Child, child
from toppings.lab.script import finish, make_parser, parse

NUM_EVENTS = 16
EVENT = (
    b'data: {"id":"c","object":"text_completion","model":"base","choices":[{"index":0,"text":"tok "}]}\n\n'
)
LAST = b"data: [DONE]\n\n"
ANSWER = EVENT * NUM_EVENTS + LAST
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Pattern:
    """How the stand-in answers: ms between two events, requests at once when the rate is measured."""

    name: str
    gap_ms: float
    concurrency: int

    @property
    def body(self) -> bytes:
        fields = {"model": "base", "prompt": "hello there, how are you today?", "max_tokens": NUM_EVENTS}
        return json.dumps({**fields, "stream": True, "gap_ms": self.gap_ms}).encode()


PATTERNS = (Pattern("burst", 0.0, 32), Pattern("paced", 2.0, 64))


# --- processes; each tells its URL, and answers "cpu" with the processor time it has used ---


async def complete(request: web.Request) -> web.StreamResponse:
    gap_s = json.loads(await request.read())["gap_ms"] / 1e3
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(NUM_EVENTS):
        await response.write(EVENT)
        await asyncio.sleep(gap_s)
    await response.write(LAST)
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
    await tell(pipe, f"http://127.0.0.1:{runner.addresses[0][1]}")
    await runner.cleanup()


async def serve_router(pipe: Connection, url: str) -> None:
    config = RouterConfig(instances=(InstanceConfig(url=url),), port=0)
    async with running_router(config) as (_, router_url):
        await tell(pipe, router_url)


async def tell(pipe: Connection, url: str) -> None:
    pipe.send(url)
    while await asyncio.to_thread(pipe.recv) == "cpu":
        pipe.send(time.process_time())


# --- measurements ---


async def one(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[float, float, int]:
    """ms until the answer's first bytes and until its end, and in how many pieces it came."""
    started_at = time.perf_counter()
    pieces, first_ms = [], 0.0
    async with session.post(f"{url}/v1/completions", data=body, headers=JSON) as response:
        async for piece in response.content.iter_any():
            first_ms = first_ms or (time.perf_counter() - started_at) * 1e3
            pieces.append(piece)
    assert b"".join(pieces) == ANSWER, pieces[-1:]
    return first_ms, (time.perf_counter() - started_at) * 1e3, len(pieces)


async def measure_latency(
    session: aiohttp.ClientSession, direct: str, routed: str, body: bytes, count: int
) -> dict[str, float]:
    """Medians, the two taking turns so that drift of the machine hits them alike."""
    pairs = [[await one(session, url, body) for url in (direct, routed)] for _ in range(count)]
    columns = [list(zip(*times)) for times in zip(*pairs)]
    (direct_first, direct_ms, direct_pieces), (routed_first, routed_ms, routed_pieces) = (
        [median(column) for column in side] for side in columns
    )
    return {
        "direct_ms": direct_ms,
        "routed_ms": routed_ms,
        "added_ms": routed_ms - direct_ms,
        "added_first_ms": routed_first - direct_first,
        "direct_pieces": direct_pieces,
        "routed_pieces": routed_pieces,
    }


async def measure_rate(session: aiohttp.ClientSession, url: str, pattern: Pattern, count: int) -> float:
    """Requests/s."""
    left, body = iter(range(count)), pattern.body

    async def worker() -> None:
        for _ in left:
            await one(session, url, body)

    started_at = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(pattern.concurrency)))
    return count / (time.perf_counter() - started_at)


async def measure(pattern: Pattern, direct: str, routed: str, router: Child, count: int) -> dict[str, float]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await measure_rate(session, routed, pattern, max(pattern.concurrency, count // 10))
        result = await measure_latency(session, direct, routed, pattern.body, count // 4)
        result["direct_requests_per_s"] = await measure_rate(session, direct, pattern, count)
        before = router.ask("cpu")
        rate = await measure_rate(session, routed, pattern, count)
        used = (router.ask("cpu") - before) / count
    return {
        **result,
        "routed_requests_per_s": rate,
        "router_busy": used * rate,
        "router_cpu_ms": used * 1e3,
    }


def main() -> None:
    args = parse(make_parser(__doc__, "few requests"))
    count = 80 if args.toy else 4000
    cores = sorted(os.sched_getaffinity(0))
    router_cores, other_cores = {cores[0]}, set(cores[1:]) or {cores[0]}
    os.sched_setaffinity(0, other_cores)
    result: dict[str, Any] = {"cores": len(cores)}
    with (
        child(serve_stand_in, cores=other_cores) as server,
        child(serve_router, server.told, cores=router_cores) as router,
    ):
        for pattern in PATTERNS:
            figures = asyncio.run(measure(pattern, server.told, router.told, router, count))
            result[pattern.name] = figures
            print(pattern.name)
            for name, value in figures.items():
                print(f"  {name:24s} {value:10.3f}")
    finish(args, "router_proxy", **result)


if __name__ == "__main__":
    main()
