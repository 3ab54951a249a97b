"""`toppings bench` and `toppings report`; aiohttp is imported where it is used."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from toppings.access import read_api_key
from toppings.config import MODES, Config
from toppings.lab import tables
from toppings.lab.figures import save
from toppings.lab.http.apis import APIS
from toppings.lab.modes.comparison import (
    DEFAULT_LOAD_RATIO,
    REFERENCE_MODE,
    ModesComparison,
    ModesSpec,
)
from toppings.lab.modes.figures import draw_comparison, draw_report
from toppings.lab.modes.report import read_report
from toppings.lab.modes.tables import comparison_table, report_table
from toppings.lab.options import ConfigFile, FigureFile, JsonFile, SettingsOf, parse_names, verb
from toppings.lab.progress import progress_bar, run_to_end
from toppings.lab.results import check_files, write_json
from toppings.lab.workload import PROMPT_FORMS, LoadShape
from toppings.options import ApiKey, ApiKeyFile

if TYPE_CHECKING:
    from toppings.lab.http.requests import RequestsResult

DEFAULT_LOGS = "logs/bench"
FAILED = 1
MODES_HELPS = {
    "num_requests": "how many one after another, and again as many at random",
    "rps": "Poisson arrivals a second (0: half of what one at a time allows)",
}

app = typer.Typer(no_args_is_help=True)
bench_app = typer.Typer(no_args_is_help=True, help="Latencies of cold requests, here or on a running server.")
app.add_typer(bench_app, name="bench")


@dataclass(frozen=True, kw_only=True)
class RequestsOptions:
    url: Annotated[str, typer.Option(help="the server: ours, or any OpenAI-compatible one")]
    adapters: Annotated[
        str, typer.Option(help="names with commas between; auto: all that the server lists")
    ] = "auto"
    load: Annotated[dict[str, Any], SettingsOf(LoadShape)]
    warmup: Annotated[int, typer.Option(min=0, help="how many come first and are not counted")] = 3
    prompt: Annotated[str, typer.Option(help=f"sent as {' or '.join(PROMPT_FORMS)} (so many words)")] = ""
    api: Annotated[str, typer.Option(help=f"one of {', '.join(APIS)}")] = "completions"
    ignore_eos: Annotated[
        bool, typer.Option(help="generate all tokens; needs a server that knows ignore_eos")
    ] = True
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a request may take")] = 300.0
    api_key: ApiKey = ""
    api_key_file: ApiKeyFile = ""
    json_file: JsonFile = None

    def shape(self) -> LoadShape:
        """Raises ValueError for what is out of range, or not to be sent to such a server."""
        if self.api not in APIS:
            raise ValueError(f"api is {self.api!r}; choose one of {', '.join(APIS)}")
        prompt_form = self.prompt or ("text" if self.api == "generate" else "ids")
        shape = LoadShape(**self.load, prompt_form=prompt_form)
        if self.api == "generate" and shape.prompt_form == "ids":
            raise ValueError("prompt is 'ids'; the generate API takes 'text' only")
        return shape


@dataclass(frozen=True, kw_only=True)
class ModesOptions:
    config: ConfigFile = None
    modes: Annotated[str, typer.Option(help="with commas between")] = ",".join(MODES)
    load: Annotated[dict[str, Any], SettingsOf(LoadShape, without=("popularity",), helps=MODES_HELPS)]
    settings: Annotated[dict[str, Any], SettingsOf(ModesSpec)]
    link_gbps: Annotated[
        float | None, typer.Option(help="emulate a link of this speed, in GB/s (0: none)")
    ] = None
    load_ratio: Annotated[
        float | None,
        typer.Option(
            help="emulate a link on which a load takes so many times a cached prefill "
            f"(default: {DEFAULT_LOAD_RATIO}, where neither settings nor --link-gbps say anything)"
        ),
    ] = None
    log_dir: Annotated[str, typer.Option(help="the servers' logs, and what `toppings report` reads")] = (
        DEFAULT_LOGS
    )
    work_dir: Annotated[
        Path | None, typer.Option(help="where adapters are made (default: a temporary place)")
    ] = None
    json_file: JsonFile = None
    figure: FigureFile = None

    def spec(self) -> ModesSpec:
        """Raises ValueError for what is out of range."""
        settings: dict[str, Any] = {"log_dir": self.log_dir}
        load_ratio = self.load_ratio
        if self.link_gbps is not None:
            settings["link_gbps"] = self.link_gbps
        elif load_ratio is None and self.config is None:
            load_ratio = DEFAULT_LOAD_RATIO
        base = Config.from_yaml(self.config) if self.config else Config()
        return ModesSpec(
            base=Config.from_settings(settings, base),
            modes=parse_names(self.modes),
            load=LoadShape(**self.load),
            load_ratio=load_ratio or 0.0,
            **self.settings,
        )


@bench_app.command("requests")
@verb
def bench_requests(options: RequestsOptions) -> None:
    """Send requests to a running server; print average and total time and the latencies."""
    check_files(options.json_file, None)
    shape = options.shape()
    from toppings.lab.http.client import LoadClient
    from toppings.lab.http.requests import send_requests

    api = APIS[options.api](ignores_eos=options.ignore_eos)
    key = read_api_key(options.api_key, options.api_key_file)
    client = LoadClient(options.url, api, api_key=key, timeout_s=options.timeout)
    names = None if options.adapters == "auto" else parse_names(options.adapters)
    with progress_bar("requests", options.warmup + shape.num_requests) as bar:
        result = run_to_end(send_requests(client, shape, names, options.warmup, bar.advance))
    asked = {name: getattr(options, name) for name in ("url", "api", "warmup", "ignore_eos")}
    _show_requests(result, options.json_file, asked)
    if result.summary.num_errors:
        raise typer.Exit(FAILED)


@bench_app.command("modes")
@verb
def bench_modes(options: ModesOptions) -> None:
    """Start a server in each mode, send all the same cold requests in turn, compare the latencies."""
    check_files(options.json_file, options.figure)
    from toppings.lab.modes.compare import compare_with_progress

    comparison = compare_with_progress(options.spec(), options.work_dir)
    _show_comparison(comparison, options.json_file, options.figure)
    if any(summary.num_errors for result in comparison.results for summary in result.loads.values()):
        raise typer.Exit(FAILED)


@app.command("report")
def report(
    logs: Annotated[Path, typer.Argument(help="directory with <mode>/steps.jsonl")] = Path("logs"),
    json_file: JsonFile = None,
    figure: FigureFile = None,
) -> None:
    """Mean prefill, decode and load times of each mode, from the servers' step logs."""
    check_files(json_file, figure)
    result = read_report(logs)
    Console().print(report_table(result))
    write_json(json_file, {"benchmark": "report", "logs": str(logs), **result.to_json()})
    if figure is not None:
        save(draw_report(result), figure)


