"""API keys: 256 random bits each, of which the tenants file has the SHA-256. Against so much chance a slow
hash would add nothing; and who looks a key up by its hash learns nothing from how long that takes.

A key's line is written into the list `keys:` of the tenants file; all else in the file stays as it is.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from toppings.settings import ConfigError
from toppings.tenants.expiry import FORM, read_expiry
from toppings.tenants.file import KEYS, KeyEntry, TenantsFile, parse, read_text

MAX_KEY_BYTES = 512
SECTION = re.compile(rf"^{KEYS}:[ \t]*(?:\[\][ \t]*)?(?:#.*)?$", re.MULTILINE)
ITEM = re.compile(r"\n(?:[ \t]*(?:#.*)?\n)*([ \t]*)- ")


def digest_of(key: bytes) -> bytes:
    """By which a key is known; b"" for one that is too long to be one."""
    return hashlib.sha256(key).digest() if len(key) <= MAX_KEY_BYTES else b""


@dataclass(frozen=True, slots=True)
class NewKey:
    """`text` is shown once and kept nowhere."""

    text: str
    entry: KeyEntry


def add_key(path: Path, tenant: str, expires: str = "") -> NewKey:
    """A new key of a tenant of the file; `expires` as `read_expiry` takes it. Raises ConfigError, OSError."""
    key_id, now = secrets.token_hex(4), datetime.now(UTC)
    text = f"tk-{key_id}-{secrets.token_urlsafe(32)}"
    until = read_expiry(expires, now) if expires else ""
    entry = KeyEntry(key_id, tenant, digest_of(text.encode()).hex(), now.strftime(FORM), until)

    def change(file: TenantsFile, content: str) -> tuple[str, list[KeyEntry]]:
        if tenant not in file.tenants:
            raise ConfigError(
                f"{path} has no tenant {tenant!r}; there are: {', '.join(file.tenants) or 'none'}"
            )
        told = {name: value for name, value in asdict(entry).items() if value}
        return _with_line(content, json.dumps(told)), [*file.keys, entry]

    _edit(path, change)
    return NewKey(text, entry)


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """The key of this id opens nothing from now on. Raises ConfigError, OSError."""
    found: list[KeyEntry] = []

    def change(file: TenantsFile, content: str) -> tuple[str, list[KeyEntry]]:
        found.extend(each for each in file.keys if each.id == key_id)
        if not found:
            raise ConfigError(f"{path} has no key {key_id!r}; `toppings keys list` shows their ids")
        kept = [line for line in content.splitlines(keepends=True) if found[0].sha256 not in line]
        return "".join(kept), [each for each in file.keys if each.id != key_id]

    _edit(path, change)
    return found[0]


def _with_line(content: str, entry: str) -> str:
    """As the first item of the list `keys`, or of a new one at the end."""
    section = SECTION.search(content)
    if section is None:
        end = "" if content.endswith("\n") or not content else "\n"
        return f"{content}{end}{KEYS}:\n- {entry}\n"
    item = ITEM.match(content, section.end())
    indent = item[1] if item else ""
    head = f"{content[: section.start()]}{section[0].replace('[]', '')}".rstrip()
    return f"{head}\n{indent}- {entry}\n{content[section.end() :].removeprefix(chr(10))}"


def _edit(path: Path, change: Callable[[TenantsFile, str], tuple[str, list[KeyEntry]]]) -> None:
    """The file is replaced as a whole, by one at a time, and only by what reads as was meant."""
    target = path.resolve()
    with _locked(target.parent):
        content = read_text(target)
        file = parse(content, str(path))
        text, keys = change(file, content)
        changed = parse(text, str(path))
        if changed.tenants != file.tenants or {k.id: k for k in changed.keys} != {k.id: k for k in keys}:
            raise ConfigError(
                f"{path}: its keys cannot be changed; write them as a list under `{KEYS}:`, a line each"
            )
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            part.touch(mode=0o600, exist_ok=False)
            part.write_text(text, encoding="utf-8")
            shutil.copymode(target, part)
            with suppress(PermissionError):
                os.chown(part, target.stat().st_uid, target.stat().st_gid)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
