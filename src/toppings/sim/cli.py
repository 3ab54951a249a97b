"""The verbs `toppings trace …` and `toppings simulate`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import POLICIES
from toppings.config import parse_bytes
from toppings.sim.assign import TraceOptions
from toppings.sim.describe import Description, describe
from toppings.sim.loading import MODES
from toppings.sim.metrics import Summary, summarize
from toppings.sim.readers import FORMATS, load_trace
from toppings.sim.records import SimResult
from toppings.sim.runs import Job, run_jobs
from toppings.sim.settings import SimConfig, parse_slo_ms
from toppings.sim.synth.arrivals import ARRIVALS
from toppings.sim.synth.lengths import PARAMETERS as LENGTHS
from toppings.sim.synth.popularity import POPULARITIES
from toppings.sim.synth.workload import PRESETS, Workload, preset
from toppings.sim.trace import Trace, write_trace

app = typer.Typer(no_args_is_help=True)
trace_app = typer.Typer(no_args_is_help=True, help="Traces of requests: make them, look at them.")
app.add_typer(trace_app, name="trace")

DEFAULT_POLICIES = "random,first_fit,dlora,rank_aware"

Rate = Annotated[
    float | None, typer.Option(help="requests per second (default: the trace's or preset's own)")
]
Duration = Annotated[float | None, typer.Option("--duration", help="seconds (default: all; preset: its own)")]
Adapters = Annotated[int | None, typer.Option("--adapters", help="how many adapters")]
Ranks = Annotated[str, typer.Option(help="ranks of the adapters, in turn")]
PopularityOption = Annotated[
    str | None, typer.Option("--popularity", help=f"{', '.join(POPULARITIES)}; zipf:1.2, geometric:1.5")
]
LengthsOption = Annotated[
    str | None, typer.Option("--lengths", help=f"{', '.join(LENGTHS)}; fixed:PROMPT:RESPONSE")
]
ArrivalsOption = Annotated[str | None, typer.Option("--arrivals", help=f"{', '.join(ARRIVALS)}; gamma:CV")]
Drift = Annotated[float | None, typer.Option("--drift", help="seconds between changes of popularity")]
Format = Annotated[str, typer.Option("--format", help=f"auto, {', '.join(FORMATS)}")]
Start = Annotated[float, typer.Option(help="leave out the trace's first seconds")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
FiguresDir = Annotated[Path | None, typer.Option(help="directory for figures (PDF and PNG)")]


def make_workload(name: str, **changes: Any) -> Workload:
    """The preset with those fields changed that are not None."""
    return replace(preset(name), **{key: value for key, value in changes.items() if value is not None})


def parse_ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        raise ValueError(f"ranks are {text!r}; write numbers with commas between, e.g. 8,16") from None


# --- toppings trace ---


@trace_app.command("synth")
def synth(
    path: Annotated[Path, typer.Argument(help="the CSV file to write")],
    preset: Annotated[str, typer.Option(help=f"what to begin with: {', '.join(PRESETS)}")] = "poisson-chat",
    rate: Rate = None,
    duration: Duration = None,
    adapters: Adapters = None,
    ranks: Ranks = "8,16,32,64",
    arrivals: ArrivalsOption = None,
    popularity: PopularityOption = None,
    lengths: LengthsOption = None,
    drift: Drift = None,
    seed: int = 0,
) -> None:
    """Write a generated trace as CSV: arrival_s, adapter, rank, prompt_tokens, response_tokens."""
    workload = make_workload(
        preset,
        rate=rate,
        duration_s=duration,
        num_adapters=adapters,
        ranks=parse_ranks(ranks),
        arrivals=arrivals,
        popularity=popularity,
        lengths=lengths,
        drift_s=drift,
    )
    trace = workload.make_trace(seed)
    write_trace(trace, path)
    typer.echo(f"wrote {len(trace):,} requests to {path}: {workload.describe()}")


@trace_app.command("describe")
def describe_trace(
    path: Annotated[Path, typer.Argument(help="the trace file")],
    format_name: Format = "auto",
    rate: Rate = None,
    start: Start = 0.0,
    duration: Duration = None,
    adapters: Adapters = None,
    popularity: PopularityOption = None,
    lengths: LengthsOption = None,
    ranks: Ranks = "8,16,32,64",
    seed: int = 0,
    json_output: Json = False,
    figures: FiguresDir = None,
) -> None:
    """Show rate, burstiness, lengths and popularity of a trace file."""
    options = make_options(rate, start, duration, adapters, popularity, lengths, ranks, seed)
    trace = load_trace(path, options, format_name=format_name)
    description = describe(trace)
    if figures is not None:
        draw_trace_figures(trace, figures)
    if json_output:
        typer.echo(json.dumps(asdict(description), indent=2))
    else:
        print_description(description)


def make_options(
    rate: float | None,
    start: float,
    duration: float | None,
    adapters: int | None,
    popularity: str | None,
    lengths: str | None,
    ranks: str,
    seed: int,
) -> TraceOptions:
    """Those that are None keep the defaults of `TraceOptions`."""
    given = {
        "rate": rate,
        "duration_s": duration,
        "num_adapters": adapters,
        "popularity": popularity,
        "lengths": lengths,
    }
    kept = {name: value for name, value in given.items() if value is not None}
    return TraceOptions(start_s=start, ranks=parse_ranks(ranks), seed=seed, **kept)  # type: ignore[arg-type]


def draw_trace_figures(trace: Trace, directory: Path) -> None:
    from toppings.sim.figures import draw_trace

    directory.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        draw_trace(trace, directory / f"trace.{suffix}")


def print_description(description: Description) -> None:
    table = Table("", description.origin)
    dropped = f" ({description.num_dropped:,} failed ones left out)" if description.num_dropped else ""
    table.add_row("requests", f"{description.num_requests:,}{dropped} in {description.duration_s:,.1f} s")
    table.add_row("rate", f"{description.rate:.3f}/s; gaps have CV {description.gap_cv:.2f}")
    for window, value in description.dispersion.items():
        table.add_row(f"index of dispersion, {window} s", "too short" if value is None else f"{value:.2f}")
    for name, lengths in (("prompt", description.prompt_tokens), ("response", description.response_tokens)):
        quantiles = f"p50 {lengths.p50:.0f}, p90 {lengths.p90:.0f}, p99 {lengths.p99:.0f}"
        table.add_row(f"{name} tokens", f"mean {lengths.mean:.1f}, {quantiles}")
    table.add_row("adapters", f"{description.num_adapters_used:,} of {description.num_adapters:,} asked for")
    shares = ", ".join(f"top {percent} %: {share:.1%}" for percent, share in description.top_share.items())
    table.add_row("popularity", shares)
    table.add_row(
        "ranks", ", ".join(f"{rank}: {share:.1%}" for rank, share in description.rank_share.items())
    )
    Console().print(table)


# --- toppings simulate ---


@app.command("simulate")
def simulate(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="a trace file")] = None,
    synth: Annotated[str | None, typer.Option(help=f"or a workload: {', '.join(PRESETS)}")] = None,
    instances: Annotated[int, typer.Option(help="servers behind the router")] = SimConfig.num_instances,
    policies: Annotated[str, typer.Option(help=f"some of {', '.join(POLICIES)}")] = DEFAULT_POLICIES,
    perf_model: Annotated[str, typer.Option(help="JSON file, or a shipped one[:form]")] = "published",
    mode: Annotated[str, typer.Option(help=f"cold adapters: {', '.join(MODES)}")] = SimConfig.mode,
    slo: Annotated[str, typer.Option(help="ms per token, a multiple of the base model's, or none")] = "1.5x",
    seeds: Annotated[int, typer.Option(min=1, help="repetitions, each with its own seed")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
    rate: Rate = None,
    start: Start = 0.0,
    duration: Duration = None,
    adapters: Adapters = None,
    ranks: Ranks = "8,16,32,64",
    arrivals: ArrivalsOption = None,
    popularity: PopularityOption = None,
    lengths: LengthsOption = None,
    drift: Drift = None,
    format_name: Format = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="requests at once on a server")] = SimConfig.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="tokens of one step")
    ] = SimConfig.max_num_batched_tokens,
    kv_cache_tokens: Annotated[int, typer.Option(help="of a server")] = SimConfig.kv_cache_tokens,
    device_pool_bytes: Annotated[str, typer.Option(help="of a server (default: 8GiB)")] = "8GiB",
    host_store_bytes: Annotated[str, typer.Option(help="of a server (0: holds every adapter)")] = "0",
    bytes_per_rank: Annotated[int, typer.Option(help="of an adapter")] = SimConfig.bytes_per_rank,
    layers: Annotated[int, typer.Option(help="of the base model")] = SimConfig.num_layers,
    cpu_gflops: Annotated[float, typer.Option(help="of a server's CPU workers together")] = 0.0,
    report_interval: Annotated[
        float, typer.Option(help="s between a server's reports to the router")
    ] = SimConfig.report_interval_s,
    candidates: Annotated[
        int, typer.Option(help="servers drawn for each request to choose from (0: all)")
    ] = SimConfig.candidates,
    routers: Annotated[
        int, typer.Option(help="that take requests in turn and share no state")
    ] = SimConfig.num_routers,
    snapshot_interval: Annotated[
        float, typer.Option(help="s between copies of its accounts that a router decides on (0: no copies)")
    ] = SimConfig.snapshot_interval_s,
    processes: Annotated[int, typer.Option(min=0, help="at a time (0: one per core)")] = 0,
    validate: Annotated[
        bool, typer.Option("--validate", help="instead: an engine on this machine against its simulation")
    ] = False,
    model: Annotated[
        str, typer.Option(help="with --validate: base model directory (default: random weights)")
    ] = "",
    replays: Annotated[int, typer.Option(min=1, help="with --validate: times through the engine")] = 2,
    json_output: Json = False,
    figures: FiguresDir = None,
) -> None:
    """Compare routing policies on servers that are simulated: a trace, or a generated workload."""
    check_validation_options(context, is_validation=validate)
    if validate:
        from toppings.bench.validation.command import run_validation
        from toppings.bench.validation.validate import ValidationSpec

        validation = ValidationSpec(model=model, replays=replays, seed=seed)
        run_validation(validation, is_json=json_output, figures=figures)
        return
    if (trace is None) == (synth is None):
        raise ValueError("give either --trace FILE or --synth WORKLOAD")
    step_model = load_perf_model(perf_model)
    config = SimConfig(
        perf_model=step_model,
        num_instances=instances,
        mode=mode,
        slo_tpt_ms=parse_slo_ms(slo, step_model),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=min(SimConfig.max_model_len, kv_cache_tokens),
        kv_cache_tokens=kv_cache_tokens,
        device_pool_bytes=parse_bytes(device_pool_bytes),
        host_store_bytes=parse_bytes(host_store_bytes),
        bytes_per_rank=bytes_per_rank,
        num_layers=layers,
        cpu_gflops=cpu_gflops,
        report_interval_s=report_interval,
        candidates=candidates,
        num_routers=routers,
        snapshot_interval_s=snapshot_interval,
    )
    all_seeds = range(seed, seed + seeds)
    sources: list[Trace | Workload]
    if trace is not None:
        if arrivals or drift:
            raise ValueError("--arrivals and --drift are of a workload; the trace has its own")
        each = [
            make_options(rate, start, duration, adapters, popularity, lengths, ranks, s) for s in all_seeds
        ]
        sources = [load_trace(trace, options, format_name=format_name) for options in each]
    else:
        assert synth is not None
        if start or format_name != "auto":
            raise ValueError("--start and --format are of a trace file")
        workload = make_workload(
            synth,
            rate=rate,
            duration_s=duration,
            num_adapters=adapters,
            ranks=parse_ranks(ranks),
            arrivals=arrivals,
            popularity=popularity,
            lengths=lengths,
            drift_s=drift,
        )
        sources = [workload] * seeds
    jobs = [
        Job(replace(config, policy=policy, seed=s), source)
        for policy in policies.split(",")
        for s, source in zip(all_seeds, sources)
    ]
    results = run_with_progress(jobs, processes)
    summaries = [summarize(result) for result in results]
    if figures is not None:
        write_figures(results, summaries, figures)
    if json_output:
        typer.echo(results_json(config, summaries))
    else:
        print_summaries(summaries)


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


def run_with_progress(jobs: Sequence[Job], num_processes: int) -> list[SimResult]:
    """As `run_jobs`, with a bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(jobs)} simulations", total=len(jobs))
        shares = [0.0] * len(jobs)

        def update(index: int, share: float) -> None:
            shares[index] = share
            progress.update(task, completed=sum(shares))

        return run_jobs(jobs, num_processes=num_processes, on_progress=update)


