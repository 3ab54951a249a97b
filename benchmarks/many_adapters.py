"""What many registered adapters cost a server: start-up, each request, memory.

    python benchmarks/many_adapters.py          # 10,000 adapters of rank 8 for the built-in demo
    python benchmarks/many_adapters.py --toy

Starts `toppings serve` with few and with many registered adapters, in turns, and takes medians: seconds until
it is ready, and milliseconds of a warm request for one token. Then requests adapters at random, with host
and device bounds that hold some dozens, and checks that all are answered and no bound is exceeded. Ends in
one JSON line.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from toppings.demo import demo_model_dir
from toppings.synth import AdapterShape, write_adapters

NUM_FEW = 10
BOUND_BYTES = 4 * 2**20
NUM_CLIENTS = 16
START_TIMEOUT_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="30 adapters and few requests")
    parser.add_argument("--adapters", type=int, default=10_000, help="how many are many")
    parser.add_argument("--requests", type=int, default=1000, help="random requests")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server after the first")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.toy:
        args.adapters, args.requests, args.rounds = 30, 20, 0
    with tempfile.TemporaryDirectory() as directory:
        result = run(Path(directory), args.adapters, args.requests, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def run(directory: Path, num_adapters: int, num_requests: int, num_rounds: int) -> dict[str, Any]:
    cases = {"few": min(NUM_FEW, num_adapters), "many": num_adapters}
    for case, count in cases.items():
        write_adapters(directory / case, demo_model_dir(), AdapterShape(ranks=(8,)), count=count)
    samples: dict[str, dict[str, list[float]]] = {case: {"ready_s": [], "request_ms": []} for case in cases}
    load: dict[str, Any] = {}
    for number in range(1 + num_rounds):
        for case, count in cases.items():
            with serve(directory, case) as (client, seconds):
                samples[case]["ready_s"].append(seconds)
                samples[case]["request_ms"].append(warm_request_ms(client))
                if case == "many" and number == num_rounds:
                    load = random_requests(client, count, num_requests)
    register_s = {case: values["ready_s"][0] for case, values in samples.items()}
    for values in samples.values():
        values["ready_s"] = values["ready_s"][1:] or values["ready_s"]
    medians = {case: {k: statistics.median(v) for k, v in values.items()} for case, values in samples.items()}
    return {
        "benchmark": "many_adapters",
        "adapters": cases,
        "register_s": register_s,
        **medians,
        "ready_s_more": medians["many"]["ready_s"] - medians["few"]["ready_s"],
        "request_ms_more": medians["many"]["request_ms"] - medians["few"]["request_ms"],
        **load,
    }


@contextmanager
def serve(directory: Path, case: str) -> Iterator[tuple[httpx.Client, float]]:
    """A server over the adapters of `case`, and the seconds it took until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "toppings", "serve", f"--port={port}", f"--adapters={directory / case}"]
    command += [f"--state-dir={directory / case}.state", f"--log-dir={directory / 'logs'}"]
    command += [f"--host-store-bytes={BOUND_BYTES}", f"--device-pool-bytes={BOUND_BYTES // 2}"]
    started_at = time.perf_counter()
    with (directory / f"{case}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            wait_until_ready(client, process)
            yield client, time.perf_counter() - started_at
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended while it started"
        try:
            if client.get("/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.01)
    raise TimeoutError("the server did not become ready")


def complete(client: httpx.Client, number: int) -> None:
    body = {"model": f"adapter-{number:05d}", "prompt": "Tell me", "max_tokens": 1, "ignore_eos": True}
    client.post("/v1/completions", json=body).raise_for_status()


def warm_request_ms(client: httpx.Client, num_requests: int = 100) -> float:
    """Median of requests, one after another, for one adapter that is on the device."""
    times = []
    for _ in range(num_requests):
        started_at = time.perf_counter()
        complete(client, 0)
        times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times)


def random_requests(client: httpx.Client, num_adapters: int, num_requests: int) -> dict[str, Any]:
    """Distinct adapters in random order, several at a time."""
    numbers = random.Random(0).sample(range(num_adapters), min(num_requests, num_adapters))
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(lambda number: complete(client, number), numbers))
    stats = client.get("/stats").raise_for_status().json()
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
