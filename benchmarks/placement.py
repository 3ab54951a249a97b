"""Placements compared by simulation: eight servers, each with room for 16 of 512 adapters.

    python benchmarks/placement.py --json FILE                   # all but engines: ten minutes on one core
    python benchmarks/placement.py --studies crowd --json FILE   # one study; FILE keeps the others' results
    python benchmarks/placement.py --studies engines --json FILE # real engines on this machine: ten minutes
    python benchmarks/placement.py --toy

`zipf`, `flat`, `published`: the popularity, its hot set drifting every two minutes; adapters loaded at 1 and
at 24 GB/s: SLO attainment (1.5 times the base model's time per token), adapters
loaded per request, and TTFT of all requests and of those for the coldest tenth of the adapters, for each
placement with the policies that go with it. `crowd`: within ten seconds one adapter comes to 30 % of the
requests. `death`: one of the servers dies. For both, seconds until attainment, by arrival and over windows of
5 s, is back above 95 % for the rest of a minute. `bounds`: what no placement can change, for the loads of the
first three: if each token took `step_ms`, `in_use` is the part of all devices that adapters with requests
take on average, `crowded` the part of time in which they do not fit all devices together, `must_wait` the
part of requests that come then for an adapter that nobody uses; `least_loads` per request, if those adapters
that save most stayed on the devices for ever and all others came and went; `pooled_loads`, if all devices
were one and who is asked for again last left it first, and `pooled_lru`, if who was used last stayed.
`--form` is the performance model's. Figures are means over seeds, `spread` their standard deviations.

`engines` (`two_engines/`): two engines of a small model, their loads over an emulated link, behind the real
router. `calibration`: what their steps take, and by which factor more than a lone one's; `plan`: the
attainment that `toppings plan fleet` promises them at the load that it finds, and what they attain; then the
placements under more load, attainment of the engines, of stand-ins behind the real router and of simulated
servers; `order`: whether the placements come in the simulated order there. Ends in one JSON line.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from heapq import heappop, heappush
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.summary import percentiles
from toppings.sim.records import SimResult
from toppings.sim.settings import LLAMA_7B_QKV_BYTES_PER_RANK, SimConfig, base_tpt_ms
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

SLO_FACTOR = 1.5
MEAN_RANK = 30
WINDOW_S, WATCHED_S, RECOVERED = 5.0, 60.0, 0.95
CROWD_SHARE, CROWD_RISE_S = 0.3, 10.0
STEP_FACTORS = (1.0, 1.25, 1.5)
"""Of the base model's time per token: the least there is, what batches take, and the objective."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """`rates` by popularity, in requests/s; `pairs` of placement and policy."""

    rates: dict[str, tuple[float, ...]]
    pairs: tuple[tuple[str, str], ...]
    gbps: tuple[float, ...] = (1.0, 24.0)
    seeds: int = 5
    duration_s: float = 180.0
    num_servers: int = 8
    num_adapters: int = 512
    slots: int = 16
    form: str = "bgmv"


FULL = Plan(
    {"zipf:1.0": (28.0, 32.0), "published": (32.0,), "uniform": (14.0,)},
    (
        *(("none", policy) for policy in ("rank_aware", "rank_aware_residency", "lora_affinity")),
        *((name, "rank_aware_residency") for name in ("static_k", "shuffle_shard", "adaptive")),
    ),
)
TOY = replace(
    FULL,
    rates=dict.fromkeys(FULL.rates, (4.0,)),
    gbps=(1.0,),
    seeds=1,
    duration_s=15.0,
    num_servers=2,
    num_adapters=40,
)
SUDDEN_RATE = 20.0
"""Requests/s of the studies of what comes suddenly: what is left when one of eight dies can take that."""
SUDDEN_PAIRS = tuple(
    (name, "rank_aware_residency") for name in ("none", "static_k", "shuffle_shard", "adaptive")
)


