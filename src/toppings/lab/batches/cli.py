"""`toppings profile batches`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toppings.config import Config
from toppings.core import parse_targets
from toppings.lab.batches.figures import draw_batch_profile
from toppings.lab.batches.steps import MAX_SECONDS, BatchSpec
from toppings.lab.batches.tables import perf_model_table
from toppings.lab.figures import save
from toppings.lab.options import FigureFile, JsonFile, parse_ranks
from toppings.lab.progress import progress_bar
from toppings.lab.results import check_files, this_command, write_json
from toppings.options import with_settings

app = typer.Typer()


@app.command("batches")
@with_settings
def batches(
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
    """Time steps of many batches and fit what they cost; a server with the same settings tells routers."""
    check_files(json_file, figure)
    spec = BatchSpec(seconds, parse_ranks(ranks), parse_targets(targets))
    engine = Config.from_settings(settings, Config.from_yaml(config) if config else None).engine
    from toppings.lab.batches.profile import profile_batches

    with progress_bar() as bar:
        profile, path = profile_batches(engine, spec, command=this_command(), on_progress=bar.reach)
    Console().print(perf_model_table(profile.model))
    Console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, profile.to_json())
    if figure is not None:
        save(draw_batch_profile(profile), figure)