def results_json(config: SimConfig, summaries: Sequence[Summary]) -> str:
    """The resolved configuration and the summaries; what is infinite or not a number becomes null."""
    encoded = msgspec.json.encode({"config": config, "runs": list(summaries)})
    return msgspec.json.format(encoded, indent=2).decode()


def write_figures(results: Sequence[SimResult], summaries: Sequence[Summary], directory: Path) -> None:
    """Figures as PDF and PNG, and the JSON behind them."""
    from toppings.sim.figures import draw_attainment, draw_tpt

    directory.mkdir(parents=True, exist_ok=True)
    for suffix in ("pdf", "png"):
        draw_attainment(summaries, directory / f"attainment.{suffix}")
        draw_tpt(results, directory / f"tpt.{suffix}")
    (directory / "simulation.json").write_text(results_json(results[0].config, summaries))


def print_summaries(summaries: Sequence[Summary]) -> None:
    """One row per policy: means over its seeds, and the attainment's range."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in ("in SLO", *(f"{name}\n{kind}" for name in LATENCIES for kind in ("mean", "p99"))):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("busy", "warm", "lost"):
        table.add_column(name, justify="right")
    for policy in dict.fromkeys(summary.policy for summary in summaries):
        table.add_row(policy, *_cells([s for s in summaries if s.policy == policy]))
    console = Console()
    console.width = max(console.width, MIN_TABLE_WIDTH)
    console.print(table)
    typer.echo(
        f"{len(summaries)} runs; latencies in ms, SLO {summaries[0].slo_tpt_ms:.1f} ms per token\n"
        "busy: part of the servers' time, warm: requests whose adapter was on the device, lost: rejected"
    )


MIN_TABLE_WIDTH = 110
LATENCIES = {"TTFT": "ttft_ms", "TPT": "tpt_ms", "E2E": "e2e_ms"}


def _cells(runs: Sequence[Summary]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    shares = [run.slo_attainment for run in runs]
    spread = f"\n{min(shares):.1%} … {max(shares):.1%}" if len(runs) > 1 else ""
    stats = [[getattr(run, name) for run in runs] for name in LATENCIES.values()]
    return [
        f"{mean(shares):.2%}{spread}",
        *(f"{mean([getattr(s, kind) for s in each]):,.1f}" for each in stats for kind in ("mean", "p99")),
        f"{mean([run.busy_share for run in runs]):.0%}",
        f"{mean([run.adapter_hit_rate for run in runs]):.0%}",
        f"{sum(run.num_rejected for run in runs)}",
    ]
