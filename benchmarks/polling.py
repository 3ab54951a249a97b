"""What a poll costs a server with many adapters: processor time of the event loop and of the engine's thread.

    python benchmarks/polling.py          # 10,000 adapters registered, 1,000 on the device
    python benchmarks/polling.py --toy

Starts `toppings serve` over the built-in demo with adapters of rank 8, asks some of them for a token, then
polls each route over one connection. Processor times of the two threads are the kernel's, so
that what else runs on the machine counts little; what the engine does while nobody asks is part of them. Ends
in one JSON line with the aims: below 1 ms of the engine's thread and 5 ms of the loop a poll.
"""

import http.client
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hostile.results import aim, finish
from hostile.served import ENGINE, Served

from toppings.demo import demo_model_dir
from toppings.lab.script import make_parser, parse
from toppings.synth import AdapterShape, write_adapters

ROUTES = ("/stats", "/metrics", "/health", "/ready")
ENGINE_MS, LOOP_MS = 1.0, 5.0
START_TIMEOUT_S = 3600.0
NUM_CLIENTS = 8
OPTIONS = (
    *("--num-threads", "1", "--max-model-len", "256", "--kv-cache-bytes", "64MB"),
    *("--device-pool-bytes", "512MB", "--host-store-bytes", "1GB"),
)


def main() -> int:
    parser = make_parser(__doc__, "few adapters and polls")
    parser.add_argument("--adapters", type=int, default=10_000, help="how many are registered")
    parser.add_argument("--resident", type=int, default=1000, help="how many of them are on the device")
    parser.add_argument("--polls", type=int, default=300, help="of each route")
    args = parse(parser)
    if args.toy:
        args.adapters, args.resident, args.polls = 12, 6, 10
    with tempfile.TemporaryDirectory(prefix="toppings-polling-") as name:
        write_adapters(
            Path(name) / "adapters", demo_model_dir(), AdapterShape(ranks=(8,)), count=args.adapters
        )
        chosen = ("--model", str(demo_model_dir()), "--adapters", str(Path(name) / "adapters"))
        served = Served(Path(name) / "server", *OPTIONS, *chosen)
        try:
            served.wait_until_ready(START_TIMEOUT_S)
            result = measure(served, args.resident, args.polls)
        finally:
            served.close()
    result = {"benchmark": "polling", "registered": args.adapters, **result}
    result["aims"] = [] if args.toy else judge(result)
    return finish(result, args.json)


def measure(served: Served, num_resident: int, num_polls: int) -> dict[str, Any]:
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        names = [f"adapter-{number:05}" for number in range(num_resident)]
        statuses = list(clients.map(lambda name: served.complete(name, max_tokens=1)[0], names))
    assert statuses == [200] * num_resident, (set(statuses), served.tail())
    engine, stats = served.find(ENGINE), served.wait_until_idle()
    assert engine is not None
    places = [adapter["device_layers"] == adapter["num_layers"] for adapter in stats["adapters"]]
    pids = {"loop": served.process.pid, "engine": engine.pid}
    return {
        "resident": sum(places),
        "polls": num_polls,
        "ms": {route: poll(served, route, num_polls, pids) for route in ROUTES},
    }


def poll(served: Served, route: str, num_polls: int, pids: dict[str, int]) -> dict[str, float]:
    """Processor time a poll, in ms, of these processes' main threads."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    before: dict[str, float] = {}
    for number in range(num_polls + 1):
        if number == 1:  # the first one tells the engine's changes
            before = {name: main_thread_ms(pid) for name, pid in pids.items()}
        connection.request("GET", route)
        reply = connection.getresponse()
        content = reply.read()
        assert reply.status == 200, content
    connection.close()
    return {name: (main_thread_ms(pid) - before[name]) / num_polls for name, pid in pids.items()}


def main_thread_ms(pid: int) -> float:
    """Processor time since the thread's start."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e6


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        aim(f"{route}, ms of the {name}", times[name], limit)
        for route, times in result["ms"].items()
        for name, limit in (("engine", ENGINE_MS), ("loop", LOOP_MS))
    ]


if __name__ == "__main__":
    sys.exit(main())
