"""The verbs that serve and administer: a few lines each; what needs torch is imported where it is used."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from toppings import __version__
from toppings.access import read_api_key
from toppings.cluster.ray_serve.network import bind_ray, listeners
from toppings.cluster.ray_serve.settings import FleetConfig, UpConfig
from toppings.cluster.router.settings import RouterConfig
from toppings.command import lazy_group
from toppings.config import Config, ConfigError, EngineConfig
from toppings.core import MODULES, parse_targets
from toppings.options import ApiKey, ApiKeyFile, with_settings
from toppings.remote import RemoteServer
from toppings.sources.models import find_model
from toppings.synth import DTYPES, FAMILIES, PRESETS, AdapterShape, ModelShape, write_adapters, write_model

if TYPE_CHECKING:
    from toppings.adapters.registry import AdapterRecord, AdapterRegistry

BATCHES = {
    "batches": (
        "toppings.lab.batches.cli",
        "Time steps of many batches and fit what they cost; a server with the same settings tells routers.",
    )
}
app = typer.Typer(no_args_is_help=True)
adapters_app = typer.Typer(no_args_is_help=True, help="The adapters of a model, or of a running server.")
synth_app = typer.Typer(no_args_is_help=True, help="Random-weight checkpoints, for benchmarks.")
app.add_typer(adapters_app, name="adapters")
app.add_typer(synth_app, name="synth")
profile_app = typer.Typer(
    cls=lazy_group(BATCHES), no_args_is_help=True, help="Measure what decisions rest on."
)
app.add_typer(profile_app, name="profile")

Model = Annotated[str, typer.Option(help="base model, as `toppings serve` takes it")]
StateDir = Annotated[str, typer.Option(help="where the registry is (default: the model's below ~/.cache)")]
Dtype = Annotated[str, typer.Option(help="arithmetic of the adapters (auto: the checkpoint's)")]
Url = Annotated[str, typer.Option(help="a running server, instead of the registry on this machine")]


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
    """Serve a base model and its adapters over HTTP (without --model: the built-in one)."""
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
    """Serve a base model from many engines with Ray Serve (without --model: the built-in one)."""
    resolved = UpConfig.from_settings(settings, UpConfig.from_yaml(config) if config else None)
    if not resolved.fleet.ray_address:
        bind_ray(resolved.fleet.ray_host)
    try:
        from toppings.cluster.ray_serve.up import UpError, run_up
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("ray"):
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


@app.command(name="plan")
@with_settings
def plan(
    rank: Annotated[int, typer.Option(help="the adapter's rank")],
    tokens: Annotated[int, typer.Option(help="tokens of the cold prefill")],
    targets: Annotated[str, typer.Option(help="projections, or all")] = "q_proj,k_proj,v_proj",
    config: Annotated[Path | None, typer.Option(help="YAML settings; options override them")] = None,
    **settings: Any,
) -> None:
    """Show what `auto` would do with a cold adapter, and the times it predicts for each mode."""
    from toppings.cold_start import print_plan

    resolved = Config.from_settings(settings, Config.from_yaml(config) if config else None)
    print_plan(resolved.engine, rank=rank, targets=targets, num_tokens=tokens)


@adapters_app.command("list")
def list_adapters(
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Show all adapters with rank, targets and size; of a running server also where they are."""
    rows = (
        RemoteServer(url, read_api_key(api_key, api_key_file)).adapters()
        if url
        else _local_rows(model, state_dir, dtype)
    )
    table = Table("name", "id", "rank", "targets", "bytes", "pinned", *(("state", "hits") if url else ()))
    for row in rows:
        places = (row["state"], str(row["hits"])) if url else ()
        targets = ",".join(name.removesuffix("_proj") for name in row["targets"])
        numbers = [str(row[key]) for key in ("id", "rank")]
        pinned = "yes" if row["is_pinned"] else ""
        table.add_row(row["name"], *numbers, targets, f"{row['bytes']:,}", pinned, *places)
    Console().print(table)