def _show_requests(result: "RequestsResult", json_file: Path | None, options: dict[str, Any]) -> None:
    console = Console()
    kind = f"Poisson arrivals, {result.shape.rps:g}/s" if result.shape.rps else "one after another"
    title = f"{result.shape.num_requests} requests, {kind}, {result.num_adapters} adapters"
    console.print(tables.summary_table(result.summary, tables.with_link_note(title, [result.link_gbps])))
    for reason, count in result.summary.errors.items():
        console.print(f"{count} failed: {reason}", markup=False)
    write_json(json_file, {"benchmark": "requests", **options, **result.to_json()})


def _show_comparison(comparison: ModesComparison, json_file: Path | None, figure: Path | None) -> None:
    console = Console()
    console.print(comparison_table(comparison))
    for result in comparison.results:
        for kind, summary in result.loads.items():
            for reason, count in summary.errors.items():
                console.print(f"{result.mode}, {kind}: {count} failed: {reason}", markup=False)
            if result.mode != REFERENCE_MODE and (summary.num_cold or 0) < summary.num_requests:
                warm = summary.num_requests - (summary.num_cold or 0)
                console.print(f"{result.mode}, {kind}: {warm} requests were not cold; use more adapters")
    write_json(json_file, {"benchmark": "modes", **comparison.to_json()})
    if figure is not None:
        save(draw_comparison(comparison), figure)
