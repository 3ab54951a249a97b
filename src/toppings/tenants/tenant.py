"""One tenant: its rights, its limits and its weight, as the tenants file and a front's header say them."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import translate
from functools import cached_property
from typing import Any

from toppings.settings import SWITCH, ConfigError, Settings, setting
from toppings.slo import INTERACTIVE, SLO_CLASSES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_PATTERN_CHARS = 4096
"""Of all patterns of a tenant together, as JSON: they travel in a header."""
LIMITS = frozenset({"requests_per_minute", "tokens_per_minute", "max_requests"})
"""Held by whoever takes a tenant's requests first; servers behind it are not told of them. `max_queue` they
are, whose queues it protects."""


@dataclass(frozen=True, kw_only=True)
class Tenant(Settings):
    """Patterns are those of `fnmatch`, of adapters' names; limits of 0 are none."""

    name: str = setting("", None)
    admin: str = setting("off", "may do everything that the one API key may", choices=SWITCH)
    base_model: str = setting("on", "may use the base model", choices=SWITCH)
    use: tuple[str, ...] = setting((), "adapters that it may use, beside its own")
    see: tuple[str, ...] = setting((), "adapters that it may see beyond those that it may use")
    load: tuple[str, ...] = setting((), "its own adapters: those that it may load and unload")
    load_from: tuple[str, ...] = setting((), "directories and places that it may load adapters from")
    adapter_bytes: int = setting(0, "bound of its own adapters together", at_least=0)
    requests_per_minute: int = setting(0, "requests a minute", at_least=0, at_most=10**9)
    tokens_per_minute: int = setting(0, "tokens a minute, of prompts and answers", at_least=0, at_most=10**12)
    max_requests: int = setting(0, "requests at once", at_least=0)
    max_queue: int = setting(
        0, "sequences that may wait for their first token (0: half of the server's places)", at_least=0
    )
    weight: float = setting(1.0, "its share where several tenants wait", above=0, at_most=1e6)
    min_priority: int = setting(0, "the least `priority` that its requests may ask for: the least goes first")
    slo_class: str = setting(
        INTERACTIVE, "batch: all its requests take what others leave", choices=SLO_CLASSES
    )
    share_prefixes: str = setting(
        "off", "share the cache of prompts' tokens with others that do so", choices=SWITCH
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name and not NAME.fullmatch(self.name):
            raise ConfigError(
                f"a tenant is named {self.name[:80]!r}; a name has 1 to 64 letters, digits or characters of"
                " . _ - and begins with a letter or digit"
            )
        num_chars = len(self.to_header())
        if num_chars > MAX_PATTERN_CHARS:
            raise ConfigError(
                f"tenant {self.name}: its patterns take {num_chars} characters; at most {MAX_PATTERN_CHARS}"
                " are kept: use fewer, wider ones"
            )

    @classmethod
    def parse(cls, name: str, settings: Any) -> "Tenant":
        """From the mapping of its settings, or None. Raises ConfigError, which names the tenant."""
        if not isinstance(settings, dict | None):
            raise ConfigError(f"tenant {name} is {settings!r}; it must be a mapping of its settings")
        given = {str(key).replace("-", "_"): value for key, value in (settings or {}).items()}
        try:
            if len(given) < len(settings or {}):
                names = set(settings or {})
                twice = next(key for key in given if {key, key.replace("_", "-")} <= names)
                raise ConfigError(f"{twice!r} stands there twice, once with hyphens")
            if "name" in given:
                raise ConfigError("unknown setting 'name'; the name stands before the colon")
            return cls.from_settings({"name": name, **given}, _NOBODY)
        except ConfigError as error:
            raise ConfigError(f"tenant {name}: {error}") from error

    # --- what it may do ---

    @property
    def is_admin(self) -> bool:
        return self.admin == "on"

    @property
    def has_own_cache(self) -> bool:
        """Whether its prompts share no blocks with those of others."""
        return bool(self.name) and self.share_prefixes == "off"

    def may_use(self, adapter: str | None) -> bool:
        """None is the base model."""
        if adapter is None:
            return self.is_admin or self.base_model == "on"
        return self.is_admin or self._usable.match(adapter) is not None

    def may_see(self, adapter: str | None) -> bool:
        if adapter is None:
            return self.may_use(None)
        return self.is_admin or self._visible.match(adapter) is not None

    def may_load(self, adapter: str) -> bool:
        """Whether an adapter of this name is, or would be, its own."""
        return self.is_admin or self._own.match(adapter) is not None

    def may_load_from(self, place: str) -> bool:
        return self.is_admin or self._places.match(place) is not None

    @property
    def sees_all(self) -> bool:
        return self.is_admin or (self.base_model == "on" and "*" in (*self.use, *self.see, *self.load))

    @cached_property
    def _usable(self) -> re.Pattern[str]:
        return _any_of((*self.use, *self.load))

    @cached_property
    def _visible(self) -> re.Pattern[str]:
        return _any_of((*self.use, *self.load, *self.see))

    @cached_property
    def _own(self) -> re.Pattern[str]:
        return _any_of(self.load)

    @cached_property
    def _places(self) -> re.Pattern[str]:
        return _any_of(self.load_from)

    # --- on its way from a front to a server ---

    def to_header(self) -> str:
        """Its name, rights and weight without its limits, as ASCII JSON that `from_header` reads back."""
        return self._header

    @cached_property
    def _header(self) -> str:
        told = {
            f.name: value
            for f in fields(self)
            if f.name not in LIMITS and (value := getattr(self, f.name)) != f.default
        }
        return json.dumps(told, separators=(",", ":"))

    @classmethod
    def from_header(cls, text: str) -> "Tenant":
        """Raises ConfigError where it is none of `to_header`."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("it is no JSON") from error
        if not isinstance(told, dict) or not isinstance(name := told.pop("name", None), str):
            raise ConfigError("it must be a JSON object with a name")
        return cls.parse(name, told)


_NOBODY = Tenant()
"""With the defaults, which need to be checked once only."""


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)")
