"""What a large fleet costs its routers, and what routers that know less cost its users: all by simulation.

    python benchmarks/scale.py --json FILE --figure FILE         # everything: half an hour on one core
    python benchmarks/scale.py --studies routers --json FILE     # one study; FILE keeps the others' results
    python benchmarks/scale.py --toy

Servers, lengths, ranks and objective are those of `toppings reproduce simulation`; a study varies one thing
at stated loads per server. `attainment` is a mean over the seeds, `loss` what it is below that of the first
row of the same policy and load. Ends in one JSON line.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from routing_decision import make_fleet, make_request, time_us

from toppings.cluster.policies import PolicySettings, make_policy
from toppings.lab.figures import new_figure
from toppings.lab.reproduce.fleet_runs import FleetSpec
from toppings.lab.script import make_parser, parse
from toppings.lab.simulation.metrics import summarize_run
from toppings.sim.simulator import Simulator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORM = "bgmv"
MILLION = 1_000_000
PNG_COLOURS = 32
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """`fleets`: servers and simulated seconds; the studies of one thing use the first."""

    fleets: tuple[tuple[int, float], ...] = ((60, 60.0), (1000, 20.0), (10_000, 8.0))
    seeds: int = 2
    loads: tuple[float, ...] = (5.67, 7.0)
    num_adapters: int = 40_000
    many_adapters: int = MILLION


FULL = Sizes()
TOY = Sizes(fleets=((4, 3.0), (8, 3.0)), seeds=1, loads=(5.67,), num_adapters=200, many_adapters=1000)


def simulate(
    sizes: Sizes,
    *,
    load: float,
    policy: str = "rank_aware",
    fleet: int = 0,
    num_adapters: int = 0,
    seeds: int = 0,
    workload: dict[str, Any] | None = None,
    **settings: Any,
) -> Row:
    """`load` in requests/s per server; `settings` are of the simulated fleet, `workload` of what arrives."""
    num_instances, duration_s = sizes.fleets[fleet]
    spec = FleetSpec(
        num_instances=num_instances, duration_s=duration_s, num_adapters=num_adapters or sizes.num_adapters
    )
    seeds = seeds or sizes.seeds
    started_at = time.process_time()
    summaries = []
    for seed in range(seeds):
        config = replace(spec.config(FORM, policy, seed), **settings)
        trace = replace(spec.workload(load * num_instances), **(workload or {})).make_trace(seed)
        summaries.append(summarize_run(Simulator(config, trace).run()))
    attainments = [summary.slo_attainment for summary in summaries]
    row = {
        **{"policy": policy, "servers": num_instances, "load": load, **settings, **(workload or {})},
        "attainment": round(float(np.mean(attainments)), 5),
        "least": round(min(attainments), 5),
        "most": round(max(attainments), 5),
        "tpt_ms": round(float(np.mean([s.tpt_ms.mean for s in summaries])), 3),
        "tpt_p99_ms": round(float(np.mean([s.tpt_ms.p99 for s in summaries])), 3),
        "hit_rate": round(float(np.mean([s.adapter_hit_rate for s in summaries])), 4),
        "simulated_s": duration_s,
        "seeds": seeds,
        "cpu_s": round(time.process_time() - started_at, 2),
    }
    print(
        {name: row[name] for name in row if name not in ("least", "most", "simulated_s", "seeds")}, flush=True
    )
    return row


# --- the studies ---


def decision(sizes: Sizes) -> Iterator[Row]:
    """Microseconds of a decision of `rank_aware`, all servers scanned (candidates 0) or some drawn."""
    for num_servers, _ in sizes.fleets:
        fleet, request = make_fleet(num_servers), make_request(Random(1), "new")
        for policy in ("rank_aware", "rank_aware_residency"):
            for candidates in (0, 2, 4, 8, 16):
                decide = make_policy(policy, PolicySettings(50.0, candidates=candidates)).choose
                us = time_us(partial(decide, request, fleet), 20_000 // (num_servers + 40) + 5)
                row = {"policy": policy, "servers": num_servers, "candidates": candidates, "us": round(us, 2)}
                print(row, flush=True)
                yield row


def candidates(sizes: Sizes) -> Iterator[Row]:
    """Attainment by candidates drawn, in fleets of three sizes; in the largest, one seed."""
    for fleet, (num_servers, _) in enumerate(sizes.fleets):
        is_largest = num_servers > 1000
        for load in sizes.loads[-1:] if fleet else sizes.loads:
            for drawn in (0, 8, 2) if is_largest else (0, 64, 16, 8, 4, 2, 1):
                if drawn >= num_servers:
                    continue
                seeds = 1 if fleet else 0
                yield simulate(sizes, load=load, fleet=fleet, candidates=drawn, seeds=seeds)


def snapshots(sizes: Sizes) -> Iterator[Row]:
    """A router that decides on copies of its accounts this old at most, s."""
    for load in sizes.loads:
        for drawn in (0, 4, 2):
            for age in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
                yield simulate(sizes, load=load, candidates=drawn, snapshot_interval_s=age)


def routers(sizes: Sizes) -> Iterator[Row]:
    """Routers that share no state."""
    for load in sizes.loads:
        for drawn in (0, 4, 2):
            for num in (1, 2, 4, 8, 16, 32):
                yield simulate(sizes, load=load, candidates=drawn, num_routers=num)


def bursts(sizes: Sizes) -> Iterator[Row]:
    """Gamma gaps: the index of dispersion is the square of their coefficient of variation, 1 to 13. Over a
    whole fleet that evens out soon; on and off as in the Azure LLM code trace (`code`, no dispersion told)
    does not.
    """
    for load in sizes.loads:
        for policy, drawn in (
            ("rank_aware", 0),
            ("rank_aware", 4),
            ("rank_aware_residency", 0),
            ("random", 0),
        ):
            for dispersion in (1, 4, 9, 13, None):
                arrivals = f"gamma:{dispersion**0.5:.4g}" if dispersion else "code"
                row = simulate(
                    sizes, load=load, policy=policy, candidates=drawn, workload={"arrivals": arrivals}
                )
                yield {**row, "dispersion": dispersion}


def popularity(sizes: Sizes) -> Iterator[Row]:
    """From the published curve to flat, which leaves the pool of a server nothing to keep."""
    for load in sizes.loads:
        for policy in ("rank_aware", "rank_aware_residency", "lora_affinity", "random"):
            for law in ("published", "zipf:1", "uniform"):
                yield simulate(sizes, load=load, policy=policy, workload={"popularity": law})


def adapters(sizes: Sizes) -> Iterator[Row]:
    """Up to a million adapters, each as popular as the others; in the largest fleet too."""
    for policy in ("rank_aware", "rank_aware_residency"):
        for num in (sizes.num_adapters // 40, sizes.num_adapters, sizes.many_adapters):
            flat = {"popularity": "uniform", "num_adapters": num}
            yield simulate(sizes, load=sizes.loads[0], policy=policy, seeds=1, workload=flat)
    flat = {"popularity": "uniform", "num_adapters": sizes.many_adapters}
    yield simulate(sizes, load=sizes.loads[0], fleet=-1, candidates=8, seeds=1, workload=flat)


STUDIES: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "decision": decision,
    "candidates": candidates,
    "snapshots": snapshots,
    "routers": routers,
    "bursts": bursts,
    "popularity": popularity,
    "adapters": adapters,
}
VARIED = {
    "candidates": "candidates",
    "snapshots": "snapshot_interval_s",
    "routers": "num_routers",
    "bursts": "dispersion",
    "popularity": "popularity",
    "adapters": "num_adapters",
}
LABELS = {
    "candidates": "candidates drawn (right end: all scanned)",
    "snapshots": "age of a snapshot, s",
    "routers": "routers that share nothing",
    "bursts": "index of dispersion",
    "popularity": "popularity of adapters",
}


def with_losses(study: str, rows: list[Row]) -> list[Row]:
    """`loss`: attainment below that of the first row that differs in nothing but what the study varies."""
    first: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if "attainment" in row and study in VARIED:
            kept = {"policy", "servers", "load", "candidates"} - {VARIED[study]}
            case = tuple(row.get(name) for name in sorted(kept))
            row["loss"] = round(first.setdefault(case, row["attainment"]) - row["attainment"], 5)
    return rows


# --- the figure ---


def draw(results: dict[str, list[Row]], path: Path) -> None:
    """All studies but `adapters`, as a PNG of few colours, which is small."""
    from PIL import Image

    studies = [name for name in STUDIES if name in results and name != "adapters"]
    num_rows = -(-len(studies) // 3)
    figure, axes = new_figure(3, num_rows, width=4.5, height=3.9)
    for panel in axes.flat[len(studies) :]:
        panel.set_axis_off()
    for panel, study in zip(axes.flat, studies):
        if study == "decision":
            _draw_decision(panel, results[study])
        else:
            _draw_attainment(panel, study, results[study])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=75)
    Image.open(buffer).convert("RGB").quantize(PNG_COLOURS).save(path, optimize=True)


def _draw_decision(axes: "Axes", rows: list[Row]) -> None:
    own = [row for row in rows if row["policy"] == "rank_aware"]
    for drawn in dict.fromkeys(row["candidates"] for row in own):
        points = [(row["servers"], row["us"]) for row in own if row["candidates"] == drawn]
        axes.plot(*zip(*points), marker=".", label=f"{drawn} drawn" if drawn else "all scanned")
    axes.set(xscale="log", yscale="log", xlabel="servers", ylabel="a decision, µs", title="decision")
    axes.legend(fontsize=8)


def _draw_attainment(axes: "Axes", study: str, rows: list[Row]) -> None:
    """At the higher load; one line for each policy and number of candidates, or size of fleet."""
    name = VARIED[study]
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        if row["load"] != max(r["load"] for r in rows) or row[name] is None:
            continue
        label = f"{row['servers']} servers" if study == "candidates" else row["policy"]
        if study != "candidates" and row.get("candidates"):
            label += f", {row['candidates']} drawn"
        where = row["servers"] if name == "candidates" and not row[name] else row[name]
        lines.setdefault(label, []).append((where, 100 * row["attainment"]))
    for label, points in lines.items():
        in_order = points if name == "popularity" else sorted(points)
        axes.plot(*zip(*in_order), marker=".", label=label)
    if study in ("candidates", "routers"):
        axes.set_xscale("log", base=2)
    elif study == "snapshots":
        axes.set_xscale("symlog", linthresh=0.01)
    at = f"{max(row['load'] for row in rows):g} requests/s per server"
    axes.set(xlabel=LABELS[study], ylabel="SLO attainment, %", title=f"{study}, {at}")
    axes.legend(fontsize=7)


def main() -> None:
    parser = make_parser(__doc__, "a few servers and seconds", figure="what there is")
    parser.add_argument("--studies", default=",".join(STUDIES), help="with commas between")
    options = parse(parser)
    sizes = TOY if options.toy else FULL
    results: dict[str, list[Row]] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["studies"]
    for study in options.studies.split(","):
        if study not in STUDIES:
            parser.error(f"unknown study {study!r}; choose some of {', '.join(STUDIES)}")
        results[study] = with_losses(study, list(STUDIES[study](sizes)))
        if options.json:
            lines = {name: [json.dumps(row) for row in rows] for name, rows in results.items()}
            options.json.write_text(_compact(lines))
    if options.figure:
        draw(results, options.figure)
    print(json.dumps({"benchmark": "scale", "studies": results}))


def _compact(lines: dict[str, list[str]]) -> str:
    """JSON with a line for each row."""
    studies = [
        f'    "{name}": [\n      ' + ",\n      ".join(rows) + "\n    ]" for name, rows in lines.items()
    ]
    return '{\n  "benchmark": "scale",\n  "studies": {\n' + ",\n".join(studies) + "\n  }\n}\n"


if __name__ == "__main__":
    main()
