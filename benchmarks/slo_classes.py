"""Batch requests beside interactive ones in a simulated fleet: what they cost these, and how long they take.

    python benchmarks/slo_classes.py --json FILE     # a minute on one core
    python benchmarks/slo_classes.py --toy

Interactive requests of chats come for `--seconds` at rates from half of what the fleet holds within its
objectives; a second after the first, a tenant sends `--batch` requests of the same kind with longer answers,
all at once. Three cases: the interactive ones alone, all alike, and the tenant's in the class batch.
`attained`: share of the interactive requests within both objectives; `batch_done_s`: when the last of the
batch had ended; `fleet_busy`: mean of the servers. Ends in one JSON line, with means over the seeds and their
standard deviations.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from toppings.cluster.perf_model import load_perf_model
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.simulation.metrics import summarize_run
from toppings.sim.settings import NS_PER_S, SimConfig, base_tpt_ms
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import Workload, preset
from toppings.sim.trace import Tenants, Trace

CASES: dict[str, dict[str, Any]] = {"alone": {}, "alike": {}, "batch": {"batch_tenants": "nightly"}}
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """`rates` of interactive requests, per second; `num_batch` requests that have time."""

    rates: tuple[float, ...] = (12.0, 18.0, 24.0)
    seconds: float = 120.0
    num_batch: int = 1500
    seeds: int = 5
    num_servers: int = 4


TOY = Plan(rates=(6.0,), seconds=10.0, num_batch=40, seeds=1, num_servers=2)


def mixed(plan: Plan, rate: float, seed: int) -> Trace:
    """Interactive requests of the tenant `office`, and those of `nightly`, which are twice as long."""
    workload: Workload = replace(preset("poisson-chat"), rate=rate, duration_s=plan.seconds, num_adapters=64)
    office = workload.make_trace(seed)
    more = replace(workload, rate=plan.num_batch / plan.seconds * 1.2).make_trace(seed + 1000)
    nightly = slice(0, plan.num_batch)
    arrivals = np.append(office.arrivals_s, np.full(len(more.arrivals_s[nightly]), 1.0))
    order = np.argsort(arrivals, kind="stable")
    columns: dict[str, Any] = {
        name: np.append(getattr(office, name), getattr(more, name)[nightly] * factor)[order].astype(np.int32)
        for name, factor in (("adapters", 1), ("prompt_tokens", 1), ("response_tokens", 2))
    }
    owners = np.append(np.zeros(len(office)), np.ones(len(arrivals) - len(office)))[order].astype(np.int32)
    tenants = Tenants(owners, ("office", "nightly"), (1.0, 1.0))
    return replace(office, arrivals_s=arrivals[order], tenants=tenants, blocks=None, **columns)


def office_of(trace: Trace) -> Trace:
    """The interactive requests alone."""
    assert trace.tenants is not None
    is_its = trace.tenants.indices == 0
    columns: dict[str, Any] = {
        name: getattr(trace, name)[is_its]
        for name in ("arrivals_s", "adapters", "prompt_tokens", "response_tokens")
    }
    return replace(trace, tenants=Tenants(trace.tenants.indices[is_its], ("office",), (1.0,)), **columns)


def played(plan: Plan, trace: Trace, seed: int, case: str) -> Row:
    model = load_perf_model("published:mbgmv")
    config = SimConfig(
        perf_model=model,
        num_instances=plan.num_servers,
        slo_tpt_ms=1.5 * base_tpt_ms(model),
        slo_ttft_ms=500.0,
        seed=seed,
        **CASES[case],
    )
    result = Simulator(config, office_of(trace) if case == "alone" else trace).run()
    summary, tenants = summarize_run(result), result.tenants
    assert tenants is not None
    office, is_batch = summary.tenants[0], tenants.indices == 1
    ended = result.ended_at[is_batch]
    return {
        "attained": office.slo_attainment,
        "ttft_p99_ms": office.ttft_ms.p99,
        "tpt_p99_ms": office.tpt_ms.p99,
        "batch_done_s": float(ended.max()) / NS_PER_S if len(ended) else 0.0,
        "fleet_busy": summary.busy_share,
        "num_lost": len(result.arrived_at) - int(result.has_ended.sum()),
    }


def simulated(plan: Plan) -> Iterator[Row]:
    for rate in plan.rates:
        traces = [mixed(plan, rate, seed) for seed in range(plan.seeds)]
        for case in CASES:
            rows = [played(plan, trace, seed, case) for seed, trace in enumerate(traces)]
            columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
            means = {name: float(column.mean()) for name, column in columns.items()}
            spread = {name: float(column.std()) for name, column in columns.items()}
            yield {"rate": rate, "case": case, **means, "spread": spread}


def main() -> None:
    parser = make_parser(__doc__, "a few requests")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="loads of each rate")
    parser.add_argument(
        "--seconds", type=float, default=Plan.seconds, help="that interactive requests come for"
    )
    parser.add_argument("--batch", type=int, default=Plan.num_batch, help="requests that have time")
    options = parse(parser)
    given = Plan(seeds=options.seeds, seconds=options.seconds, num_batch=options.batch)
    rows = []
    for row in simulated(TOY if options.toy else given):
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "spread"})
    finish(options, "slo_classes", simulated=rows)


if __name__ == "__main__":
    main()
