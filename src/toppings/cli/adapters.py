"""The verbs that administer adapters: the registry's on this machine, or a running server's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from toppings.access import read_api_key
from toppings.adapters.merges import CAT, METHODS, Merge, MergePart
from toppings.config import ConfigError, EngineConfig
from toppings.core import MODULES
from toppings.options import ApiKey, ApiKeyFile
from toppings.remote import RemoteServer

if TYPE_CHECKING:
    from toppings.adapters.registry import AdapterRecord, AdapterRegistry

PIPED_WIDTH = 10_000
"""Columns of a table that no terminal shows: an adapter stays on one line, whole."""

app = typer.Typer(no_args_is_help=True)
adapters_app = typer.Typer(no_args_is_help=True, help="The adapters of a model, or of a running server.")
app.add_typer(adapters_app, name="adapters")

Model = Annotated[str, typer.Option(help="base model, as `toppings serve` takes it")]
StateDir = Annotated[str, typer.Option(help="where the registry is (default: the model's below ~/.cache)")]
Dtype = Annotated[str, typer.Option(help="arithmetic of the adapters (auto: the checkpoint's)")]
Url = Annotated[str, typer.Option(help="a running server, instead of the registry on this machine")]


@adapters_app.command("list")
def list_adapters(
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Show all adapters with rank, targets, size and origin; of a running server also where they are."""
    rows = (
        RemoteServer(url, read_api_key(api_key, api_key_file)).adapters()
        if url
        else _local_rows(model, state_dir, dtype)
    )
    if not rows:
        typer.echo("none is registered; a server registers those of --adapters when it starts")
        return
    places = ("state", "hits") if url else ()
    whence = Column("from", overflow="fold")
    table = Table("name", "id", "rank", "targets", "bytes", "pinned", *places, whence)
    for row in rows:
        values = (row["state"], str(row.get("hits", ""))) if url else ()
        targets = ",".join(name.removesuffix("_proj") for name in row["targets"])
        numbers = [str(row[key]) for key in ("id", "rank")]
        pinned = "yes" if row["is_pinned"] else ""
        table.add_row(
            escape(row["name"]), *numbers, targets, f"{row['bytes']:,}", pinned, *values, escape(row["path"])
        )
    console = Console(emoji=False)  # a path may have a word between colons
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)


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
    from toppings.sources.adapters import any_place, clear_fetches, fetch_place, find_reference
    from toppings.sources.fetch import Room

    found = find_reference([any_place(place)], place)
    if found is None:
        raise ConfigError(f"{place!r} is no place of an adapter; write hub:org/name, s3://..., https://...")
    limits = ServerConfig()
    with _held_registry(model, state_dir, dtype) as registry:
        clear_fetches(registry.state_dir)
        with fetch_place(registry.state_dir) as part:
            path = found.bring(part, Room(limits.source_max_bytes, limits.source_timeout_s))
            record = registry.register(name, path, replace=replace, origin=Origin.CLI, source=found.where)
        doubt = registry.doubt_of(record)
    _tell_registered(record, doubt, f", from {found.where}")


@adapters_app.command("merge")
def merge_adapters(
    name: str,
    parts: Annotated[list[str], typer.Argument(help="adapters with their weights, as a=0.7 b=0.3")],
    *,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}")] = CAT,
    density: Annotated[float | None, typer.Option(help="share of values that pruning leaves")] = None,
    majority_sign_method: Annotated[str | None, typer.Option(help="of ties: total or frequency")] = None,
    seed: Annotated[int | None, typer.Option(help="of what is pruned at random")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="load a registered name anew")] = False,
    model: Model = "",
    state_dir: StateDir = "",
    dtype: Dtype = "auto",
    url: Url = "",
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Register the weighted sum of adapters as NAME."""
    merge = Merge(tuple(map(_weighted, parts)), method, density, majority_sign_method, seed)
    if url:
        options = {"density": density, "majority_sign_method": majority_sign_method, "seed": seed}
        named = [{"name": part.name, "weight": part.weight} for part in merge.parts]
        server = RemoteServer(url, read_api_key(api_key, api_key_file))
        typer.echo(server.merge(name, {"adapters": named, "method": method, **options}, in_place=replace))
        return
    from toppings.adapters.registry import Origin

    with _held_registry(model, state_dir, dtype) as registry:
        record = registry.merge(name, merge, replace=replace, origin=Origin.CLI)
        doubt = registry.doubt_of(record)
    _tell_registered(record, doubt, f", {record.path}")


def _weighted(text: str) -> MergePart:
    name, sign, weight = text.rpartition("=")
    try:
        return MergePart(name, float(weight)) if sign else MergePart(text, 1.0)
    except ValueError:
        raise ConfigError(f"{text!r} is no adapter with its weight; write e.g. {name}=0.5") from None


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
    from toppings.engine.base import base_weights, model_path
    from toppings.model.config import ModelConfig

    engine_config = EngineConfig(model=model)
    directory = model_path(engine_config)
    model_config = ModelConfig.from_checkpoint(directory)
    shapes = BaseShapes(*model_config.base_shapes(), model_config.is_fused, model_config.mixture)
    weights = base_weights(engine_config, model_config)
    checkpoint = read_checkpoint(path, shapes, base=weights)
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
