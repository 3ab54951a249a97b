"""Fires odd requests and bad adapters at a server, and measures what it does meanwhile and afterwards."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hostile.from_schema import draw_from_schema
from hostile.probe import HealthProbe
from hostile.routes import known_routes
from hostile.served import Served, Usage
from hostile.shots import draw_shots
from hostile.volley import Reply, Report, fault_of, fire, reason
from hostile.workshop import Kind, Workshop
from toppings.adapters.layout import BaseShapes
from toppings.demo import demo_model_dir
from toppings.model.config import ModelConfig

CONCURRENCY = 4
WARM_UP_SHOTS = 200
SETTLE_S = 1.0
SHARE_OF_SCHEMA = 0.05
"""Of the requests, those that are drawn from the OpenAPI document: slow to draw."""
DEMO_OPTIONS = ("--num-threads", "1", "--max-model-len", "256")
"""Odd values ask for the longest answer that there may be; a short context keeps those short."""


def demo_workshop() -> Workshop:
    return Workshop(BaseShapes(*ModelConfig.from_checkpoint(demo_model_dir()).base_shapes()))


def warm(served: Served, num_shots: int = WARM_UP_SHOTS) -> None:
    """Every model has answered, and every code path's memory is there."""
    for card in served.ask("/v1/models")[1]["data"]:
        served.complete(card["id"])
    served.ask("/v1/completions", {"prompt": "Hello.", "max_tokens": 4, "guided_regex": "[a-z]+"})
    routes = known_routes(served.ask("/openapi.json")[1])
    warming = draw_shots(routes, seed=-1, count=num_shots)
    asyncio.run(fire(served.port, warming, concurrency=CONCURRENCY, limit_s=60.0))
    settle(served)


def settle(served: Served) -> Usage:
    served.wait_until_idle()
    time.sleep(SETTLE_S)
    return served.usage()


def fuzz_requests(served: Served, count: int, *, seed: int = 0, limit_s: float) -> dict[str, Any]:
    """`count` odd requests. The result's `failures` say what no server may do."""
    document = served.ask("/openapi.json")[1]
    from_schema = draw_from_schema(document, served.url, int(count * SHARE_OF_SCHEMA), number=seed)
    shots = draw_shots(known_routes(document), seed, count - len(from_schema))
    report = Report()
    with HealthProbe(served.port) as probe:
        for volley in (from_schema, shots):
            part = asyncio.run(fire(served.port, volley, concurrency=CONCURRENCY, limit_s=limit_s))
            report.sent += part.sent
            report.partial += part.partial
            report.statuses.update(part.statuses)
            report.failures += part.failures
            report.slowest += part.slowest
    return {
        "sent": report.sent,
        "from_schema": len(from_schema),
        "never_whole": report.partial,
        "statuses": {str(status): number for status, number in sorted(report.statuses.items())},
        "failures": report.failures,
        "slowest": [[round(seconds, 3), name[:120]] for seconds, name in sorted(report.slowest)[:-11:-1]],
        "health_ms": probe.summary(),
        "health_refused": sum(status != 200 for status in probe.statuses),
    }


def fuzz_adapters(
    served: Served, shop: Workshop, folder: Path, kinds: Sequence[Kind], *, limit_s: float
) -> dict[str, Any]:
    """Each kind is loaded over HTTP, from `folder`, and unloaded where it was taken."""
    failures: list[str] = []
    refused, taken = 0, 0
    slowest = (0.0, "")
    with HealthProbe(served.port) as probe:
        for number, kind in enumerate(kinds):
            path = folder / f"kind-{number}"
            kind.make(shop, path)
            started_at = time.perf_counter()
            try:
                status, content = served.load("odd", path)
            except OSError as error:
                failures.append(f"{kind.name}: no answer: {error!r}")
                continue
            slowest = max(slowest, (time.perf_counter() - started_at, kind.name))
            if slowest[0] > limit_s and slowest[1] == kind.name:
                failures.append(f"{kind.name}: answered {status} after {slowest[0]:.1f} s")
            if status == 200:
                taken += 1
                failures += _served_well(served, kind)
            else:
                refused += 1
                failures += _refused_well(kind, status, content)
    return {
        **{"kinds": len(kinds), "refused": refused, "served": taken, "failures": failures},
        **{"slowest": list(slowest), "health_ms": probe.summary()},
    }


def _served_well(served: Served, kind: Kind) -> list[str]:
    faults = []
    if (status := served.complete("odd")[0]) != 200:
        faults.append(f"{kind.name}: was taken, then answers {status}")
    if (status := served.ask("/v1/unload_lora_adapter", {"lora_name": "odd"})[0]) != 200:
        faults.append(f"{kind.name}: cannot be unloaded: {status}")
    return faults


def _refused_well(kind: Kind, status: int, content: Any) -> list[str]:
    reply = Reply(
        status, "", json.dumps(content).encode() if not isinstance(content, str) else content.encode()
    )
    if kind.must_serve:
        return [f"{kind.name}: refused with {status}: {reason(reply)[:200]}"]
    if (fault := fault_of(reply)) is not None:
        return [f"{kind.name}: {fault}"]
    return [] if reason(reply) else [f"{kind.name}: refused with {status} without a reason"]