@adapters_app.command("add")
def add_adapter(
    name: str,
    path: Path,
    *,
    replace: Annotated[bool, typer.Option("--replace", help="load a registered name anew")] = False,
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Register the PEFT checkpoint in PATH under NAME."""
    if url:
        typer.echo(
            RemoteServer(url, read_api_key(api_key, api_key_file)).load(
                name, str(path.absolute()), in_place=replace
            )
        )
        return
    from toppings.adapters.registry import Origin

    with _held_registry(model, state_dir, dtype) as registry:
        record = registry.register(name, path.absolute(), replace=replace, origin=Origin.CLI)
        doubt = registry.doubt_of(record)
    _tell_registered(record, doubt)


@adapters_app.command("pull")
def pull_adapter(
    name: str,
    place: str,
    *,
    replace: Annotated[bool, typer.Option("--replace", help="load a registered name anew")] = False,
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Fetch the adapter at PLACE (hub:org/name[@revision], s3://..., https://...) and register it as NAME."""
    if url:
        typer.echo(RemoteServer(url, read_api_key(api_key, api_key_file)).load(name, place, in_place=replace))
        return
    from toppings.adapters.registry import Origin
    from toppings.config import ServerConfig
    from toppings.sources.adapters import any_place, find_reference
    from toppings.sources.fetch import Room

    found = find_reference([any_place(place)], place)
    if found is None:
        raise ConfigError(f"{place!r} is no place of an adapter; write hub:org/name, s3://..., https://...")
    limits = ServerConfig()
    with _held_registry(model, state_dir, dtype) as registry, TemporaryDirectory() as work:
        path = found.bring(Path(work) / "adapter", Room(limits.source_max_bytes, limits.source_timeout_s))
        record = registry.register(name, path, replace=replace, origin=Origin.CLI, source=found.where)
        doubt = registry.doubt_of(record)
    _tell_registered(record, doubt, f", from {found.where}")


def _tell_registered(record: "AdapterRecord", doubt: str | None, whence: str = "") -> None:
    typer.echo(f"registered {record.name}: rank {record.rank}, {record.num_bytes} bytes{whence}")
    if doubt is not None:
        typer.echo(f"warning: {doubt}", err=True)


@adapters_app.command("remove")
def remove_adapter(
    name: str,
    *,
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Forget the adapter NAME; a running server (--url) finishes its requests first."""
    if url:
        typer.echo(RemoteServer(url, read_api_key(api_key, api_key_file)).unload(name))
        return
    with _held_registry(model, state_dir, dtype) as registry:
        registry.purge(registry.remove(name).adapter_id)
    typer.echo(f"removed {name}")


@adapters_app.command("check")
def check_adapter(path: Path, model: Model = "") -> None:
    """Say whether the PEFT checkpoint in PATH fits the model, or why not; registers nothing."""
    from toppings.adapters.checkpoint import read_checkpoint
    from toppings.adapters.layout import BaseShapes
    from toppings.adapters.text_files import base_tokens
    from toppings.engine.base import base_weights, model_path
    from toppings.model.config import ModelConfig

    engine_config = EngineConfig(model=model)
    directory = model_path(engine_config)
    model_config = ModelConfig.from_checkpoint(directory)
    shapes = BaseShapes(*model_config.base_shapes())
    weights = base_weights(engine_config, model_config)
    checkpoint = read_checkpoint(path, shapes, base_tokens(directory), base=weights)
    ranks = checkpoint.ranks()
    by_target = {name: max(layer[index] for layer in ranks) for index, name in enumerate(MODULES)}
    by_target |= checkpoint.outer_ranks()
    targets = [name for name, rank in by_target.items() if rank]
    typer.echo(f"{path} fits: rank {max(by_target.values())}, targets {', '.join(targets)}")


@adapters_app.command("convert")
def convert_adapter(source: Path, target: Path) -> None:
    """Write the adapter in SOURCE, whose weights are a pickle, to the new directory TARGET as safetensors."""
    from toppings.adapters.pickled import convert_pickled

    convert_pickled(source, target)
    typer.echo(f"wrote {target}")


@synth_app.command("model")
def synth_model(
    path: Path,
    *,
    preset: Annotated[str, typer.Option(help=f"a shape to begin with: {', '.join(PRESETS)}")] = "tiny",
    family: Annotated[str | None, typer.Option(help=f"one of {', '.join(FAMILIES)}")] = None,
    hidden: Annotated[int | None, typer.Option(help="hidden size")] = None,
    layers: Annotated[int | None, typer.Option(help="decoder layers")] = None,
    heads: Annotated[int | None, typer.Option(help="attention heads")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="key-value heads")] = None,
    intermediate: Annotated[int | None, typer.Option(help="size inside the MLP")] = None,
    vocab: Annotated[int | None, typer.Option(help="tokens in the vocabulary")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"one of {', '.join(DTYPES)}")] = None,
    max_len: Annotated[int | None, typer.Option(help="positions")] = None,
    seed: int = 0,
) -> None:
    """Write a model of random weights, with a byte-level tokeniser, to the new directory PATH."""
    options = dict(locals())
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    given = {f.name: value for f in fields(ModelShape) if (value := options[f.name]) is not None}
    write_model(path, replace(PRESETS[preset], **given), seed=seed)
    typer.echo(f"wrote {path}")


@synth_app.command("adapters")
def synth_adapters(
    path: Path,
    *,
    model: Annotated[str, typer.Option(help="the model they are for")],
    count: Annotated[int, typer.Option(min=1, help="how many")] = 8,
    ranks: Annotated[str, typer.Option(help="ranks, taken in turn")] = "8,16,32,64",
    targets: Annotated[str, typer.Option(help="projections, or all")] = "q_proj,k_proj,v_proj",
    dtype: Annotated[str, typer.Option(help=f"one of {', '.join(DTYPES)}")] = "bfloat16",
    seed: int = 0,
) -> None:
    """Write PEFT adapters of random weights to the new directory PATH, one sub-directory each."""
    try:
        numbers = tuple(int(rank) for rank in ranks.split(","))
    except ValueError as error:
        raise ConfigError(f"ranks are {ranks!r}; write numbers with commas between, e.g. 8,16") from error
    shape = AdapterShape(ranks=numbers, targets=parse_targets(targets), dtype=dtype)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("adapters", total=count)
        write_adapters(
            path,
            find_model(model).path,
            shape,
            count=count,
            seed=seed,
            on_written=lambda n: progress.advance(task, n),
        )
    typer.echo(f"wrote {count} adapters to {path}")


def _registry(model: str, state_dir: str, dtype: str) -> "AdapterRegistry":
    from toppings.engine.base import open_registry

    return open_registry(EngineConfig(model=model, state_dir=state_dir, dtype=dtype))


@contextmanager
def _held_registry(model: str, state_dir: str, dtype: str) -> Iterator["AdapterRegistry"]:
    """To change it: while a server runs, that is the server's to do."""
    from toppings.adapters.errors import StateHeldError
    from toppings.engine.base import hold_state, open_registry

    config = EngineConfig(model=model, state_dir=state_dir, dtype=dtype)
    try:
        lock = hold_state(config, "toppings adapters")
    except StateHeldError as error:
        raise ConfigError(f"{str(error).partition(';')[0]}; tell it by --url what to change") from error
    registry = open_registry(config, lock)
    try:
        yield registry
    finally:
        registry.close()


def _local_rows(model: str, state_dir: str, dtype: str) -> list[dict[str, Any]]:
    records = _registry(model, state_dir, dtype).list()
    return [{**asdict(record), "id": record.adapter_id, "bytes": record.num_bytes} for record in records]