def config_of(plan: Plan, placement: str, policy: str, gbps: float, seed: int, **more: Any) -> SimConfig:
    model = model_of(plan, gbps)
    return SimConfig(
        perf_model=model,
        policy=policy,
        placement=placement,
        num_instances=plan.num_servers,
        slo_tpt_ms=SLO_FACTOR * base_tpt_ms(model),
        device_pool_bytes=plan.slots * MEAN_RANK * LLAMA_7B_QKV_BYTES_PER_RANK,
        max_model_len=8192,
        seed=seed,
        **more,
    )


def model_of(plan: Plan, gbps: float) -> PerfModel:
    return replace(load_perf_model("published").using(plan.form), link_gbps=gbps)


def workload_of(plan: Plan, popularity: str, rate: float) -> Workload:
    return Workload(
        popularity=popularity,
        rate=rate,
        duration_s=plan.duration_s,
        num_adapters=plan.num_adapters,
        drift_s=120.0,
    )


# --- studies ---


def study_loads(plan: Plan, popularity: str) -> Iterator[Row]:
    for gbps, rate in product(plan.gbps, plan.rates[popularity]):
        traces = [workload_of(plan, popularity, rate).make_trace(seed) for seed in range(plan.seeds)]
        for placement, policy in plan.pairs:
            figures = [
                figures_of(Simulator(config_of(plan, placement, policy, gbps, seed), trace).run(), trace)
                for seed, trace in enumerate(traces)
            ]
            yield {"gbps": gbps, "rate": rate, "placement": placement, "policy": policy, **means(figures)}


