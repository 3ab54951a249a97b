"""The published synthetic workloads in every mode: TTFT, time per token and E2E over those of `cached`.

    python benchmarks/gpu/workloads.py                                # about 15 minutes
    python benchmarks/gpu/workloads.py --scenarios S1                 # a third of that
    python benchmarks/gpu/workloads.py --scenarios S3 --seconds 6     # a first look
    python benchmarks/gpu/workloads.py --toy --device cpu

Rank 32 at 9 requests/s, rank 64 at 6 and at 9, 200 adapters on q, k and v (Toppings, USENIX ATC'25), Poisson
arrivals in real time, chat lengths with the published means. `capacity` is the same at 70 % of what this
device serves, which is measured in mode cached: tokens per second while most places are taken, over the mean
response. One engine after another; all modes get the same requests. Adapters that no request names are
not made. They are in host memory; outside `cached` the device pool holds `--pool` of them. The floor is
`cached`. Ends in one JSON line. Not yet run on a GPU.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from common import Bench, finish, make_parser, note, noted, open_bench, progress

from toppings.engine.engine import Engine
from toppings.lab.aims import Aim, at_most
from toppings.lab.outcome import Outcome
from toppings.lab.players.engine import EnginePlayer, PlayedStep, WallClock, preload_host
from toppings.lab.summary import Latencies
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

NUM_ADAPTERS = 200
LIMIT = 1.03
CAPACITY_SHARE = 0.7
FULL_SHARE = 0.75
"""Capacity is measured over the steps that decode so much of the most sequences that any decodes."""
BURST = 3
"""It is measured with so many requests a place."""
LOADS = ("published", "capacity")
MODES = ("cached", "auto", "on_demand", "pipelined", "cpu_assisted")
WARM_UP_REQUESTS = 8


@dataclass(frozen=True)
class Scenario:
    """Requests per second for adapters of one rank."""

    rank: int
    rate: float

    @property
    def kind(self) -> str:
        return f"r{self.rank}"


SCENARIOS = {"S1": Scenario(32, 9.0), "S2": Scenario(64, 6.0), "S3": Scenario(64, 9.0)}

Means = dict[str, float]
"""Mean TTFT, TPT and E2E in ms."""


def make_trace(scenario: Scenario, seconds: float, longest: tuple[int, int], *, seed: int) -> Trace:
    """`longest`: prompts and responses are cut there."""
    work = Workload(rate=scenario.rate, duration_s=seconds, num_adapters=NUM_ADAPTERS, ranks=(scenario.rank,))
    trace = work.make_trace(seed)
    prompt, response = (
        np.minimum(tokens, limit)
        for tokens, limit in zip((trace.prompt_tokens, trace.response_tokens), longest, strict=True)
    )
    return replace(trace, prompt_tokens=prompt, response_tokens=response)


class Scenarios:
    """Plays traces of one kind of adapters into one engine. `ids`: by kind and number of the adapter."""

    def __init__(self, engine: Engine, ids: Mapping[str, Mapping[int, int]]) -> None:
        self._engine, self._ids = engine, ids

    def play(self, scenario: Scenario, trace: Trace, steps: list[PlayedStep] | None = None) -> list[Outcome]:
        ids = [self._ids[scenario.kind].get(i, -1) for i in range(NUM_ADAPTERS)]
        on_step = (lambda _: None) if steps is None else steps.append
        return EnginePlayer(self._engine, ids, WallClock(), on_step=on_step).play(trace)

    def warm_up(self, scenario: Scenario, trace: Trace) -> None:
        """A few short requests at once; in an engine's first steps kernels are compiled."""
        first = trace.between(0.0, float(trace.arrivals_s[:WARM_UP_REQUESTS][-1]) + 1e-6)
        short = np.minimum(first.response_tokens, 8)
        self.play(scenario, replace(first, arrivals_s=first.arrivals_s * 0, response_tokens=short))

    def capacity_rps(self, scenario: Scenario, trace: Trace) -> float:
        """Requests per second that the engine can serve."""
        order = np.resize(np.arange(len(trace)), BURST * self._engine.info.max_num_seqs)
        burst = replace(
            trace,
            arrivals_s=np.zeros(len(order)),
            adapters=trace.adapters[order],
            prompt_tokens=trace.prompt_tokens[order],
            response_tokens=trace.response_tokens[order],
        )
        steps: list[PlayedStep] = []
        self.play(scenario, burst, steps)
        most = max(len(step.decode) for step in steps)
        full = [step for step in steps if len(step.decode) >= FULL_SHARE * most]
        num_tokens = sum(len(step.decode) for step in full)
        return num_tokens / sum(step.ms for step in full) * 1e3 / float(burst.response_tokens.mean())


