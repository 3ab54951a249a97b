"""The verbs that write checkpoints of random weights."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from toppings.config import ConfigError
from toppings.core import parse_targets
from toppings.model.families import modules_of
from toppings.model.files import read_json
from toppings.sources.models import find_model
from toppings.synth import DTYPES, FAMILIES, PRESETS, AdapterShape, ModelShape, write_adapters, write_model

app = typer.Typer(no_args_is_help=True)
synth_app = typer.Typer(no_args_is_help=True, help="Random-weight checkpoints, for benchmarks.")
app.add_typer(synth_app, name="synth")


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
        where = find_model(model).path
        write_adapters(
            path,
            where,
            shape,
            count=count,
            seed=seed,
            modules=modules_of(read_json(where / "config.json")),
            on_written=lambda n: progress.advance(task, n),
        )
    typer.echo(f"wrote {count} adapters to {path}")
