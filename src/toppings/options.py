"""Command-line options made from the settings' dataclasses, so that defaults and help stand in one place."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from toppings.config import EngineConfig, ServerConfig

ApiKey = Annotated[str, typer.Option(help="the server's key (better: api-key-file, or TOPPINGS_API_KEY)")]
ApiKeyFile = Annotated[str, typer.Option(help="file that holds the server's key")]


def with_settings(
    command: Callable[..., None], *more: Any, base: tuple[Any, ...] = (EngineConfig, ServerConfig)
) -> Callable[..., None]:
    """`command(**settings)` as a Typer command with one option per setting, beside its own parameters.

    Settings are those of the dataclasses `base` and `more`, but for what the command itself has a parameter
    for. Options that were not given are not passed, so that they do not override a configuration file.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {p.name for p in kept}
    settings = [_parameter(f) for part in (*base, *more) for f in fields(part) if f.name not in taken]
    names = {p.name for p in settings}

    def run(**values: Any) -> None:
        command(**{n: v for n, v in values.items() if n not in names or v not in (None, [])})

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature([*kept, *settings])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*kept, *settings)}
    return run


def _parameter(setting: "Field[Any]") -> inspect.Parameter:
    """Texts all: `Config.from_settings` reads them and names what is wrong."""
    choices = f": {', '.join(setting.metadata['choices'])}" if setting.metadata["choices"] else ""
    option = typer.Option(
        f"--{setting.name.replace('_', '-')}",
        help=f"{setting.metadata['help']}{choices}{_default(setting)}",
        metavar=_metavar(setting),
    )
    kind = list[str] if isinstance(setting.default, tuple) else str
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(setting: "Field[Any]") -> str:
    if setting.default in ("", ()) or (setting.default == 0 and "0:" in setting.metadata["help"]):
        return ""
    default: Any = setting.default
    if isinstance(default, tuple):
        default = ", ".join(default)
    is_size = setting.name.endswith("_bytes")
    return f" (default: {default // 2**20}MiB)" if is_size else f" (default: {default})"


def _metavar(setting: "Field[Any]") -> str:
    if setting.name.endswith("_bytes"):
        return "SIZE"
    if isinstance(setting.default, tuple):
        return setting.name.split("_")[-1].removesuffix("s").upper()
    return {int: "N", float: "X", str: "TEXT"}[type(setting.default)]
