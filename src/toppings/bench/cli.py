"""`toppings bench`, `toppings report`, `toppings profile batches`; aiohttp and torch are imported on use."""

import asyncio
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toppings.bench import figures, tables
from toppings.bench.apis import APIS
from toppings.bench.batch_steps import MAX_SECONDS, BatchSpec
from toppings.bench.comparison import HOMES, REFERENCE_MODE, Comparison, ModesSpec
from toppings.bench.load import POPULARITIES, PROMPT_FORMS, LoadShape
from toppings.bench.machine import describe_machine
from toppings.bench.report import read_report
from toppings.config import MODES, Config
from toppings.core import parse_targets
from toppings.sim.cli import parse_ranks

if TYPE_CHECKING:
    from toppings.bench.requests import RequestsResult

DEFAULT_LOAD_RATIO = 1.5
DEFAULT_LOGS = "logs/bench"
FAILED = 1
T = TypeVar("T")

bench_app = typer.Typer(no_args_is_help=True, help="Latencies of cold requests, here or on a running server.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="write the results to this file")]
FigureFile = Annotated[Path | None, typer.Option(help="draw the results to this file (.png, .pdf, .svg)")]
PromptTokens = Annotated[int, typer.Option(help="tokens of a prompt")]
MaxTokens = Annotated[int, typer.Option(help="tokens to generate")]
Seed = Annotated[int, typer.Option(help="seed of prompts and arrivals")]


@bench_app.command("requests")
def bench_requests(
    *,
    url: Annotated[str, typer.Option(help="the server: ours, or any OpenAI-compatible one")],
    adapters: Annotated[
        str, typer.Option(help="names with commas between; auto: all that the server lists")
    ] = "auto",
    requests: Annotated[int, typer.Option(help="how many, after the warm-up")] = 60,
    warmup: Annotated[int, typer.Option(min=0, help="how many come first and are not counted")] = 3,
    rps: Annotated[
        float, typer.Option(help="Poisson arrivals a second (0: one request after another)")
    ] = 0.0,
    prompt_tokens: PromptTokens = 64,
    max_tokens: MaxTokens = 16,
    popularity: Annotated[str, typer.Option(help=f"of the adapters: {', '.join(POPULARITIES)}")] = "in_turn",
    prompt: Annotated[str, typer.Option(help=f"sent as {' or '.join(PROMPT_FORMS)} (so many words)")] = "",
    api: Annotated[str, typer.Option(help=f"one of {', '.join(APIS)}")] = "completions",
    ignore_eos: Annotated[
        bool, typer.Option(help="generate all tokens; needs a server that knows ignore_eos")
    ] = True,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a request may take")] = 300.0,
    api_key: Annotated[str, typer.Option(envvar="TOPPINGS_API_KEY", help="the server's key")] = "",
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Send requests to a running server; print average and total time and the latencies."""
    figures.check_files(json_file, None)
    if api not in APIS:
        raise ValueError(f"api is {api!r}; choose one of {', '.join(APIS)}")
    shape = LoadShape(
        num_requests=requests,
        rps=rps,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        popularity=popularity,
        prompt_form=prompt or ("text" if api == "generate" else "ids"),
        seed=seed,
    )
    if api == "generate" and shape.prompt_form == "ids":
        raise ValueError("prompt is 'ids'; the generate API takes 'text' only")
    from toppings.bench.client import LoadClient
    from toppings.bench.requests import send_requests

    client = LoadClient(url, APIS[api](ignores_eos=ignore_eos), api_key=api_key, timeout_s=timeout)
    names = None if adapters == "auto" else [name for name in adapters.split(",") if name]
    with _progress() as progress:
        task = progress.add_task("requests", total=warmup + requests)
        result = _run(send_requests(client, shape, names, warmup, lambda: progress.advance(task)))
    _show_requests(result, json_file, {"url": url, "api": api, "warmup": warmup, "ignore_eos": ignore_eos})
    if result.summary.num_errors:
        raise typer.Exit(FAILED)


@bench_app.command("modes")
def bench_modes(
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML settings of the servers (default: the demo)")
    ] = None,
    modes: Annotated[str, typer.Option(help="with commas between")] = ",".join(MODES),
    requests: Annotated[
        int, typer.Option(help="how many one after another, and again as many at random")
    ] = 60,
    warmup: Annotated[int, typer.Option(min=0, help="how many come first and are not counted")] = 3,
    rps: Annotated[
        float, typer.Option(help="Poisson arrivals a second (0: half of what one at a time allows)")
    ] = 0.0,
    adapters: Annotated[int, typer.Option(help="distinct adapters; made, if the settings name none")] = 60,
    ranks: Annotated[str, typer.Option(help="of adapters that are made, taken in turn")] = "64",
    targets: Annotated[
        str, typer.Option(help="projections of adapters that are made, or all")
    ] = "q_proj,k_proj,v_proj",
    home: Annotated[str, typer.Option(help=f"where cold adapters are: {' or '.join(HOMES)}")] = "host",
    link_gbps: Annotated[
        float | None, typer.Option(help="emulate a link of this speed, in GB/s (0: none)")
    ] = None,
    load_ratio: Annotated[
        float | None,
        typer.Option(
            help="emulate a link on which a load takes so many times a cached prefill "
            f"(default: {DEFAULT_LOAD_RATIO}, where neither settings nor --link-gbps say anything)"
        ),
    ] = None,
    prompt_tokens: PromptTokens = 64,
    max_tokens: MaxTokens = 16,
    seed: Seed = 0,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="one server after another, not all of them taking turns")
    ] = False,
    log_dir: Annotated[
        str, typer.Option(help="the servers' logs, and what `toppings report` reads")
    ] = DEFAULT_LOGS,
    work_dir: Annotated[
        Path | None, typer.Option(help="where adapters are made (default: a temporary place)")
    ] = None,
    json_file: JsonFile = None,
    figure: FigureFile = None,
) -> None:
    """Start a server in each mode, send all the same cold requests in turn, compare the latencies."""
    figures.check_files(json_file, figure)
    base = Config.from_yaml(config) if config else Config()
    settings: dict[str, Any] = {"log_dir": log_dir}
    if link_gbps is not None:
        settings["link_gbps"] = link_gbps
    elif load_ratio is None and config is None:
        load_ratio = DEFAULT_LOAD_RATIO
    load = LoadShape(
        num_requests=requests, rps=rps, prompt_tokens=prompt_tokens, max_tokens=max_tokens, seed=seed
    )
    spec = ModesSpec(
        base=Config.from_settings(settings, base),
        modes=tuple(name for name in modes.split(",") if name),
        load=load,
        num_warmup=warmup,
        num_adapters=adapters,
        ranks=ranks,
        targets=targets,
        home=home,
        load_ratio=load_ratio or 0.0,
        one_at_a_time=one_at_a_time,
    )
    comparison = compare_with_progress(spec, work_dir)
    _show_comparison(comparison, json_file, figure)
    if any(summary.num_errors for result in comparison.results for summary in result.loads.values()):
        raise typer.Exit(FAILED)


def report(
    logs: Annotated[Path, typer.Argument(help="directory with <mode>/steps.jsonl")] = Path("logs"),
    json_file: JsonFile = None,
    figure: FigureFile = None,
) -> None:
    """Mean prefill, decode and load times of each mode, from the servers' step logs."""
    figures.check_files(json_file, figure)
    result = read_report(logs)
    Console().print(tables.report_table(result))
    _write_json(json_file, {"benchmark": "report", "logs": str(logs), **result.to_json()})
    if figure is not None:
        figures.draw_report(result, figure)


def profile_batches(
    *,
    seconds: Annotated[
        float, typer.Option(help=f"time to measure, at most {MAX_SECONDS:g}; setting up comes on top")
    ] = BatchSpec.seconds,
    ranks: Annotated[str, typer.Option(help="of the random adapters that are made")] = "8,16,32,64",
    targets: Annotated[str, typer.Option(help="their projections, or all")] = ",".join(BatchSpec.targets),
    json_file: JsonFile = None,
    figure: FigureFile = None,
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Time steps of many batches and fit what they cost; a server with the same settings tells routers so."""
    figures.check_files(json_file, figure)
    spec = BatchSpec(seconds, parse_ranks(ranks), parse_targets(targets))
    engine = Config.from_settings(settings, Config.from_yaml(config) if config else None).engine
    from toppings.bench import batch_profile

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def on_progress(what: str, share: float) -> None:
            progress.update(task, description=what, completed=min(share, 1.0))

        command = f"toppings {shlex.join(sys.argv[1:])}"
        profile, path = batch_profile.profile_batches(engine, spec, command=command, on_progress=on_progress)
    Console().print(tables.perf_model_table(profile.model))
    Console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    _write_json(json_file, profile.to_json())
    if figure is not None:
        figures.draw_batch_profile(profile, figure)


def compare_with_progress(spec: ModesSpec, work_dir: Path | None) -> Comparison:
    from toppings.bench.modes import compare_modes

    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="toppings-bench-", dir=work_dir) as place,
        _progress() as progress,
    ):
        task = progress.add_task("", total=len(spec.modes) * spec.num_requests_per_mode())

        def on_progress(what: str, num_done: int) -> None:
            progress.update(task, description=what, advance=num_done)

        return _run(compare_modes(spec, Path(place), on_progress))


def _show_requests(result: "RequestsResult", json_file: Path | None, options: dict[str, Any]) -> None:
    console, note = Console(), tables.link_note([result.link_gbps])
    kind = f"Poisson arrivals, {result.shape.rps:g}/s" if result.shape.rps else "one after another"
    title = f"{result.shape.num_requests} requests, {kind}, {result.num_adapters} adapters"
    console.print(tables.summary_table(result.summary, title + (f" ({note})" if note else "")))
    for reason, count in result.summary.errors.items():
        console.print(f"{count} failed: {reason}", markup=False)
    _write_json(json_file, {"benchmark": "requests", **options, **result.to_json()})


def _show_comparison(comparison: Comparison, json_file: Path | None, figure: Path | None) -> None:
    console = Console()
    console.print(tables.comparison_table(comparison))
    for result in comparison.results:
        for kind, summary in result.loads.items():
            for reason, count in summary.errors.items():
                console.print(f"{result.mode}, {kind}: {count} failed: {reason}", markup=False)
            if result.mode != REFERENCE_MODE and (summary.num_cold or 0) < summary.num_requests:
                warm = summary.num_requests - (summary.num_cold or 0)
                console.print(f"{result.mode}, {kind}: {warm} requests were not cold; use more adapters")
    _write_json(json_file, {"benchmark": "modes", **comparison.to_json()})
    if figure is not None:
        figures.draw_comparison(comparison, figure)


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps({**content, "machine": describe_machine()}, indent=2) + "\n")


def _run(work: Coroutine[Any, Any, T]) -> T:
    """To its end, or cancelled in order by SIGTERM as by Ctrl-C, so that no server is left behind."""

    async def until_stopped() -> T:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(until_stopped())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress
