"""`toppings reproduce popularity, ipc, cpu, modes, steps, models`: what is generated, or measured here."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from toppings.bench.batch_steps import BatchSpec
from toppings.bench.cli import DEFAULT_LOAD_RATIO, compare_with_progress
from toppings.bench.comparison import ModesSpec
from toppings.bench.load import LoadShape
from toppings.bench.report import read_report
from toppings.config import MODES, Config
from toppings.reproduce.options import DEFAULT_OUT, Out, Quick
from toppings.reproduce.popularity import write_popularity
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import load_trace

QUICK_REQUESTS, QUICK_MODES = 4, "cached,on_demand,cpu_assisted"
QUICK_PROFILE_S = 2.0

ConfigFile = Annotated[Path | None, typer.Option(help="YAML settings of the server (default: the demo)")]


def popularity(
    out: Out = DEFAULT_OUT,
    trace: Annotated[list[Path] | None, typer.Option(help="trace files to draw as well")] = None,
) -> None:
    """Fig. 12, left: how requests spread over adapters."""
    write_popularity([load_trace(path, TraceOptions()) for path in trace or []], out)


def ipc(out: Out = DEFAULT_OUT, quick: Quick = False) -> None:
    """Fig. 12, right: rows handed to several processes, shared memory against sockets."""
    from toppings.bench import ipc as bench
    from toppings.reproduce.cpu import write_ipc

    measured = bench.run([2], [1], 3, num_repeats=1) if quick else bench.run([64, 256], [1, 3, 5], 200)
    write_ipc(*measured, out)


def cpu(out: Out = DEFAULT_OUT, quick: Quick = False) -> None:
    """Fig. 17: LoRA on CPU cores, one process a core against torch's own threads."""
    from toppings.bench.cpu_lora import measure
    from toppings.reproduce.cpu import write_cpu

    write_cpu(measure(is_toy=quick), out)


def modes(
    out: Out = DEFAULT_OUT,
    config: ConfigFile = None,
    requests: Annotated[int, typer.Option(help="one after another, and again as many at random")] = 60,
    quick: Quick = False,
) -> None:
    """Fig. 13 and 14: latencies of cold requests by loading mode, on servers started here."""
    from toppings.reproduce.modes import write_modes

    base = Config.from_yaml(config) if config else Config()
    names = QUICK_MODES if quick else ",".join(MODES)
    requests = QUICK_REQUESTS if quick else requests
    has_link = bool(base.engine.link_gbps) or base.engine.device != "cpu"
    spec = ModesSpec(
        base=Config.from_settings({"log_dir": str(logs_of(out))}, base),
        modes=tuple(names.split(",")),
        load=LoadShape(num_requests=requests),
        num_adapters=max(QUICK_REQUESTS, requests),
        load_ratio=0.0 if has_link else DEFAULT_LOAD_RATIO,
    )
    write_modes(compare_with_progress(spec, None), out)


def steps(
    out: Out = DEFAULT_OUT,
    logs: Annotated[
        Path | None,
        typer.Option(help="directory with <mode>/steps.jsonl (default: what `modes` left in OUT)"),
    ] = None,
) -> None:
    """Fig. 15: mean prefill, decode and load times of each mode, from step logs."""
    from toppings.reproduce.modes import write_steps

    write_steps(read_report(logs or logs_of(out)), out)


def logs_of(out: Path) -> Path:
    return out / "logs"


def models(
    out: Out = DEFAULT_OUT,
    config: ConfigFile = None,
    seconds: Annotated[float, typer.Option(help="time to measure")] = BatchSpec.seconds,
    quick: Quick = False,
) -> None:
    """Fig. 11: performance models fitted to steps of this machine, as `toppings profile batches` does."""
    from toppings.bench.batch_profile import profile_batches
    from toppings.reproduce.models import write_models

    engine = (Config.from_yaml(config) if config else Config()).engine
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        profile, _ = profile_batches(
            engine,
            BatchSpec(seconds=QUICK_PROFILE_S if quick else seconds),
            command=f"toppings {shlex.join(sys.argv[1:])}",
            on_progress=lambda what, share: progress.update(task, description=what, completed=share),
        )
    write_models(profile, out)
