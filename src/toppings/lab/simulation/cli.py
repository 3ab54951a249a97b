"""The verbs `toppings trace …` and `toppings simulate`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import POLICIES
from toppings.lab.figures import save_all
from toppings.lab.options import FiguresDir, PrintJson, SettingsOf, verb
from toppings.lab.progress import progress_bar
from toppings.lab.simulation import tables
from toppings.lab.simulation.describe import describe
from toppings.lab.simulation.figures import draw_attainment, draw_tpt, draw_trace
from toppings.lab.simulation.metrics import RunSummary, summarize_run
from toppings.lab.simulation.sources import FromFile, FromPreset, Source
from toppings.sim.records import SimResult
from toppings.sim.runs import SimJob, run_jobs
from toppings.sim.settings import SimConfig, parse_slo_ms
from toppings.sim.synth.workload import PRESETS
from toppings.sim.trace import write_trace

app = typer.Typer(no_args_is_help=True)
trace_app = typer.Typer(no_args_is_help=True, help="Traces of requests: make them, look at them.")
app.add_typer(trace_app, name="trace")

DEFAULT_POLICIES = "random,first_fit,dlora,rank_aware"


# --- toppings trace ---


@dataclass(frozen=True, kw_only=True)
class SynthOptions(FromPreset):
    path: Annotated[Path, typer.Argument(help="the CSV file to write")]
    preset: Annotated[str, typer.Option(help=f"what to begin with: {', '.join(PRESETS)}")] = "poisson-chat"
    seed: int = 0


@trace_app.command("synth")
@verb
def synth(options: SynthOptions) -> None:
    """Write a generated trace as CSV: arrival_s, adapter, rank, prompt_tokens, response_tokens."""
    workload = options.workload(options.preset)
    trace = workload.make_trace(options.seed)
    write_trace(trace, options.path)
    typer.echo(f"wrote {len(trace):,} requests to {options.path}: {workload.describe()}")


@dataclass(frozen=True, kw_only=True)
class DescribeOptions(FromFile):
    path: Annotated[Path, typer.Argument(help="the trace file")]
    seed: int = 0
    json_output: PrintJson = False
    figures: FiguresDir = None


@trace_app.command("describe")
@verb
def describe_trace(options: DescribeOptions) -> None:
    """Show rate, burstiness, lengths and popularity of a trace file."""
    trace = options.load(options.path, options.seed)
    description = describe(trace)
    if options.figures is not None:
        save_all(draw_trace(trace), options.figures, "trace")
    if options.json_output:
        typer.echo(json.dumps(asdict(description), indent=2))
    else:
        tables.print_description(description)


# --- toppings simulate ---


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(Source):
    context: typer.Context
    server: Annotated[dict[str, Any], SettingsOf(SimConfig)]
    policies: Annotated[str, typer.Option(help=f"some of {', '.join(POLICIES)}")] = DEFAULT_POLICIES
    perf_model: Annotated[str, typer.Option(help="JSON file, or a shipped one[:form]")] = "published"
    slo: Annotated[str, typer.Option(help="ms per token, a multiple of the base model's, or none")] = "1.5x"
    seeds: Annotated[int, typer.Option(min=1, help="repetitions, each with its own seed")] = 1
    seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0
    processes: Annotated[int, typer.Option(min=0, help="at a time (0: one per core)")] = 0
    validate: Annotated[
        bool, typer.Option("--validate", help="instead: an engine on this machine against its simulation")
    ] = False
    model: Annotated[
        str, typer.Option(help="with --validate: base model directory (default: random weights)")
    ] = ""
    replays: Annotated[int, typer.Option(min=1, help="with --validate: times through the engine")] = 2
    json_output: PrintJson = False
    figures: FiguresDir = None

    def config(self) -> SimConfig:
        """But for policy and seed. Raises ValueError for what is out of range."""
        model = load_perf_model(self.perf_model)
        return SimConfig(
            perf_model=model,
            slo_tpt_ms=parse_slo_ms(self.slo, model),
            max_model_len=min(SimConfig.max_model_len, self.server["kv_cache_tokens"]),
            **self.server,
        )


@app.command("simulate")
@verb
def simulate(options: SimulateOptions) -> None:
    """Compare routing policies on servers that are simulated: a trace, or a generated workload."""
    check_validation_options(options.context, is_validation=options.validate)
    if options.validate:
        from toppings.lab.validation.command import run_validation
        from toppings.lab.validation.validate import ValidationSpec

        validation = ValidationSpec(model=options.model, replays=options.replays, seed=options.seed)
        run_validation(validation, is_json=options.json_output, figures=options.figures)
        return
    config, seeds = options.config(), range(options.seed, options.seed + options.seeds)
    sources = options.sources(seeds)
    jobs = [
        SimJob(replace(config, policy=policy, seed=seed), source)
        for policy in options.policies.split(",")
        for seed, source in zip(seeds, sources)
    ]
    results = run_with_progress(jobs, options.processes)
    summaries = [summarize_run(result) for result in results]
    if options.figures is not None:
        write_figures(results, summaries, options.figures)
    if options.json_output:
        typer.echo(results_json(config, summaries))
    else:
        tables.print_summaries(summaries)


VALIDATION_OPTIONS = ("validate", "model", "replays")
SHARED_OPTIONS = ("seed", "json_output", "figures")


def check_validation_options(context: typer.Context, *, is_validation: bool) -> None:
    """Raises ValueError for an option that would be ignored."""
    given = [name for name in context.params if _is_given(context, name) and name not in SHARED_OPTIONS]
    wrong = [name for name in given if (name in VALIDATION_OPTIONS) != is_validation]
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise ValueError(f"{option} {'does not go with' if is_validation else 'is of'} --validate")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def run_with_progress(jobs: Sequence[SimJob], num_processes: int) -> list[SimResult]:
    """As `run_jobs`, with a bar on standard error."""
    shares = [0.0] * len(jobs)
    with progress_bar() as bar:

        def update(index: int, share: float) -> None:
            shares[index] = share
            bar.reach(f"{len(jobs)} simulations", sum(shares) / len(jobs))

        return run_jobs(jobs, num_processes=num_processes, on_progress=update)


def results_json(config: SimConfig, summaries: Sequence[RunSummary]) -> str:
    """The resolved configuration and the summaries; what is infinite or not a number becomes null."""
    encoded = msgspec.json.encode({"config": config, "runs": list(summaries)})
    return msgspec.json.format(encoded, indent=2).decode()


def write_figures(results: Sequence[SimResult], summaries: Sequence[RunSummary], directory: Path) -> None:
    """Figures as PDF and PNG, and the JSON behind them."""
    save_all(draw_attainment(summaries), directory, "attainment")
    save_all(draw_tpt(results), directory, "tpt")
    (directory / "simulation.json").write_text(results_json(results[0].config, summaries))
