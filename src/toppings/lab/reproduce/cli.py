"""`toppings reproduce VERB`: one verb per published figure or table, and `all`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from toppings.config import MODES, Config
from toppings.lab.batches.steps import BatchSpec
from toppings.lab.modes.comparison import DEFAULT_LOAD_RATIO, ModesSpec
from toppings.lab.modes.report import read_report
from toppings.lab.options import ConfigFile, SettingsOf, parse_names, verb
from toppings.lab.progress import progress_bar
from toppings.lab.reproduce import published
from toppings.lab.reproduce.fleet_runs import FleetSpec, RunRecord, run_fleet
from toppings.lab.reproduce.popularity import write_popularity
from toppings.lab.reproduce.simulation import write_simulation, write_testbed
from toppings.lab.results import this_command
from toppings.lab.workload import LoadShape
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import load_trace

QUICK_REQUESTS, QUICK_MODES = 4, "cached,on_demand,cpu_assisted"
TESTBED = {
    "num_instances": published.TESTBED_INSTANCES,
    "rates": published.TESTBED_RATES,
    "num_adapters": published.TESTBED_ADAPTERS,
}
SIMULATION_HELPS = {
    "rates": "requests/s; bars and CDF are of the first, more of them make a curve",
    "num_adapters": "how many, where no trace says so",
}
QUICK_PROFILE_S, QUICK_FLEET_S = 2.0, 8.0

PerfModelFile = Annotated[
    str, typer.Option(help="JSON file of `toppings profile batches`, instead of the published machine's")
]
Processes = Annotated[int, typer.Option(min=1, help="simulations at a time")]

app = typer.Typer()
reproduce_app = typer.Typer(
    no_args_is_help=True,
    help="The published evaluation again: figures, their data, and the published values.",
)
app.add_typer(reproduce_app, name="reproduce")


@dataclass(frozen=True, kw_only=True)
class OutOptions:
    out: Annotated[Path, typer.Option(help="directory for PDF, PNG, JSON and comparison.md")] = Path(
        "reproduction"
    )

    def logs_dir(self) -> Path:
        """The step logs that `modes` leaves."""
        return self.out / "logs"


@dataclass(frozen=True, kw_only=True)
class QuickOptions(OutOptions):
    quick: Annotated[bool, typer.Option("--quick", help="small and short: does it work here?")] = False


# --- generated, or measured here ---


@dataclass(frozen=True, kw_only=True)
class PopularityOptions(OutOptions):
    trace: Annotated[list[Path] | None, typer.Option(help="trace files to draw as well")] = None


@verb
def popularity(options: PopularityOptions) -> None:
    """Fig. 12, left: how requests spread over adapters."""
    write_popularity([load_trace(path, TraceOptions()) for path in options.trace or []], options.out)


@verb
def ipc(options: QuickOptions) -> None:
    """Fig. 12, right: rows handed to several processes, shared memory against sockets."""
    from toppings.lab.cpu.ipc import run
    from toppings.lab.reproduce.cpu import write_ipc

    measured = run([2], [1], 3, num_repeats=1) if options.quick else run([64, 256], [1, 3, 5], 200)
    write_ipc(*measured, options.out)


@verb
def cpu(options: QuickOptions) -> None:
    """Fig. 17: LoRA on CPU cores, one process a core against torch's own threads."""
    from toppings.lab.cpu.lora import measure
    from toppings.lab.reproduce.cpu import write_cpu

    write_cpu(measure(is_toy=options.quick), options.out)


@dataclass(frozen=True, kw_only=True)
class ServersOptions(QuickOptions):
    config: ConfigFile = None
    requests: Annotated[int, typer.Option(help="one after another, and again as many at random")] = 60

    def spec(self) -> ModesSpec:
        base = Config.from_yaml(self.config) if self.config else Config()
        requests = QUICK_REQUESTS if self.quick else self.requests
        has_link = bool(base.engine.link_gbps) or base.engine.device != "cpu"
        return ModesSpec(
            base=Config.from_settings({"log_dir": str(self.logs_dir())}, base),
            modes=parse_names(QUICK_MODES) if self.quick else MODES,
            load=LoadShape(num_requests=requests),
            num_adapters=max(QUICK_REQUESTS, requests),
            load_ratio=0.0 if has_link else DEFAULT_LOAD_RATIO,
        )


@verb
def modes(options: ServersOptions) -> None:
    """Fig. 13 and 14: latencies of cold requests by loading mode, on servers started here."""
    from toppings.lab.modes.compare import compare_with_progress
    from toppings.lab.reproduce.modes import write_modes

    write_modes(compare_with_progress(options.spec(), None), options.out)


@dataclass(frozen=True, kw_only=True)
class StepsOptions(OutOptions):
    logs: Annotated[
        Path | None,
        typer.Option(help="directory with <mode>/steps.jsonl (default: what `modes` left in OUT)"),
    ] = None


