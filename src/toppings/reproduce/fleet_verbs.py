"""`toppings reproduce simulation` and `testbed`: what is simulated."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from toppings.reproduce import published
from toppings.reproduce.fleet_runs import POLICIES, FleetSpec, RunRecord, run_fleet
from toppings.reproduce.options import (
    DEFAULT_OUT,
    Duration,
    Interrupts,
    Mode,
    Out,
    PerfModelOption,
    Policies,
    Processes,
    Quick,
    Resume,
    Seeds,
    TraceFile,
)
from toppings.reproduce.simulation import write_simulation, write_testbed

QUICK_S = 8.0
DEFAULT_RATES = f"{published.SIMULATION_RPS:g}"
DEFAULT_POLICIES = ",".join(POLICIES)


def parse_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in text.split(","))
    except ValueError:
        rates = ()
    if not rates or any(not 0 < rate < float("inf") for rate in rates):
        raise ValueError(f"rates are {text!r}; write requests/s with commas between, e.g. 340,400")
    return rates


def simulation(
    out: Out = DEFAULT_OUT,
    rates: Annotated[
        str, typer.Option(help="requests/s; bars and CDF are of the first, more of them make a curve")
    ] = DEFAULT_RATES,
    instances: Annotated[int, typer.Option(help="servers")] = published.SIMULATION_INSTANCES,
    policies: Policies = DEFAULT_POLICIES,
    perf_model: PerfModelOption = FleetSpec.perf_model,
    prefill_interrupts: Interrupts = None,
    duration: Duration = FleetSpec.duration_s,
    seeds: Seeds = FleetSpec.seeds,
    adapters: Annotated[int, typer.Option(help="how many, where no trace says so")] = FleetSpec.num_adapters,
    mode: Mode = FleetSpec.mode,
    trace: TraceFile = "",
    processes: Processes = 1,
    resume: Resume = False,
    quick: Quick = False,
) -> None:
    """Fig. 19: SLO attainment and TPT of 60 simulated servers, a figure per kernel form."""
    if quick:
        instances, duration, seeds, adapters = 4, QUICK_S, 2, 500
        rates = ",".join(f"{rate * 4 / 60:g}" for rate in parse_rates(rates))
    spec = FleetSpec(
        num_instances=instances,
        rates=parse_rates(rates),
        policies=tuple(policies.split(",")),
        perf_model=perf_model,
        prefill_interrupts=prefill_interrupts,
        duration_s=duration,
        seeds=seeds,
        num_adapters=adapters,
        mode=mode,
        trace=trace,
    )
    write_simulation(spec, _run(spec, processes, out / "simulation-runs.jsonl", resume), out)


def published_testbed(
    out: Out = DEFAULT_OUT,
    rates: Annotated[str, typer.Option(help="requests/s")] = "30,40,50",
    instances: Annotated[int, typer.Option(help="servers")] = published.TESTBED_INSTANCES,
    policies: Policies = DEFAULT_POLICIES,
    perf_model: PerfModelOption = FleetSpec.perf_model,
    prefill_interrupts: Interrupts = None,
    duration: Duration = FleetSpec.duration_s,
    seeds: Seeds = FleetSpec.seeds,
    adapters: Annotated[int, typer.Option(help="how many")] = 512,
    mode: Mode = FleetSpec.mode,
    processes: Processes = 1,
    resume: Resume = False,
    quick: Quick = False,
) -> None:
    """Fig. 18: SLO attainment of 8 servers, simulated, by load."""
    if quick:
        instances, duration, seeds, rates = 3, QUICK_S, 1, "15"
    spec = FleetSpec(
        num_instances=instances,
        rates=parse_rates(rates),
        policies=tuple(policies.split(",")),
        perf_model=perf_model,
        prefill_interrupts=prefill_interrupts,
        duration_s=duration,
        seeds=seeds,
        num_adapters=adapters,
        mode=mode,
    )
    write_testbed(spec, _run(spec, processes, out / "testbed-runs.jsonl", resume), out)


def _run(spec: FleetSpec, num_processes: int, kept: Path, resume: bool) -> list[RunRecord]:
    if not resume:
        kept.unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulations", total=1.0)
        return run_fleet(
            spec,
            num_processes=num_processes,
            kept=kept,
            on_progress=lambda share: progress.update(task, completed=share),
        )
