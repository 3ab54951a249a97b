"""Verbs whose options are fields of dataclasses: a verb's own, annotated for typer, and settings."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from toppings.config import parse_bytes

Options = TypeVar("Options")

JsonFile = Annotated[Path | None, typer.Option("--json", help="write the results to this file")]
FigureFile = Annotated[Path | None, typer.Option(help="draw the results to this file (.png, .pdf, .svg)")]
FiguresDir = Annotated[Path | None, typer.Option(help="directory for figures (PDF and PNG)")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML settings of the servers (default: the demo)")]
PrintJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@dataclass(frozen=True)
class SettingsOf:
    """Annotates a mapping whose entries are options: the settings that `kind`, a dataclass, explains
    (`config.setting`), but for those `without`; some have a help or a default of this verb's own."""

    kind: type
    without: Collection[str] = ()
    helps: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> "list[_Setting]":
        hints = get_type_hints(self.kind)
        return [
            _Setting(f, hints[f.name], self.helps.get(f.name), self.defaults.get(f.name, f.default))
            for f in fields(self.kind)
            if "help" in f.metadata and f.name not in self.without
        ]


def verb(command: Callable[[Options], None]) -> Callable[..., None]:
    """`command(options)`, whose argument is annotated with a dataclass, as a Typer command."""
    [kind] = [hint for name, hint in get_type_hints(command).items() if name != "return"]
    hints = get_type_hints(kind, include_extras=True)
    nested = {
        name: mark.options()
        for name, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, SettingsOf)
    }

    def run(**values: Any) -> None:
        for name, settings in nested.items():
            given = {each: values.pop(each.option, each.default) for each in settings}
            values[name] = {each.name: each.parse(value) for each, value in given.items()}
        command(kind(**values))

    parameters = []
    for each in fields(kind):
        if each.name not in nested:
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            parameters.append(_parameter(each.name, default, hints[each.name]))
        else:
            parameters += [_parameter(s.option, s.default, s.annotation) for s in nested[each.name]]
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class _Setting:
    """A setting as an option: named without what its unit and `num_` say, lists and sizes as texts."""

    def __init__(self, setting: "Field[Any]", hint: Any, help_text: str | None, default: Any) -> None:
        self.name = setting.name
        self.option = setting.name.removeprefix("num_").removesuffix("_s")
        self._items = get_args(hint)[0] if get_origin(hint) is tuple else None
        self.default = self._text(default)
        choices = setting.metadata["choices"]
        text = help_text or setting.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        flags = [f"--{self.option.replace('_', '-')}"] if hint is bool else []
        is_text = self._items is not None or self.name.endswith("_bytes")
        self.annotation = Annotated[str if is_text else hint, typer.Option(*flags, help=text)]

    def _text(self, default: Any) -> Any:
        if self._items is not None:
            return ",".join(f"{each:g}" if self._items is float else str(each) for each in default)
        if self.name.endswith("_bytes"):
            return f"{default >> 30}GiB" if default and default % 2**30 == 0 else str(default)
        return default

    def parse(self, value: Any) -> Any:
        """Raises ValueError for a text that is none of its numbers or sizes."""
        if self._items is not None:
            return parse_list(value, self._items, self.name)
        return parse_bytes(value) if self.name.endswith("_bytes") else value


def parse_list(text: str, kind: Callable[[str], Any], name: str) -> tuple[Any, ...]:
    """What stands between commas. Raises ValueError where something is none of its kind."""
    try:
        return tuple(kind(each) for each in text.split(","))
    except ValueError:
        raise ValueError(f"{name} are {text!r}; write numbers with commas between, e.g. 8,16") from None


def parse_names(text: str) -> tuple[str, ...]:
    """Of a list with commas between; empty ones are left out."""
    return tuple(name for name in text.split(",") if name)


def parse_ranks(text: str) -> tuple[int, ...]:
    return parse_list(text, int, "ranks")
