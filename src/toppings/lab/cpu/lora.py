"""LoRA on CPU cores: time by tokens, and by cores, one process a core against torch's own threads.

"workers" is what the engine does: rows are split over worker processes bound to a core each, through shared
memory, and the time ends with the last result. "torch" is the same product in this process with as many
threads. `of_peak` compares the arithmetic rate of all cores with a large square product in the same run and
dtype.
"""

from collections.abc import Callable
from typing import Any

import torch

from toppings.adapters.arena import HostArena
from toppings.assist.coordinator import split_rows
from toppings.assist.cores import WorkerCores, available_cores
from toppings.assist.pool import PoolSettings, Worker, WorkerPool
from toppings.assist.product import Form, GroupWeights, compute
from toppings.lab.cpu import median_s

NUM_MODULES = 3

Times = dict[str, dict[str, float]]
"""By tokens and cores: `workers_ms`, `torch_ms`, `workers_gflops`."""

OnLine = Callable[[str], None]


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


def peak_gflops(dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype)
    product = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=product)

    return 2 * size**3 / median_s(multiply, 5) * 1e-9


def run(
    hidden: int,
    rank: int,
    dtype: torch.dtype,
    tokens: list[int],
    num_rounds: int,
    *,
    on_line: OnLine = lambda _: None,
) -> Times:
    """Medians over the rounds, for 1, 2, 4 … cores up to all that this process may use."""
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
                pool, weights, arena, num_tokens, num_cores, num_rounds, on_line
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
    on_line: OnLine,
) -> dict[str, float]:
    x = torch.ones(num_tokens, weights.num_in, dtype=arena.dtype)
    out = torch.empty(num_tokens, sum(weights.num_outs), dtype=arena.dtype)
    torch.set_num_threads(num_cores)
    torch_ms = 1e3 * median_s(lambda: compute(Form.FULL, weights, x, out, arena), num_rounds)
    torch.set_num_threads(1)
    with pool.session() as workers:
        workers_ms = 1e3 * median_s(lambda: on_workers(workers[:num_cores], weights, x), num_rounds)
    gflop = 2e-9 * num_tokens * sum(weights.ranks) * 2 * weights.num_in
    row = {"workers_ms": workers_ms, "torch_ms": torch_ms, "workers_gflops": gflop / workers_ms * 1e3}
    times_text = f"workers {workers_ms:8.3f} ms, torch {torch_ms:8.3f} ms"
    on_line(f"{num_tokens:4d} tokens, {num_cores:2d} cores: {times_text}")
    return row


def measure(
    *, rank: int = 64, dtype: str = "bfloat16", is_toy: bool = False, on_line: OnLine = lambda _: None
) -> dict[str, Any]:
    """Hidden size 4096 (64 as a toy), with the rate of a large square product beside it."""
    torch_dtype = getattr(torch, dtype)
    hidden, tokens, num_rounds = (64, [4, 16], 2) if is_toy else (4096, [4, 16, 64, 256], 20)
    times = run(hidden, rank, torch_dtype, tokens, num_rounds, on_line=on_line)
    torch.set_num_threads(len(available_cores()))
    peak = peak_gflops(torch_dtype, 64 if is_toy else 2048)
    best = max(row["workers_gflops"] for row in times.values())
    on_line(f"best rate {best:.0f} GFLOP/s, large square product {peak:.0f} GFLOP/s")
    return {
        "rank": rank,
        "dtype": dtype,
        "hidden": hidden,
        "num_cores": len(available_cores()),
        "times": times,
        "peak_gflops": peak,
        "of_peak": best / peak,
    }


def draw(axes: Any, times: Times) -> None:
    """Curves on matplotlib axes, one per way and number of cores."""
    for kind, style in (("workers_ms", "-o"), ("torch_ms", "--x")):
        for cores in dict.fromkeys(label.split(", ")[1] for label in times):
            points = [(int(k.split()[0]), row[kind]) for k, row in times.items() if k.endswith(", " + cores)]
            axes.plot(*zip(*points), style, label=f"{kind.removesuffix('_ms')}, {cores}")
    tokens = list(dict.fromkeys(int(label.split()[0]) for label in times))
    axes.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(tokens, [str(num) for num in tokens])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.legend()
