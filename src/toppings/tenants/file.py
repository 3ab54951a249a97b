"""The tenants file: YAML with the mapping `tenants` and the list `keys`.

tenants:
  search: {use: ["search-*"], requests_per_minute: 600}
keys:
- {"id": "3fa2b1c9", "tenant": "search", "sha256": "...", "created": "2026-01-31T12:00:00Z"}
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from toppings.settings import ConfigError
from toppings.tenants.expiry import read_instant
from toppings.tenants.tenant import Tenant
from toppings.tenants.yaml_text import load_yaml

TENANTS, KEYS = "tenants", "keys"
MAX_BYTES = 64 * 2**20
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """`sha256`: of the key, in hexadecimal digits; `created` and `expires`: instants, or nothing."""

    id: str
    tenant: str
    sha256: str
    created: str = ""
    expires: str = ""


@dataclass(frozen=True, slots=True)
class TenantsFile:
    """`keys` may name tenants that are not there (any more): those open nothing."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    keys: list[KeyEntry] = field(default_factory=list)

    @property
    def orphans(self) -> list[KeyEntry]:
        return [key for key in self.keys if key.tenant not in self.tenants]


def read_text(path: Path) -> str:
    """Raises ConfigError for a file that cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"tenants_file {path} is larger than {MAX_BYTES} bytes")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"cannot read tenants_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read tenants_file {path}: it is not UTF-8") from error


def parse(text: str, name: str) -> TenantsFile:
    """Raises ConfigError, which begins with the file's `name` and says what is wrong."""
    try:
        loaded = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no YAML that can be read: {error}") from error
    try:
        return _read(loaded)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _read(loaded: Any) -> TenantsFile:
    if not isinstance(loaded, dict | None):
        raise ConfigError(
            f"it holds a {type(loaded).__name__}; it must hold a mapping of {TENANTS} and {KEYS}"
        )
    content = loaded or {}
    if unknown := [key for key in content if key not in (TENANTS, KEYS)]:
        raise ConfigError(f"unknown part {unknown[0]!r}; known: {TENANTS}, {KEYS}")
    tenants, keys = content.get(TENANTS) or {}, content.get(KEYS) or []
    if not isinstance(tenants, dict):
        raise ConfigError(f"{TENANTS} is a {type(tenants).__name__}; it must be a mapping by names")
    if not isinstance(keys, list):
        raise ConfigError(f"{KEYS} is a {type(keys).__name__}; it must be a list")
    names = [_text(name, "a tenant's name") for name in tenants]
    entries = [_key(entry) for entry in keys]
    for what, values in (("id", [k.id for k in entries]), ("sha256", [k.sha256 for k in entries])):
        if len(set(values)) != len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"two keys have the {what} {twice!r}")
    if TENANTS not in content:
        raise ConfigError(f"it has no part {TENANTS!r}; `{TENANTS}: {{}}` is one without any")
    return TenantsFile({name: Tenant.parse(name, tenants[name]) for name in names}, entries)


def _key(entry: Any) -> KeyEntry:
    if not isinstance(entry, dict):
        raise ConfigError(f"a key is {str(entry)[:80]!r}; it must be a mapping of id, tenant and sha256")
    known = [f.name for f in fields(KeyEntry)]
    if unknown := [name for name in entry if name not in known]:
        raise ConfigError(f"unknown part {unknown[0]!r} of a key; known: {', '.join(known)}")
    if missing := [name for name in known[:3] if not entry.get(name)]:
        raise ConfigError(f"a key has no {missing[0]}; `toppings keys add` writes whole ones")
    key = KeyEntry(*(_text(entry.get(name, ""), f"a key's {name}") for name in known))
    if not DIGEST.fullmatch(key.sha256):
        raise ConfigError(f"key {key.id}: sha256 must be 64 hexadecimal digits, in small letters")
    if key.expires:
        try:
            read_instant(key.expires)
        except (ValueError, OverflowError) as error:
            problem = f"key {key.id}: expires is {key.expires[:80]!r}"
            raise ConfigError(f"{problem}; it must be an instant, such as 2027-01-31T12:00:00Z") from error
    return key


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not (value or what.endswith(("created", "expires"))):
        raise ConfigError(f"{what} is {value!r}; it must be a text, in quotes where YAML reads it otherwise")
    return value
