"""Odd requests by the thousand and every kind of bad adapter, against a demo server of its own.

The aims: no 5xx but 503 and 507, each with its reason; nothing takes longer than 2 s; /health answers within
100 ms at all times; memory comes back within 5 %; no request stays open, and a good one is served afterwards.
Seeds are fixed: the same command sends the same requests. Ends in one JSON line; the exit code is 1 where an
aim is missed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hostile.adapters import ADAPTER_KINDS
from hostile.fuzzing import (
    DEMO_OPTIONS,
    WARM_UP_SHOTS,
    demo_workshop,
    fuzz_adapters,
    fuzz_requests,
    settle,
    warm,
)
from hostile.results import aim, finish
from hostile.served import Served

LIMIT_S = 2.0
HEALTH_MS = 100.0
MAX_GROWTH_PERCENT = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="odd requests to send")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="few requests and adapters: checks that it runs")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    count, kinds = (40, ADAPTER_KINDS[::40]) if args.toy else (args.requests, ADAPTER_KINDS)
    with tempfile.TemporaryDirectory(prefix="toppings-fuzz-") as name:
        roots = Path(name) / "roots"
        roots.mkdir()
        with Served(Path(name) / "server", *DEMO_OPTIONS, "--adapter-roots", str(roots)) as served:
            result = measure(served, roots, count, kinds, args.seed)
    result["aims"] = [] if args.toy else judge(result)
    return finish(result, args.json)


def measure(served: Served, roots: Path, count: int, kinds: Any, seed: int) -> dict[str, Any]:
    warm(served, min(count, WARM_UP_SHOTS))
    before, started_at = served.usage(), time.time()
    requests = fuzz_requests(served, count, seed=seed, limit_s=LIMIT_S)
    after_requests = settle(served)
    adapters = fuzz_adapters(served, demo_workshop(), roots, kinds, limit_s=LIMIT_S)
    after = settle(served)
    return {
        "benchmark": "fuzz",
        "requests": requests,
        "adapters": adapters,
        "usage": {
            **{"before": before.as_dict(), "after_requests": after_requests.as_dict()},
            "after": after.as_dict(),
        },
        "growth_percent": before.growth_percent(after)["rss_bytes"],
        "serves_afterwards": served.complete()[0] == 200,
        "seconds": time.time() - started_at,
    }


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    requests, adapters = result["requests"], result["adapters"]
    return [
        aim("requests that were not answered as they must be", len(requests["failures"]), 0),
        aim("adapters that were not answered as they must be", len(adapters["failures"]), 0),
        aim("slowest answer, s", requests["slowest"][0][0], LIMIT_S),
        aim("/health at most, ms", max(part["health_ms"]["max"] for part in (requests, adapters)), HEALTH_MS),
        aim("memory that did not come back, %", result["growth_percent"], MAX_GROWTH_PERCENT),
        aim("good requests that are not served afterwards", int(not result["serves_afterwards"]), 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