def figures_of(result: SimResult, trace: Trace) -> dict[str, float]:
    ttft_ms = (result.first_token_at - result.arrived_at) / 1e6
    has_ended, is_cold = result.has_ended, is_of_coldest_tenth(trace)
    p99, cold_p99 = (percentiles(ttft_ms[mask], (99,))[0] for mask in (has_ended, has_ended & is_cold))
    num_plans_per_minute = 60.0 / result.config.placement_interval_s
    settled = result.num_moves[len(result.num_moves) // 4 :]
    return {
        "attainment": float(is_good(result).mean()),
        "loads_per_request": sum(each.num_adapter_loads for each in result.instances) / len(trace),
        "ttft_mean_ms": float(ttft_ms[has_ended].mean()),
        "ttft_p99_ms": p99,
        "cold_ttft_p99_ms": cold_p99,
        "moves_per_minute": sum(settled) / max(len(settled), 1) * num_plans_per_minute,
    }


def is_good(result: SimResult) -> NDArray[np.bool_]:
    """Which requests ended within the objective [N]."""
    tpt_ms = (result.ended_at - result.arrived_at) / 1e6 / np.maximum(result.num_tokens, 1)
    good: NDArray[np.bool_] = result.has_ended & (tpt_ms <= result.config.slo_tpt_ms)
    return good


def is_of_coldest_tenth(trace: Trace) -> NDArray[np.bool_]:
    """Which requests are for the tenth of the adapters in use that are asked for least [N]."""
    counts = np.bincount(trace.adapters, minlength=len(trace.ranks))
    used = np.flatnonzero(counts)
    coldest = used[np.argsort(counts[used], kind="stable")][: max(1, len(used) // 10)]
    cold: NDArray[np.bool_] = np.isin(trace.adapters, coldest)
    return cold


def means(figures: list[dict[str, float]]) -> Row:
    columns = {name: np.array([each[name] for each in figures]) for name in figures[0]}
    spread = {name: float(column.std()) for name, column in columns.items()}
    return {**{name: float(column.mean()) for name, column in columns.items()}, "spread": spread}


def study_crowd(plan: Plan) -> Iterator[Row]:
    yield from sudden(plan, with_crowd, lambda at_s: {})


def study_death(plan: Plan) -> Iterator[Row]:
    yield from sudden(plan, lambda trace, at_s, seed: trace, lambda at_s: {"kill_at_s": at_s})


def sudden(
    plan: Plan, change: Callable[[Trace, float, int], Trace], settings: Callable[[float], dict[str, Any]]
) -> Iterator[Row]:
    """Half-way something happens."""
    rate, at_s = SUDDEN_RATE * plan.num_servers / FULL.num_servers, plan.duration_s / 2
    for gbps, (placement, policy) in product(plan.gbps, SUDDEN_PAIRS):
        times, after = [], []
        for seed in range(plan.seeds):
            workload = replace(workload_of(plan, "zipf:1.0", rate), drift_s=0.0)
            trace = change(workload.make_trace(seed), at_s, seed)
            result = Simulator(config_of(plan, placement, policy, gbps, seed, **settings(at_s)), trace).run()
            good = is_good(result)
            times.append(recovery_s(good, trace.arrivals_s - at_s))
            after.append(
                float(good[(trace.arrivals_s >= at_s) & (trace.arrivals_s < at_s + WATCHED_S)].mean())
            )
        recovered = [each for each in times if each is not None]
        yield {
            **{"gbps": gbps, "rate": rate, "placement": placement, "policy": policy},
            "recovery_s": times,
            "num_recovered": len(recovered),
            "recovery_mean_s": float(np.mean(recovered)) if recovered else None,
            "attainment_after": float(np.mean(after)),
        }


def with_crowd(trace: Trace, at_s: float, seed: int) -> Trace:
    """From `at_s` on requests turn to one adapter that was rarely asked for, within `CROWD_RISE_S` 30 %."""
    rng = np.random.default_rng(seed)
    share = CROWD_SHARE * np.clip((trace.arrivals_s - at_s) / CROWD_RISE_S, 0.0, 1.0)
    crowd = int(rng.integers(len(trace.ranks) // 2, len(trace.ranks)))
    adapters = np.where(rng.random(len(trace)) < share, crowd, trace.adapters).astype(np.int32)
    return replace(trace, adapters=adapters)


def recovery_s(good: NDArray[np.bool_], since_s: NDArray[np.float64]) -> float | None:
    """Until the end of the last window of arrivals, of those within `WATCHED_S`, that attained less; 0 where
    there was none, None where it is the last of them.
    """
    windows = np.floor(since_s / WINDOW_S).astype(np.int64)
    num = round(WATCHED_S / WINDOW_S)
    bad = [w for w in range(num) if (here := windows == w).any() and good[here].mean() < RECOVERED]
    if not bad:
        return 0.0
    return None if bad[-1] == num - 1 else (bad[-1] + 1) * WINDOW_S


def study_bounds(plan: Plan) -> Iterator[Row]:
    base_ms = base_tpt_ms(model_of(plan, plan.gbps[0]))
    for popularity, rates in plan.rates.items():
        for rate, factor in product(rates, STEP_FACTORS):
            figures = [
                bounds_of(plan, workload_of(plan, popularity, rate).make_trace(seed), factor * base_ms)
                for seed in range(plan.seeds)
            ]
            yield {"popularity": popularity, "rate": rate, "step_ms": factor * base_ms, **means(figures)}


def bounds_of(plan: Plan, trace: Trace, step_ms: float) -> dict[str, float]:
    """Sizes in ranks. What runs on no server yet when the trace begins is left out by its first sixth."""
    capacity, first_s = plan.num_servers * plan.slots * MEAN_RANK, trace.duration_s / 6
    ends_s = trace.arrivals_s + trace.response_tokens * step_ms / 1e3
    events = sorted(
        [(at, 1, a) for at, a in zip(trace.arrivals_s.tolist(), trace.adapters.tolist(), strict=True)]
        + [(at, -1, a) for at, a in zip(ends_s.tolist(), trace.adapters.tolist(), strict=True)]
    )
    ranks, users = trace.ranks.tolist(), [0] * len(trace.ranks)
    used, before, in_use, crowded, num, num_waiting = 0, first_s, 0.0, 0.0, 0, 0
    for at, change, adapter in events:
        if first_s < at <= trace.duration_s:
            in_use += used * (at - before)
            crowded += (at - before) * (used > capacity)
            num += change > 0
            num_waiting += change > 0 and not users[adapter] and used + ranks[adapter] > capacity
            before = at
        was_used, users[adapter] = users[adapter] > 0, users[adapter] + change
        used += ranks[adapter] * ((users[adapter] > 0) - was_used)
    span_s = trace.duration_s - first_s
    counts = np.bincount(trace.adapters, minlength=len(ranks))
    order = np.argsort(-counts / trace.ranks)
    num_kept = int(np.searchsorted(np.cumsum(trace.ranks[order]), capacity)) + 1
    return {
        **{name: pooled_loads(trace, ends_s, capacity, name) for name in ("pooled_loads", "pooled_lru")},
        "in_use": in_use / span_s / capacity,
        "crowded": crowded / span_s,
        "must_wait": num_waiting / max(num, 1),
        "least_loads": 1.0 - float(counts[order][:num_kept].sum() / counts.sum()),
    }


def pooled_loads(trace: Trace, ends_s: NDArray[np.float64], capacity: int, rule: str) -> float:
    """Loads per request of one device with all room, from which only adapters leave that nobody uses. By the
    rule `pooled_loads` it knows the future, and the adapter leaves that is asked for again last.
    """
    adapters, ranks = trace.adapters.tolist(), trace.ranks.tolist()
    next_at, coming = [math.inf] * len(trace), dict[int, int]()
    for number in range(len(trace) - 1, -1, -1):
        next_at[number] = coming.get(adapters[number], math.inf)
        coming[adapters[number]] = number
    running: list[tuple[float, int]] = []  # heap of ends
    users, held, used, num_loads = Counter[int](), dict[int, float](), 0, 0  # of those held: the worth
    for number, (at, adapter) in enumerate(zip(trace.arrivals_s.tolist(), adapters, strict=True)):
        while running and running[0][0] <= at:
            users[heappop(running)[1]] -= 1
        if adapter not in held:
            num_loads, used = num_loads + 1, used + ranks[adapter]
            idle = sorted((a for a in held if not users[a]), key=held.__getitem__, reverse=True)
            while used > capacity and idle:
                used -= ranks[victim := idle.pop()]
                del held[victim]
        held[adapter] = number if rule == "pooled_lru" else -next_at[number]
        users[adapter] += 1
        heappush(running, (float(ends_s[number]), adapter))
    return num_loads / len(trace)


def study_engines(plan: Plan) -> Iterator[Row]:
    from two_engines.study import SETTING, TOY_SETTING, study

    yield from study(TOY_SETTING if plan.num_servers == TOY.num_servers else SETTING)


BY_DEFAULT = ("zipf", "flat", "published", "crowd", "death", "bounds")
STUDIES: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "zipf": partial(study_loads, popularity="zipf:1.0"),
    "flat": partial(study_loads, popularity="uniform"),
    "published": partial(study_loads, popularity="published"),
    "crowd": study_crowd,
    "death": study_death,
    "bounds": study_bounds,
    "engines": study_engines,
}


def main() -> None:
    args = parse_args()
    names = args.studies.split(",")
    if unknown := [name for name in names if name not in STUDIES]:
        raise SystemExit(f"placement.py: unknown study {unknown[0]!r}; choose from {', '.join(STUDIES)}")
    plan = TOY if args.toy else replace(FULL, seeds=args.seeds, form=args.form)
    results: dict[str, Any] = {}
    if args.json is not None and args.json.is_file():
        results = {n: rows for n, rows in json.loads(args.json.read_text()).items() if n in STUDIES}
    for name in names:
        results[name] = []
        for row in STUDIES[name](plan):
            results[name].append(row)
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "spread"}
            print(name, shown, flush=True)
    finish(args, "placement", plan=asdict(plan), **results)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "a few seconds")
    parser.add_argument("--studies", default=",".join(BY_DEFAULT), help="names, with commas between")
    parser.add_argument("--seeds", type=int, default=FULL.seeds, help="loads of each kind")
    parser.add_argument("--form", default=FULL.form, help="decode form: bgmv or mbgmv")
    return parse(parser)


if __name__ == "__main__":
    main()
