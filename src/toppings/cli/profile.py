"""The verbs that measure what decisions rest on, and show the decision."""

from pathlib import Path
from typing import Annotated, Any

import typer

from toppings.command import lazy_group
from toppings.config import Config
from toppings.options import with_settings

BATCHES = {
    "batches": (
        "toppings.lab.batches.cli",
        "Time steps of many batches and fit what they cost; a server with the same settings tells routers.",
    )
}
FLEETS = {
    "fleet": (
        "toppings.lab.capacity.cli",
        "Find how many servers keep the objectives for a load, how to run them, and what that costs.",
    )
}
app = typer.Typer(no_args_is_help=True)
profile_app = typer.Typer(
    cls=lazy_group(BATCHES), no_args_is_help=True, help="Measure what decisions rest on."
)
app.add_typer(profile_app, name="profile")
plan_app = typer.Typer(cls=lazy_group(FLEETS))
app.add_typer(plan_app, name="plan")


@profile_app.command("cold-start")
@with_settings
def profile_cold_start(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Measure link, CPU rates and layer times anew; a server with the same settings reads the result."""
    from toppings.cold_start import measure_profile

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    profile, path = measure_profile(resolved.engine)
    typer.echo(f"{profile.to_json()}\nwrote {path}")


@profile_app.command("products")
@with_settings
def profile_products(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Measure anew how this CPU multiplies the model's weights; a server with as many threads reads it."""
    from toppings.cold_start import measure_products

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    profile, outcome = measure_products(resolved.engine)
    typer.echo("\n".join([*profile.table(), outcome]))


@profile_app.command("quantization")
@with_settings
def profile_quantization(
    text: Annotated[Path, typer.Option(help="text file that the model was not trained on")],
    tokens: Annotated[int, typer.Option(help="tokens of it that are read at most", min=2)] = 2048,
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Show the base model's perplexity on a text with its weights as they are, in int8 and in int4."""
    from toppings.engine.perplexity import measure_quantization

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    found = measure_quantization(resolved.engine, text, tokens)
    for name, value in found.items():
        typer.echo(f"{name:>5} {value:10.3f} {value / found['none'] - 1:+8.2%}")


@plan_app.callback(invoke_without_command=True)
@with_settings
def plan(
    context: typer.Context,
    rank: Annotated[int | None, typer.Option(help="the adapter's rank (needed)")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens of the cold prefill (needed)")] = None,
    targets: Annotated[str, typer.Option(help="projections, or all")] = "q_proj,k_proj,v_proj",
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Show what `auto` would do with a cold adapter, and the times it predicts for each mode."""
    if context.invoked_subcommand is not None:
        if settings or config is not None or rank is not None or tokens is not None:
            raise ValueError(
                f"options of `toppings plan {context.invoked_subcommand}` stand behind that name"
            )
        return
    if rank is None or tokens is None:
        raise ValueError("give --rank and --tokens, of the adapter and of the cold prefill")
    from toppings.cold_start import print_plan

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    print_plan(resolved.engine, rank=rank, targets=targets, num_tokens=tokens)
