"""The same load in real time: load generator, router and stand-ins in processes of their own.

All times are stretched by `slowdown` (steps, loads, arrivals, SLO) so that few cores carry many servers, and
what is observed is divided by it again.
"""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from aiohttp import web

from stand_in.app import HttpServer
from stand_in.load import Load
from stand_in.results import Observed
from stand_in.server import Server
from toppings.cluster.perf_model import LinearModel, PerfModel
from toppings.cluster.placement import NO_PLACEMENT
from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.lab.child import child
from toppings.lab.http.apis import CompletionsApi
from toppings.lab.http.client import LoadClient
from toppings.lab.outcome import Outcome
from toppings.lab.players.http import HttpPlayer
from toppings.lab.summary import Stats

TIMEOUT_S = 600.0
ENDS = ("answered", "refused", "rejected", "cut", "abort", "error")


@dataclass(frozen=True)
class Stretched:
    """`model` and `slo_ms` as the servers and the router are told them."""

    model: PerfModel
    slo_ms: float
    slowdown: float

    @classmethod
    def of(cls, model: PerfModel, slo_ms: float, slowdown: float) -> "Stretched":
        return cls(stretched(model, slowdown), slo_ms * slowdown, slowdown)


def stretched(model: PerfModel, slowdown: float) -> PerfModel:
    """Steps and loads take so many times as long."""

    def slower(forms: dict[str, LinearModel]) -> dict[str, LinearModel]:
        return {
            name: LinearModel({key: value * slowdown for key, value in form.coefficients.items()})
            for name, form in forms.items()
        }

    return replace(
        model,
        decode_forms=slower(model.decode_forms),
        prefill_forms=slower(model.prefill_forms),
        link_gbps=model.link_gbps / slowdown if model.link_gbps else None,
        disk_gbps=model.disk_gbps / slowdown if model.disk_gbps else None,
    )


def observe(
    load: Load,
    policy: str,
    time: Stretched,
    *,
    num_servers: int,
    device_adapters: int,
    seed: int,
    placement: str = NO_PLACEMENT,
    num_copies: int = 2,
) -> Observed:
    """Raises RuntimeError where a process ends early; AssertionError where requests do not add up."""
    with child(_serve_stand_ins, time.model, load.ranks, num_servers, device_adapters) as servers:
        config = RouterConfig(
            instances=tuple(InstanceConfig(url=url) for url in servers.told),
            port=0,
            policy=policy,
            placement=placement,
            num_copies=num_copies,
            slo_tpt_ms=time.slo_ms,
            seed=seed,
            response_tokens=load.mean_response,
            first_token_timeout_s=TIMEOUT_S,
            log_level="warning",
        )
        with child(_serve_router, config) as router:
            client = LoadClient(router.told, CompletionsApi(ignores_eos=True), timeout_s=TIMEOUT_S)
            outcomes = HttpPlayer(client).play(load.trace.scaled_to(load.trace.rate / time.slowdown))
            ends = router.ask("counts")
        told = servers.ask("counts")
    answered = [outcome for outcome in outcomes if outcome.error is None]
    counts = {"sent": len(load.trace), "answered": len(answered), "refused": ends["refused"]}
    _check(load, outcomes, counts, ends, told)
    real = [
        replace(
            outcome,
            sent_at=at,
            e2e_ms=outcome.e2e_ms / time.slowdown,
            ttft_ms=outcome.ttft_ms and outcome.ttft_ms / time.slowdown,
        )
        for outcome, at in zip(outcomes, load.trace.arrivals_s.tolist())
    ]
    details = {"requests": counts, "moved": ends["moved"], "late": told["late"]}
    return Observed(real, told["rank_counts"], details)


def _check(
    load: Load, outcomes: list[Outcome], counts: dict[str, int], ends: dict[str, int], told: dict[str, Any]
) -> None:
    """The client's, the router's and the servers' counts agree, and every answer has all its tokens."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    assert counts["sent"] == counts["answered"] + counts["refused"], f"{counts} {ends} {errors[:3]}"
    assert ends["received"] == counts["sent"], f"the router received {ends['received']} of {counts['sent']}"
    assert ends["answered"] == counts["answered"] == told["num_answered"], f"{counts} {ends} {told}"
    for num_tokens, outcome in zip(load.trace.response_tokens.tolist(), outcomes):
        assert outcome.error is not None or outcome.num_tokens == num_tokens, outcome


# --- processes; each tells where it serves, and when asked, what it counted, and ends ---


async def _serve_stand_ins(
    pipe: Connection, model: PerfModel, ranks: dict[str, int], count: int, device_adapters: int
) -> None:
    servers = [HttpServer(Server(f"s{i}", model, device_adapters), ranks) for i in range(count)]
    async with AsyncExitStack() as stack:
        urls = []
        for server in servers:
            runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        steps = [asyncio.create_task(server.step_for_ever()) for server in servers]
        pipe.send(urls)
        asked = asyncio.create_task(asyncio.to_thread(pipe.recv))
        await asyncio.wait([asked, *steps], return_when=asyncio.FIRST_COMPLETED)
        for step in steps:
            if step.done():
                step.result()  # a fault of ours: it is raised here
            step.cancel()
        late = [ms for server in servers for ms in server.lateness_ms]
        stats = Stats.of(late)
        pipe.send(
            {
                "rank_counts": [server.server.rank_counts for server in servers],
                "num_answered": sum(server.num_answered for server in servers),
                "late": {"mean_ms": stats.mean, "p99_ms": stats.p99, "steps": len(late)},
            }
        )


async def _serve_router(pipe: Connection, config: RouterConfig) -> None:
    async with running_router(config) as (router, url):
        pipe.send(url)
        await asyncio.to_thread(pipe.recv)
        registry, name = router.state.meters.registry, "toppings_router_"
        ends = {end: registry.get_sample_value(f"{name}ended_total", {"outcome": end}) for end in ENDS}
        counts = Counter({end: int(value or 0) for end, value in ends.items()})
        counts["received"] = int(registry.get_sample_value(f"{name}received_total") or 0)
        counts["moved"] = int(registry.get_sample_value(f"{name}moves_total") or 0)
        pipe.send(counts)