def means(outcomes: Sequence[Outcome]) -> Means:
    return {name: stats.mean for name, stats in Latencies.of(outcomes).stats().items()}


def register(bench: Bench, traces: Iterable[tuple[Scenario, Trace]]) -> dict[str, dict[int, int]]:
    """Ids of the adapters that are named, by kind and number."""
    numbers: dict[str, set[int]] = {}
    ranks = {}
    for scenario, trace in traces:
        numbers.setdefault(scenario.kind, set()).update(trace.adapters.tolist())
        ranks[scenario.kind] = scenario.rank
    ids = {}
    for kind, named in numbers.items():
        bench.register(kind, len(named), ranks=(ranks[kind],))
        ids[kind] = dict(zip(sorted(named), bench.ids(kind), strict=True))
    return ids


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--modes", default=",".join(MODES), help="cached first")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals at the published rate")
    parser.add_argument("--longest-response", type=int, default=1024)
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no mode is begun")
    parser.add_argument("--pool", type=int, default=32, help="adapters of rank 64 on the device at a time")
    options = parser.parse_args()
    if options.toy:
        options.scenarios, options.modes, options.seconds, options.pool = (
            "S3",
            "cached,pipelined,auto",
            0.6,
            16,
        )
    return options


def main() -> int:
    options = parse(make_parser(__doc__))
    longest = (16, 6) if options.toy else (2048, options.longest_response)
    names, loads = options.scenarios.split(","), options.loads.split(",")
    traces = {
        name: make_trace(SCENARIOS[name], options.seconds, longest, seed=i) for i, name in enumerate(names)
    }
    stop_at = time.monotonic() + options.stop_after
    results: dict[str, dict[str, Means]] = {}
    capacities: dict[str, float] = {}
    failures: dict[str, str] = {}
    places = {"max_num_seqs": 8} if options.toy else {"max_num_seqs": 64}
    with open_bench(options, **places) as bench:
        ids = register(bench, [(SCENARIOS[name], trace) for name, trace in traces.items()])
        for mode in options.modes.split(","):
            if time.monotonic() > stop_at:
                continue
            with noted(failures, mode):
                results[mode] = run_mode(bench, mode, traces, ids, loads, capacities)
                note("workloads", options, capacity_rps=capacities, mean_ms=results)
        num_named = {kind: len(named) for kind, named in ids.items()}
    ratios = {
        mode: {case: over(own, results["cached"][case]) for case, own in by_case.items()}
        for mode, by_case in results.items()
    }
    return finish(
        "workloads",
        options,
        aims_of(ratios),
        failures=failures,
        seconds=options.seconds,
        longest=longest,
        adapters=NUM_ADAPTERS,
        adapters_named=num_named,
        pool_adapters=options.pool,
        requests={name: len(trace) for name, trace in traces.items()},
        capacity_rps=capacities,
        mean_ms=results,
        over_cached=ratios,
    )


def run_mode(
    bench: Bench,
    mode: str,
    traces: Mapping[str, Trace],
    ids: Mapping[str, Mapping[int, int]],
    loads: Sequence[str],
    capacities: dict[str, float],
) -> dict[str, Means]:
    """Means by scenario and load; `capacities` are measured if they are not there."""
    largest = max(record.num_bytes for record in bench.records)
    settings: dict[str, Any] = {} if mode == "cached" else {"device_pool_bytes": bench.options.pool * largest}
    found: dict[str, Means] = {}
    with bench.engine(mode, **settings) as engine:
        preload_host(engine.adapters, [record.adapter_id for record in bench.records])
        player = Scenarios(engine, ids)
        for name, trace in traces.items():
            scenario = SCENARIOS[name]
            player.warm_up(scenario, trace)
            if "published" in loads:
                found[f"{name}, published"] = means(player.play(scenario, trace))
            if "capacity" in loads:
                if name not in capacities:
                    capacities[name] = player.capacity_rps(scenario, trace)
                    progress(f"{name}: {capacities[name]:.1f} requests/s is all that the device can serve")
                rate = CAPACITY_SHARE * capacities[name]
                found[f"{name}, capacity"] = means(player.play(scenario, trace.scaled_to(rate)))
    return found


def over(own: Means, cached: Means) -> Means:
    return {metric: own[metric] / cached[metric] for metric in own}


def aims_of(ratios: Mapping[str, Mapping[str, Means]]) -> list[Aim]:
    return [
        at_most(f"{case}: {metric.upper()} of auto over cached", ratio, LIMIT)
        for case, by_metric in ratios.get("auto", {}).items()
        for metric, ratio in by_metric.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
