"""LoRA on CPU cores: time by tokens, and by cores, one process a core against torch's own threads.

    python benchmarks/cpu_lora.py                  # h 4096, q, k and v, rank 64, bf16: a minute
    python benchmarks/cpu_lora.py --toy            # small and short: does the script still work?
    python benchmarks/cpu_lora.py --rank 128 --dtype float32 --json lora.json --figure lora.png

"workers" is what the engine does: rows are split over worker processes bound to a core each, through shared
memory, and the time ends with the last result. "torch" is the same product in this process with as many
threads. `of_peak` compares the arithmetic rate of all cores with a large square product in the same run and
dtype. Ends in one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from toppings.adapters.arena import HostArena
from toppings.assist.coordinator import split_rows
from toppings.assist.cores import WorkerCores, available_cores
from toppings.assist.pool import PoolSettings, Worker, WorkerPool
from toppings.assist.product import Form, GroupWeights, compute

NUM_MODULES = 3

Times = dict[str, dict[str, float]]


def make_weights(hidden: int, rank: int) -> GroupWeights:
    a_offsets = tuple(i * rank * hidden for i in range(NUM_MODULES))
    b_offsets = tuple((NUM_MODULES + i) * rank * hidden for i in range(NUM_MODULES))
    return GroupWeights(hidden, (rank,) * NUM_MODULES, (hidden,) * NUM_MODULES, a_offsets, b_offsets)


def on_workers(workers: list[Worker], weights: GroupWeights, x: torch.Tensor) -> None:
    tickets = []
    for worker, (start, stop) in zip(workers, split_rows(0, x.shape[0], len(workers))):
        worker.recycle()
        ticket = worker.try_post(Form.FULL, weights, x[start:stop])
        assert ticket is not None
        tickets.append(ticket)
    for ticket in tickets:
        assert ticket.worker.wait(ticket.number)


def median_ms(action: Callable[[], None], num_rounds: int) -> float:
    times = []
    for _ in range(num_rounds + 2):
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[2:]) * 1e3


def peak_gflops(dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype)
    product = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=product)

    return 2 * size**3 / median_ms(multiply, 5) * 1e-6


def run(hidden: int, rank: int, dtype: torch.dtype, tokens: list[int], num_rounds: int) -> Times:
    weights = make_weights(hidden, rank)
    arena_bytes = 2 * NUM_MODULES * rank * hidden * dtype.itemsize
    host = HostArena(arena_bytes)
    arena = torch.from_numpy(host.view).view(dtype)
    arena.fill_(0.01)
    cores = available_cores()
    settings = PoolSettings(
        cores=WorkerCores(cores, is_shared=True),
        arena_fd=host.fd,
        arena_bytes=arena_bytes,
        dtype=dtype,
        max_input_bytes=max(tokens) * hidden * dtype.itemsize,
        max_output_bytes=max(tokens) * NUM_MODULES * hidden * dtype.itemsize,
        deadline_s=60.0,
    )
    pool = WorkerPool(settings)
    try:
        pool.wait_ready()
        return {
            f"{num_tokens} tokens, {num_cores} cores": time_both(
                pool, weights, arena, num_tokens, num_cores, num_rounds
            )
            for num_cores in sorted({1, *[2**i for i in range(10) if 2**i <= len(cores)], len(cores)})
            for num_tokens in tokens
        }
    finally:
        pool.close()


def time_both(
    pool: WorkerPool,
    weights: GroupWeights,
    arena: torch.Tensor,
    num_tokens: int,
    num_cores: int,
    num_rounds: int,
) -> dict[str, float]:
    x = torch.ones(num_tokens, weights.num_in, dtype=arena.dtype)
    out = torch.empty(num_tokens, sum(weights.num_outs), dtype=arena.dtype)
    torch.set_num_threads(num_cores)
    torch_ms = median_ms(lambda: compute(Form.FULL, weights, x, out, arena), num_rounds)
    torch.set_num_threads(1)
    with pool.session() as workers:
        workers_ms = median_ms(lambda: on_workers(workers[:num_cores], weights, x), num_rounds)
    gflop = 2e-9 * num_tokens * sum(weights.ranks) * 2 * weights.num_in
    row = {"workers_ms": workers_ms, "torch_ms": torch_ms, "workers_gflops": gflop / workers_ms * 1e3}
    times_text = f"workers {workers_ms:8.3f} ms, torch {torch_ms:8.3f} ms"
    print(f"{num_tokens:4d} tokens, {num_cores:2d} cores: {times_text}")
    return row


def draw(times: Times, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind, style in (("workers_ms", "-o"), ("torch_ms", "--x")):
        for cores in dict.fromkeys(label.split(", ")[1] for label in times):
            points = [(int(k.split()[0]), row[kind]) for k, row in times.items() if k.endswith(", " + cores)]
            axes.plot(*zip(*points), style, label=f"{kind.removesuffix('_ms')}, {cores}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="small and short: checks that it runs")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--figure", type=Path, help="draw curves there (needs matplotlib)")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    hidden, tokens, num_rounds = (64, [4, 16], 2) if options.toy else (4096, [4, 16, 64, 256], 20)
    times = run(hidden, options.rank, dtype, tokens, num_rounds)
    torch.set_num_threads(len(available_cores()))
    peak = peak_gflops(dtype, 64 if options.toy else 2048)
    best = max(row["workers_gflops"] for row in times.values())
    print(f"best rate {best:.0f} GFLOP/s, large square product {peak:.0f} GFLOP/s")
    if options.figure:
        draw(times, options.figure)
    result = {
        "benchmark": "cpu_lora",
        "rank": options.rank,
        "dtype": options.dtype,
        "hidden": hidden,
        "num_cores": len(available_cores()),
        "times": times,
        "peak_gflops": peak,
        "of_peak": best / peak,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
