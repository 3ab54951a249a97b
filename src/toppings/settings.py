"""How frozen settings are declared, bounded, and read from YAML and the command line's texts."""

import json
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

OFF = "off"
SWITCH = ("on", OFF)

_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class ConfigError(ValueError):
    """A setting is unknown or out of range; the message names it and what would be right."""


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or a text such as "512MiB" or "2 GB".

    Raises ConfigError where the text is no size.
    """
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size; write a number of bytes or e.g. 512MiB, 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def setting(
    default: Any,
    help_text: str | None = None,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    read: Callable[[Any], Any] | None = None,
    is_secret: bool = False,
) -> Any:
    """A field of `Settings`: what the command line says of it (None: it is no option), and what it may be.

    `read` makes its value where its default's type does not say how. A secret is never shown.
    """
    rules = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most, "read": read}
    metadata = rules if help_text is None else {**rules, "help": help_text}
    return field(default=default, metadata=metadata, repr=not is_secret)


def _advice(name: str, known: Iterable[str]) -> str:
    """What may have been meant, else all that may be."""
    meant = get_close_matches(name, known, cutoff=0.75)
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    return f"; known: {', '.join(sorted(known))}"


class Settings:
    """Base of the frozen dataclasses of settings. A field that is one itself gives its settings to the one
    flat list of names that YAML and the command line know.
    """

    __dataclass_fields__: ClassVar[dict[str, "Field[Any]"]]

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting that is out of its bounds or none of its choices."""
        for f in fields(self):
            value, rules = getattr(self, f.name), f.metadata
            if (choices := rules.get("choices")) is not None and value not in choices:
                raise ConfigError(f"{f.name} is {value!r}; choose one of {', '.join(choices)}")
            bounds = {name: rules[name] for name in _HOLDS if rules.get(name) is not None}
            if not all(_HOLDS[name](value, bound) for name, bound in bounds.items()):
                told = ", ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise ConfigError(f"{f.name} is {value}; it must be {told}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any], base: Self | None = None) -> Self:
        """`base` (default: the defaults) with some settings replaced, by their flat names.

        Raises ConfigError for an unknown name or a value of the wrong type or range.
        """
        base = base or cls()
        known = base.to_settings()
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}{_advice(unknown[0], known)}")
        return base._with(settings)

    def _with(self, settings: dict[str, Any]) -> Self:
        values: dict[str, Any] = {}
        for f in fields(self):
            mine = getattr(self, f.name)
            if isinstance(mine, Settings):
                values[f.name] = mine._with(settings)
            elif f.name in settings:
                values[f.name] = coerce(f, settings[f.name])
        return replace(self, **values)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Settings of a YAML mapping over the defaults. Raises ConfigError as `from_settings`."""
        return cls.from_settings(read_yaml(path))

    def to_settings(self) -> dict[str, Any]:
        """The flat mapping that `from_settings` reads back."""
        flat: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Settings):
                flat |= value.to_settings()
            else:
                flat[f.name] = list(value) if isinstance(value, tuple) else value
        return flat

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_settings(), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of settings by name, with `-` read as `_`. Raises ConfigError where it is none."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(loaded).__name__}")
    return {str(k).replace("-", "_"): v for k, v in (loaded or {}).items()}


def coerce(f: "Field[Any]", value: Any) -> Any:
    """`value` as the type of the setting's default. Raises ConfigError where it is none."""
    default: Any = f.default
    try:
        if f.metadata["read"] is not None:
            return f.metadata["read"](value)
        if f.name.endswith("_bytes"):
            return parse_bytes(value)
        if f.metadata["choices"] == SWITCH and isinstance(value, bool):  # as YAML reads on and off
            return SWITCH[not value]
        if isinstance(default, tuple):
            return tuple(str(v) for v in _as_list(value))
        if isinstance(default, int) and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"setting {f.name} is {value!r}; it must be of type {type(default).__name__}"
        ) from error


def _as_list(value: Any) -> list[Any]:
    """One text is a list of one; one that is a JSON list, as vLLM's options are, is that list."""
    values = [value] if isinstance(value, str) else list(value)
    if len(values) == 1 and str(values[0]).startswith(("[]", '["')):
        parsed = json.loads(values[0])
        return parsed if isinstance(parsed, list) else values
    return values
