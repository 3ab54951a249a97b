"""What many registered adapters cost a server: start-up, each request, memory.

    python benchmarks/many_adapters.py          # 10,000 adapters of rank 8 for the built-in demo
    python benchmarks/many_adapters.py --toy

Starts `toppings serve` with few and with many registered adapters, in turns, and takes medians: seconds until
it is ready, and milliseconds of a warm request for one token. Then requests adapters at random, with host
and device bounds that hold some dozens, and checks that all are answered and no bound is exceeded. Ends in
one JSON line.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from toppings.config import Config
from toppings.demo import demo_model_dir
from toppings.lab.http.client import LoadClient
from toppings.lab.http.server import free_port, running_server
from toppings.lab.outcome import PlannedCall
from toppings.lab.script import finish, make_parser, parse
from toppings.sources.models import DEMO
from toppings.synth import AdapterShape, write_adapters

NUM_FEW = 10
BOUND_BYTES = 4 * 2**20
NUM_CLIENTS = 16


def main() -> None:
    parser = make_parser(__doc__, "15 adapters and few requests")
    parser.add_argument("--adapters", type=int, default=10_000, help="how many are many")
    parser.add_argument("--requests", type=int, default=1000, help="random requests")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server after the first")
    parser.add_argument("--warm-requests", type=int, default=100, help="of one adapter, one after another")
    args = parse(parser)
    if args.toy:
        args.adapters, args.requests, args.rounds, args.warm_requests = 15, 10, 0, 5
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(run(Path(directory), args))
    finish(args, "many_adapters", **result)


async def run(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    cases = {"few": min(NUM_FEW, args.adapters), "many": args.adapters}
    for case, count in cases.items():
        write_adapters(directory / case, demo_model_dir(), AdapterShape(ranks=(8,)), count=count)
    samples: dict[str, dict[str, list[float]]] = {case: {"ready_s": [], "request_ms": []} for case in cases}
    load: dict[str, Any] = {}
    for number in range(1 + args.rounds):
        for case, count in cases.items():
            started_at = time.perf_counter()
            async with running_server(config_of(directory, case)) as client:
                samples[case]["ready_s"].append(time.perf_counter() - started_at)
                samples[case]["request_ms"].append(await warm_request_ms(client, args.warm_requests))
                if case == "many" and number == args.rounds:
                    load = await random_requests(client, count, args.requests)
    register_s = {case: values["ready_s"][0] for case, values in samples.items()}
    for values in samples.values():
        values["ready_s"] = values["ready_s"][1:] or values["ready_s"]
    medians = {case: {k: statistics.median(v) for k, v in values.items()} for case, values in samples.items()}
    return {
        "adapters": cases,
        "register_s": register_s,
        **medians,
        "ready_s_more": medians["many"]["ready_s"] - medians["few"]["ready_s"],
        "request_ms_more": medians["many"]["request_ms"] - medians["few"]["request_ms"],
        **load,
    }


def config_of(directory: Path, case: str) -> Config:
    return Config.from_settings(
        {
            "model": DEMO,
            "port": free_port(),
            "adapters": str(directory / case),
            "state_dir": str(directory / f"{case}.state"),
            "log_dir": str(directory / "logs" / case),
            "host_store_bytes": BOUND_BYTES,
            "device_pool_bytes": BOUND_BYTES // 2,
        }
    )


async def complete(client: LoadClient, number: int) -> float:
    """ms of a request for one token."""
    outcome = await client.send(PlannedCall(f"adapter-{number:05d}", "Tell me", 1))
    assert outcome.error is None, outcome.error
    return outcome.e2e_ms


async def warm_request_ms(client: LoadClient, num_requests: int) -> float:
    """Median of requests, one after another, for one adapter that is on the device."""
    return statistics.median([await complete(client, 0) for _ in range(num_requests)])


async def random_requests(client: LoadClient, num_adapters: int, num_requests: int) -> dict[str, Any]:
    """Distinct adapters in random order, several at a time."""
    numbers = random.Random(0).sample(range(num_adapters), min(num_requests, num_adapters))
    left = iter(numbers)

    async def ask() -> None:
        for number in left:
            await complete(client, number)

    await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS)))
    stats = await client.get("/stats")
    assert stats["host_bytes_used"] <= BOUND_BYTES
    assert stats["device_bytes_used"] <= BOUND_BYTES // 2
    return {
        "random_requests": len(numbers),
        "host_bytes_used": stats["host_bytes_used"],
        "device_bytes_used": stats["device_bytes_used"],
        "bounds_bytes": {"host": BOUND_BYTES, "device": BOUND_BYTES // 2},
        "counters": stats["counters"],
    }


if __name__ == "__main__":
    main()
