"""`toppings plan fleet`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from toppings.cluster.perf_model import load_perf_model
from toppings.lab.capacity.output import draw_plan, plan_json, plan_tables
from toppings.lab.capacity.planner import Planner
from toppings.lab.capacity.spec import PlanSpec
from toppings.lab.capacity.trials import RunJobs, Trials
from toppings.lab.figures import save
from toppings.lab.options import FigureFile, PrintJson, SettingsOf, verb
from toppings.lab.progress import progress_bar
from toppings.lab.results import check_files
from toppings.lab.simulation.sources import Source
from toppings.sim.records import SimResult
from toppings.sim.runs import SimJob, run_jobs
from toppings.sim.settings import SimConfig
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

CHOSEN = (
    *("policy", "placement", "num_instances", "device_pool_bytes", "kv_cache_tokens"),
    *("seed", "kill_at_s", "slo_tpt_ms", "slo_ttft_ms"),
)
"""Settings of simulated servers that the plan is for, or that have another meaning here."""

app = typer.Typer(no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class FleetOptions(Source):
    wanted: Annotated[dict[str, Any], SettingsOf(PlanSpec)]
    server: Annotated[dict[str, Any], SettingsOf(SimConfig, without=CHOSEN)]
    perf_model: Annotated[str, typer.Option(help="JSON file, or a shipped one[:form]")] = "published"
    seed: Annotated[int, typer.Option(min=0, help="of the first load")] = 0
    processes: Annotated[int, typer.Option(min=0, help="at a time (0: one per core)")] = 0
    json_output: PrintJson = False
    figure: FigureFile = None

    def trials(self, run: RunJobs) -> Trials:
        """Raises ValueError for options that are out of range or would be ignored."""
        spec, source_of = PlanSpec(**self.wanted), self._source_of()
        config = SimConfig(
            perf_model=load_perf_model(self.perf_model),
            slo_tpt_ms=spec.slo_tpt_ms,
            slo_ttft_ms=spec.slo_ttft_ms,
            seed=self.seed,
            max_model_len=min(SimConfig.max_model_len, SimConfig.kv_cache_tokens),
            **self.server,
        )
        return Trials(spec, config, source_of, run)

    def _source_of(self) -> Callable[[int], Trace | Workload]:
        """By seed; what is wrong with the options is said at once."""
        [first] = self.sources([self.seed])
        return lambda seed: first if seed == self.seed else self.sources([seed])[0]


class _Runner:
    """Runs simulations with a bar on standard error; how many there will be is not known."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes, self._num_done = num_processes, 0

    def __call__(self, purpose: str, jobs: Sequence[SimJob]) -> list[SimResult]:
        shares = [0.0] * len(jobs)
        with progress_bar() as bar:

            def update(index: int, share: float) -> None:
                shares[index] = share
                text = f"{purpose}: {self._num_done} + {len(jobs)} simulations"
                bar.reach(text, sum(shares) / len(jobs))

            results = run_jobs(jobs, num_processes=self._num_processes, on_progress=update)
        self._num_done += len(jobs)
        return results


@app.command("fleet")
@verb
def plan_fleet(options: FleetOptions) -> None:
    """Find how many servers keep the objectives for a load, how to run them, and what that costs."""
    check_files(None, options.figure)
    num_processes = options.processes or os.cpu_count() or 1
    trials = options.trials(_Runner(num_processes))
    plan = Planner(trials, options.seed, num_processes).plan()
    if options.figure is not None:
        save(draw_plan(plan, trials.spec), options.figure)
    if options.json_output:
        typer.echo(plan_json(plan, trials.spec))
        return
    console = Console()
    for table in plan_tables(plan, trials.spec):
        console.print(table)
