"""Policies compared: SLO attainment, TPT and TTFT of eight servers at three rates (published Fig. 18).

    python benchmarks/routing.py --json routing.json --figure routing.png    # virtual clock, five seeds
    python benchmarks/routing.py --http                   # in real time, through the real router

The servers are stand-ins whose steps take what the performance model of the published machine says:
continuous batching, a prefill that interrupts decoding, adapters loaded before the prefill that needs them.
Policies and accounts are the router's. Load: Poisson arrivals, lognormal lengths with the means of LMSYS chat
(70 and 214 tokens), 512 adapters of four ranks with the popularity of the published traces; with `--trace`
also a trace of our own format, stretched to each rate. The SLO is 1.5 times the base model's TPT. Rates are
low, medium and high for each form of the model. A pool of 64@24 is a device that holds 64 adapters and loads
them at 24 GB/s, so that misses are few and short; with one of 32@1 they are many and long. The virtual clock
leaves out HTTP and what the servers' reports lag behind; both leave out chunked prefill and preemption.

With `--http` the stand-ins speak a Toppings server's API; load generator, router and stand-ins are processes
of their own. All times are stretched by `--slowdown`, responses are shorter, and beside each result stands
that of the virtual clock over the same load. Every request sent is asserted to be answered or refused. Ends
in one JSON line.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from stand_in import over_http, virtual
from stand_in.load import Lengths, Load, poisson_load, trace_load
from stand_in.results import Observed, Row, compare, draw, make_row, results_table
from stand_in.server import Server

from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.cluster.policies import POLICIES, PolicySettings, make_policy
from toppings.lab.script import finish, make_parser, parse
from toppings.sim.readers import load_trace
from toppings.sim.trace import Trace

SLO_FACTOR = 1.5


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared; an option each. Times are those of the servers' clock."""

    rates: str = option(
        "bgmv:28,34,40;mbgmv:44,48,52", "requests/s of all servers together, for a form or (unnamed) for all"
    )
    policies: str = option(",".join(POLICIES), "names, with commas between")
    kernels: str = option("bgmv,mbgmv", "decode forms of the performance model")
    servers: int = option(8, "how many")
    seeds: int = option(5, "loads of each rate")
    duration: float = option(120.0, "seconds of arrivals")
    mean_response: int = option(214, "tokens, before they are cut")
    max_response: int = option(1000, "tokens")
    slowdown: float = option(1.0, "what all times are multiplied by with --http")
    pools: str = option("64@24,32@1", "adapters that a device holds @ GB/s that they are loaded at")
    perf_model: str = option("published", "a file or a shipped name")

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.mean_response, self.max_response)

    def model(self, kernel: str, pool: str) -> PerfModel:
        model = load_perf_model(self.perf_model).using(kernel)
        return replace(model, link_gbps=split_pool(pool)[1], prefill_interrupts=True)

    def rates_of(self, kernel: str) -> list[float]:
        parts = [part.rpartition(":") for part in self.rates.split(";")]
        return [float(rate) for form, _, rates in parts if form in ("", kernel) for rate in rates.split(",")]

    def check(self, trace: Trace | None) -> None:
        """Raises ValueError for what cannot be run, before anything is."""
        for name, value in asdict(self).items():
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for policy in self.policies.split(","):
            make_policy(policy)
        for kernel, pool in product(self.kernels.split(","), self.pools.split(",")):
            self.model(kernel, pool)
            if not self.rates_of(kernel):
                raise ValueError(f"rates are {self.rates!r}; there is none for {kernel}")
            for rate in self.rates_of(kernel):
                if not 0 < rate < float("inf"):
                    raise ValueError(f"a rate is {rate:g}; it must be above 0")
                if trace is not None:
                    trace_load(trace, rate, self.duration, self.seeds - 1)

    def loads(self, rate: float, trace: Trace | None) -> Iterator[tuple[str, list[Load]]]:
        """Kinds of arrivals, and the load of each seed."""
        seeds = range(self.seeds)
        yield "Poisson", [poisson_load(rate, self.duration, seed, self.lengths) for seed in seeds]
        if trace is not None:
            yield trace.origin, [trace_load(trace, rate, self.duration, seed) for seed in seeds]


def split_pool(pool: str) -> tuple[int, float]:
    """Adapters and GB/s. Raises ValueError."""
    try:
        adapters, gbps = pool.split("@")
        number, speed = int(adapters), float(gbps)
    except ValueError:
        raise ValueError(f"a pool is {pool!r}; it must be like 64@24") from None
    if number < 1 or not speed > 0:
        raise ValueError(f"a pool is {pool!r}; it must hold an adapter or more, at more than 0 GB/s")
    return number, speed


