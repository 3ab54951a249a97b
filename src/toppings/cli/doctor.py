"""The verb `doctor`: what a server with these settings could do here, and what to change."""

from pathlib import Path
from typing import Annotated, Any

import typer

from toppings.config import Config
from toppings.options import with_settings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _verbs() -> None:
    """A group even with one verb."""


@app.command("doctor")
@with_settings
def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Tell what this machine, these settings and their state directory can do, and what to change."""
    from toppings.doctor import machine, setup
    from toppings.doctor.finding import Level

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    findings = [*machine.look(resolved), *setup.look(resolved)]
    width = max(len(each.topic) for each in findings)
    for each in findings:
        typer.echo(f"{each.level.value:5}  {each.topic:{width}}  {each.text}")
        if each.advice:
            typer.echo(f"{'':5}  {'':{width}}  -> {each.advice}")
    num_wrong = sum(each.level is Level.WRONG for each in findings)
    typer.echo(f"{num_wrong} things are wrong" if num_wrong else "a server with these settings can start")
    raise typer.Exit(min(1, num_wrong))
