"""The verbs that serve: a few lines each; what needs torch is imported where it is used."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from toppings import __version__
from toppings.cluster.ray_serve.settings import FleetConfig, UpConfig
from toppings.cluster.router.settings import RouterConfig
from toppings.config import Config, ConfigError
from toppings.options import with_settings

app = typer.Typer(no_args_is_help=True)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"toppings {__version__}")


@app.command(name="serve")
@with_settings
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Serve a base model and its adapters over HTTP."""
    base = Config.from_yaml(config) if config else None
    resolved = Config.from_settings(settings, base)
    from toppings.engine.spawn import Spawner

    with closing(Spawner(stays=resolved.server.max_engine_restarts > 0)) as spawner:
        spawner.prepare()  # before this process imports what it needs itself
        from toppings.engine.client import EngineStartError
        from toppings.server.lifecycle import run_server

        try:
            raise typer.Exit(run_server(resolved, spawner))
        except EngineStartError as error:
            raise ConfigError(f"the engine could not start: {error}") from error


def route(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    instances: Annotated[str, typer.Option(help="URLs of servers, with commas between")] = "",
    **settings: Any,
) -> None:
    """Place requests on many servers of one base model: a streaming reverse proxy."""
    from toppings.cluster.router.app import run_router

    if instances:
        settings["instances"] = instances.split(",")
    base = RouterConfig.from_yaml(config) if config else None
    run_router(RouterConfig.from_settings(settings, base).with_keys())


app.command(name="route")(with_settings(route, base=(RouterConfig,)))


def up(
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Serve a base model from many engines with Ray Serve."""
    resolved = UpConfig.from_settings(settings, UpConfig.from_yaml(config) if config else None)
    try:
        from toppings.cluster.ray_serve.network import bind_ray, listeners

        if not resolved.fleet.ray_address:
            bind_ray(resolved.fleet.ray_host)  # before Ray is imported
        from toppings.cluster.ray_serve.up import UpError, run_up
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "psutil"):
            raise
        raise ConfigError("`toppings up` needs Ray; install it with: pip install 'toppings[ray]'") from error
    number, prefix = resolved.fleet.replicas, resolved.fleet.route_prefix

    def tell(url: str) -> None:
        place = url or f"{prefix} of the address that Serve has in this cluster"
        open_ones = [str(each) for each in listeners() if each.is_open]
        reach = f"open to other machines: {', '.join(open_ones)}" if open_ones else "all on the loopback"
        typer.echo(f"Listening, {reach}")
        typer.echo(f"Toppings running on {place} with {number} engines (Press CTRL+C to quit)")

    try:
        run_up(resolved, on_ready=tell)
    except UpError as error:
        raise ConfigError(str(error)) from error


app.command(name="up")(with_settings(up, FleetConfig))