VIRTUAL = Plan()
HTTP = Plan(
    rates="56",
    policies="rank_aware,random,first_fit,dlora",
    kernels="bgmv",
    pools="64@24",
    seeds=1,
    duration=10.0,
    mean_response=64,
    max_response=128,
    slowdown=3.0,
)
TOYS = {
    "virtual": replace(VIRTUAL, seeds=1, duration=4.0, rates="40"),
    "http": replace(
        HTTP,
        rates="12",
        policies="rank_aware,dlora",
        servers=2,
        duration=2.0,
        mean_response=8,
        max_response=16,
        slowdown=1.0,
    ),
}


def run(plan: Plan, trace: Trace | None, *, is_http: bool) -> list[Row]:
    rows = []
    for kernel, pool in product(plan.kernels.split(","), plan.pools.split(",")):
        for rate in plan.rates_of(kernel):
            for arrivals, loads in plan.loads(rate, trace):
                for policy in plan.policies.split(","):
                    setting = {"arrivals": arrivals, "kernel": kernel, "pool": pool, "rate": rate}
                    setting["policy"] = policy
                    for clock in ("virtual", "http") if is_http else ("virtual",):
                        row = measure(plan, {"clock": clock, **setting}, loads)
                        rows.append(row)
                        print(progress(row), flush=True)
    compare(rows)
    return sorted(rows, key=lambda row: row["clock"] == "http")


def measure(plan: Plan, setting: Row, loads: list[Load]) -> Row:
    model, adapters = plan.model(setting["kernel"], setting["pool"]), split_pool(setting["pool"])[0]
    slo_ms = slo_of(model)
    trials: list[Observed] = []
    for seed, load in enumerate(loads):
        if setting["clock"] == "virtual":
            policy = make_policy(setting["policy"], PolicySettings(slo_ms, seed))
            servers = [Server(f"s{i}", model, adapters) for i in range(plan.servers)]
            trials.append(virtual.observe(load, policy, servers))
        else:
            time = over_http.Stretched.of(model, slo_ms, plan.slowdown)
            trials.append(
                over_http.observe(
                    load,
                    setting["policy"],
                    time,
                    num_servers=plan.servers,
                    device_adapters=adapters,
                    seed=seed,
                )
            )
    return make_row(setting, trials, plan.duration, slo_ms)


def slo_of(model: PerfModel) -> float:
    """1.5 times the step of a batch without adapters, ms."""
    return SLO_FACTOR * model.decode.coefficients["steps"]


def progress(row: Row) -> str:
    return (
        f"{row['clock']:7s} {row['kernel']:6s} {row['pool']:6s} {row['rate']:4g}/s {row['arrivals']}"
        f" {row['policy']:21s} attainment {row['attainment']:6.1%}  TPT {row['tpt_ms']:5.1f} ms"
    )


def main() -> None:
    args = parse_args()
    defaults = TOYS if args.toy else {"http": HTTP} if args.http else {"virtual": VIRTUAL}
    given = {f.name: value for f in fields(Plan) if (value := getattr(args, f.name)) is not None}
    plans = {clock: replace(default, **given) for clock, default in defaults.items()}
    try:
        trace = load_trace(args.trace, format_name="toppings") if args.trace else None
        for plan in plans.values():
            plan.check(trace)
    except (ValueError, OSError) as error:
        raise SystemExit(f"routing.py: {error}") from error
    result: dict[str, Any] = {}
    rows: list[Row] = []
    for clock, plan in plans.items():
        rows += (mine := run(plan, trace, is_http=clock == "http"))
        result[clock] = {"plan": asdict(plan), "rows": mine}
        title = f"{plan.servers} servers, {plan.seeds} loads of {plan.duration:g} s ({plan.perf_model} model)"
        Console(width=110).print(results_table(mine, title))
    if args.figure:
        draw(rows, title, args.figure)
    finish(args, "routing", **result)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "a few seconds of both", figure="attainment and TPT")
    parser.add_argument("--http", action="store_true", help="in real time, through the real router")
    parser.add_argument("--trace", type=Path, help="a trace of our own format, beside Poisson arrivals")
    for each in fields(Plan):
        default, over_http = getattr(VIRTUAL, each.name), getattr(HTTP, each.name)
        text = f"{each.metadata['help']} ({default}" + (
            f"; --http: {over_http})" if over_http != default else ")"
        )
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(default), help=text)
    return parse(parser)


if __name__ == "__main__":
    main()
