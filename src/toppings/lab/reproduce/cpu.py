"""Fig. 12, right (shared memory against sockets), and Fig. 17 (LoRA on CPU cores): measured here."""

import os
from pathlib import Path
from typing import Any

from toppings.lab.cpu import ipc
from toppings.lab.figures import new_figure
from toppings.lab.reproduce import published
from toppings.lab.reproduce.output import NOT_PUBLISHED, Claim, Reproduction, write


def write_ipc(times: ipc.RoundTimes, floors_us: dict[str, float], out: Path) -> None:
    figure, axes = new_figure(1, width=6.5)
    ipc.draw(axes[0, 0], times)
    outcome = Reproduction(
        name="ipc",
        published="Fig. 12, right",
        claims=_ipc_claims(times),
        differs=[
            f"{os.cpu_count()} cores; with fewer than receivers + 1, times hold the scheduler's share",
            "rounds there and back of rows of 4096 16-bit numbers, each receiver reading them all",
        ],
        data={"us": times, "floor_us": floors_us},
    )
    write(out, outcome, figure)


def _ipc_claims(times: ipc.RoundTimes) -> list[Claim]:
    """Per number of rows: the time with most receivers, and how it grew from the fewest."""
    claims = []
    for rows in dict.fromkeys(label.split(", ")[0] for label in times):
        labels = [label for label in times if label.startswith(f"{rows}, ")]
        fewest, most = labels[0], labels[-1]
        for way in times[most]:
            growth = times[most][way] / times[fewest][way]
            if way == ipc.SHARED_MEMORY:
                there = f"under {published.SHARED_MEMORY_MS:g} ms, nearly constant"
            else:
                there = "grows linearly with the receivers"
            num_fewest = fewest.split(", ")[1].split()[0]
            text = f"{times[most][way] / 1e3:.2f} ms, {growth:.1f}x that with {num_fewest}"
            claims.append(Claim(f"{most}, {way}", there, text))
    return claims


def write_cpu(measured: dict[str, Any], out: Path) -> None:
    from toppings.lab.cpu import lora as cpu_lora

    figure, axes = new_figure(1, width=6.5)
    cpu_lora.draw(axes[0, 0], measured["times"])
    outcome = Reproduction(
        name="cpu",
        published="Fig. 17",
        claims=_cpu_claims(measured),
        differs=[
            f"{measured['num_cores']} cores of this machine; published: {published.CPU_SPEEDUP_CORES}",
            f"rank {measured['rank']}, {measured['dtype']}, q, k and v of hidden size {measured['hidden']}",
        ],
        data=measured,
    )
    write(out, outcome, figure)


def _cpu_claims(measured: dict[str, Any]) -> list[Claim]:
    claims = []
    for label, row in measured["times"].items():
        if label.endswith(f", {measured['num_cores']} cores"):
            is_published = label.startswith(f"{published.CPU_SPEEDUP_TOKENS} ")
            there = f"{published.CPU_SPEEDUP}x with {published.CPU_SPEEDUP_CORES} cores"
            text = f"{row['torch_ms'] / row['workers_ms']:.2f}x ({row['workers_ms']:.2f} ms)"
            quantity = f"one process per core over torch's threads, {label}"
            claims.append(Claim(quantity, there if is_published else NOT_PUBLISHED, text))
    return claims