@verb
def steps(options: StepsOptions) -> None:
    """Fig. 15: mean prefill, decode and load times of each mode, from step logs."""
    from toppings.lab.reproduce.modes import write_steps

    write_steps(read_report(options.logs or options.logs_dir()), options.out)


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(QuickOptions):
    config: ConfigFile = None
    seconds: Annotated[float, typer.Option(help="time to measure")] = BatchSpec.seconds


@verb
def models(options: ModelsOptions) -> None:
    """Fig. 11: performance models fitted to steps of this machine, as `toppings profile batches` does."""
    from toppings.lab.batches.profile import profile_batches
    from toppings.lab.reproduce.models import write_models

    engine = (Config.from_yaml(options.config) if options.config else Config()).engine
    spec = BatchSpec(seconds=QUICK_PROFILE_S if options.quick else options.seconds)
    with progress_bar() as bar:
        profile, _ = profile_batches(engine, spec, command=this_command(), on_progress=bar.reach)
    write_models(profile, options.out)


# --- simulated ---


@dataclass(frozen=True, kw_only=True)
class FleetOptions(QuickOptions):
    perf_model: PerfModelFile = FleetSpec.perf_model
    prefill_interrupts: Annotated[
        bool | None,
        typer.Option(
            "--prefill-interrupts/--prefill-shares",
            help="a prefill is a step of its own, or shares one with decodes (default: the first for the "
            "published model only)",
        ),
    ] = None
    processes: Processes = 1
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the runs that an earlier call left in OUT")
    ] = False

    def spec(self, settings: dict[str, Any], **quick: Any) -> FleetSpec:
        """`quick`: what is otherwise where it has to be quick."""
        given = {"perf_model": self.perf_model, "prefill_interrupts": self.prefill_interrupts, **settings}
        return FleetSpec(**{**given, **(quick if self.quick else {})})

    def run(self, spec: FleetSpec, name: str) -> list[RunRecord]:
        """All runs, which are kept in `name`-runs.jsonl."""
        kept = self.out / f"{name}-runs.jsonl"
        if not self.resume:
            kept.unlink(missing_ok=True)
        with progress_bar() as bar:
            return run_fleet(
                spec,
                num_processes=self.processes,
                kept=kept,
                on_progress=lambda share: bar.reach("simulations", share),
            )


@dataclass(frozen=True, kw_only=True)
class SimulationOptions(FleetOptions):
    settings: Annotated[dict[str, Any], SettingsOf(FleetSpec, helps=SIMULATION_HELPS)]
    trace: Annotated[
        str, typer.Option(help="take arrivals and adapters from this file, scaled to the rates")
    ] = ""


@verb
def simulation(options: SimulationOptions) -> None:
    """Fig. 19: SLO attainment and TPT of 60 simulated servers, a figure per kernel form."""
    settings = options.settings
    rates = tuple(float(f"{rate * 4 / 60:g}") for rate in settings["rates"])
    quick = {"num_instances": 4, "duration_s": QUICK_FLEET_S, "seeds": 2, "num_adapters": 500, "rates": rates}
    spec = replace(options.spec(settings, **quick), trace=options.trace)
    write_simulation(spec, options.run(spec, "simulation"), options.out)


@dataclass(frozen=True, kw_only=True)
class TestbedOptions(FleetOptions):
    settings: Annotated[dict[str, Any], SettingsOf(FleetSpec, defaults=TESTBED)]


@verb
def testbed(options: TestbedOptions) -> None:
    """Fig. 18: SLO attainment of 8 servers, simulated, by load."""
    quick = {"num_instances": 3, "duration_s": QUICK_FLEET_S, "seeds": 1, "rates": (15.0,)}
    spec = options.spec(options.settings, **quick)
    write_testbed(spec, options.run(spec, "testbed"), options.out)


# --- all of them ---

VERBS: dict[str, Callable[..., None]] = {
    "modes": modes,
    "steps": steps,
    "popularity": popularity,
    "ipc": ipc,
    "cpu": cpu,
    "models": models,
    "testbed": testbed,
    "simulation": simulation,
}
for name, each in VERBS.items():
    reproduce_app.command(name)(each)


@dataclass(frozen=True, kw_only=True)
class AllOptions(QuickOptions):
    config: ConfigFile = None
    perf_model: PerfModelFile = FleetSpec.perf_model
    processes: Processes = 1


@reproduce_app.command("all")
@verb
def reproduce_all(options: AllOptions) -> None:
    """Every verb in turn, what is measured first: leave the machine alone meanwhile."""
    here = {"out": options.out, "quick": options.quick}
    fleet = {"perf_model": options.perf_model, "processes": options.processes}
    ipc(**here)
    cpu(**here)
    modes(**here, config=options.config)
    steps(out=options.out)
    models(**here, config=options.config)
    popularity(out=options.out)
    testbed(**here, **fleet)
    simulation(**here, **fleet)
