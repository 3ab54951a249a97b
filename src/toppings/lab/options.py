"""Verbs whose options are the fields of a dataclass; annotations say how typer reads them."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Options = TypeVar("Options")

JsonFile = Annotated[Path | None, typer.Option("--json", help="write the results to this file")]
FigureFile = Annotated[Path | None, typer.Option(help="draw the results to this file (.png, .pdf, .svg)")]
FiguresDir = Annotated[Path | None, typer.Option(help="directory for figures (PDF and PNG)")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML settings of the servers (default: the demo)")]
PrintJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def verb(command: Callable[[Options], None]) -> Callable[..., None]:
    """`command(options)`, whose argument is annotated with a dataclass, as a Typer command."""
    [kind] = [hint for name, hint in get_type_hints(command).items() if name != "return"]
    hints = get_type_hints(kind, include_extras=True)

    def run(**values: Any) -> None:
        command(kind(**values))

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def parse_names(text: str) -> tuple[str, ...]:
    """Of a list with commas between; empty ones are left out."""
    return tuple(name for name in text.split(",") if name)


def parse_ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        raise ValueError(f"ranks are {text!r}; write numbers with commas between, e.g. 8,16") from None
