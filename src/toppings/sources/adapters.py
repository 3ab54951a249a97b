"""Where adapters come from when a request first names them: directories, hubs, object stores, web servers.

    dir:PATH[,PATTERN...]     PATH/<name>, a directory that is never listed
    hub:PATTERN[,PATTERN...]  the repository <name>, `org/name` or `org/name@revision`
    s3://BUCKET/PREFIX[,PATTERN...]  and gs://, https://, http://: PREFIX/<name>/adapter_config.json and
                              its neighbours

A source is asked only for names that one of its patterns fits (shell's: `*`, `?`, `[...]`; none: all, but for
a hub's). Of what it has, only the files in `WANTED` are read.
"""

import errno
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from toppings.adapters.checkpoint import fingerprint
from toppings.adapters.errors import AdapterError
from toppings.adapters.merges import MERGE_PATH
from toppings.adapters.names import check_name
from toppings.adapters.peft_config import CONFIG_FILE
from toppings.adapters.stored_tensors import WEIGHTS_FILE
from toppings.adapters.text_files import TEXT_FILES
from toppings.config import ConfigError
from toppings.sources.fetch import FetchError, FetchNotFound, Files, Room, fetch
from toppings.sources.hub import HubFiles, split_id
from toppings.sources.remote import SCHEMES, RemoteFiles, scheme_of

NEEDED = frozenset({CONFIG_FILE, WEIGHTS_FILE})
WANTED = NEEDED | frozenset(TEXT_FILES)
DIR, HUB = "dir", "hub"
KINDS = (DIR, HUB, *SCHEMES)
FETCHED = "fetching"
"""Below the state directory: what is under way, and what processes that were killed have left."""
PRIVATE = "private "
"""Begins a record's path where only those may use the adapter whose own token may read it."""


@dataclass(frozen=True)
class Found:
    """An adapter in a source. `where` names place and revision, and is another one when the content may be;
    `path` is its directory where it is on this machine already, below `root`; `files` what has to be fetched
    else."""

    where: str
    path: Path | None = None
    root: Path | None = None
    files: Files | None = None

    def bring(self, directory: Path, room: Room) -> Path:
        """The directory to read it from: its own, or the new one `directory`.

        Raises FetchError; then the directory may hold a part, which is the caller's to delete.
        """
        if self.path is not None:
            return self.path
        assert self.files is not None
        fetch(self.files, directory, room)
        return directory


class AdapterSource(ABC):
    """One of the configured places; `text` is it as settings have it, with a whole path. All methods may wait
    for a disk or a network."""

    def __init__(self, text: str, kind: str, patterns: tuple[str, ...]) -> None:
        self.text, self.kind, self._patterns = text, kind, patterns

    def allows(self, name: str) -> bool:
        return not self._patterns or any(fnmatchcase(name, pattern) for pattern in self._patterns)

    @abstractmethod
    def find(self, name: str, token: str | None = None) -> Found:
        """What it has by this name. Raises FetchNotFound, FetchError."""

    @abstractmethod
    def name_of(self, reference: str) -> str | None:
        """The name by which it knows `reference`, its own spelling of a place; None for another's."""


class DirSource(AdapterSource):
    def __init__(self, path: Path, patterns: tuple[str, ...]) -> None:
        super().__init__(",".join((f"{DIR}:{path.absolute()}", *patterns)), DIR, patterns)
        self._root = path.resolve()

    def find(self, name: str, token: str | None = None) -> Found:
        """What it says names no path: those who ask are not told where the server keeps what."""
        try:
            whole = (self._root / name).resolve()
            if not (whole / CONFIG_FILE).is_file():
                raise FetchNotFound(f"a directory of the server has no adapter {name!r}")
            for part in (whole, *(whole / each for each in WANTED)):
                if not part.resolve().is_relative_to(self._root):
                    raise FetchError(f"adapter {name!r} is a link that leads out of the server's directory")
            return Found(f"{DIR}:{whole}@{fingerprint(whole)}", path=whole, root=self._root)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise FetchNotFound(f"{name!r} is too long for the name of a directory") from error
            raise FetchError(f"cannot read adapter {name!r}: {error.strerror}") from error
        except RuntimeError as error:
            raise FetchError(f"cannot read adapter {name!r}: its links go round in a circle") from error

    def name_of(self, reference: str) -> str | None:
        return None  # paths are the business of adapter_roots


class HubSource(AdapterSource):
    def __init__(self, text: str, patterns: tuple[str, ...]) -> None:
        super().__init__(text, HUB, patterns)

    def allows(self, name: str) -> bool:
        """By the repository, in whatever revision."""
        parts = split_id(name)
        return parts is not None and not parts[1] and super().allows(parts[0])

    def find(self, name: str, token: str | None = None) -> Found:
        files = HubFiles(name, WANTED, token)
        if CONFIG_FILE not in files.sizes():
            raise FetchNotFound(f"{files.where} is no adapter: it has no {CONFIG_FILE}")
        return _fetchable(files, files.where)

    def name_of(self, reference: str) -> str | None:
        name = reference.removeprefix(f"{HUB}:")
        return name if split_id(name) is not None else None


class RemoteSource(AdapterSource):
    def __init__(self, text: str, prefix: str, patterns: tuple[str, ...]) -> None:
        super().__init__(text, scheme_of(prefix), patterns)
        self._prefix = prefix.rstrip("/")

    def find(self, name: str, token: str | None = None) -> Found:
        if any(character in name for character in "?#%\\"):
            raise FetchNotFound(f"{name!r} is no name below {self._prefix}")
        files = RemoteFiles(f"{self._prefix}/{name}", WANTED, NEEDED)
        return _fetchable(files, f"{files.where}@{files.version[:16]}")

    def name_of(self, reference: str) -> str | None:
        name = reference.removeprefix(f"{self._prefix}/")
        return name if name != reference else None


def new_part(state_dir: Path) -> Path:
    """A name for a directory that is fetched into."""
    return state_dir / FETCHED / uuid.uuid4().hex


@contextmanager
def fetch_place(state_dir: Path) -> Iterator[Path]:
    """A new name for a directory, which is gone at the end."""
    part = new_part(state_dir)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def clear_fetches(state_dir: Path) -> None:
    """For who alone uses the directory: what was under way when another was killed goes."""
    shutil.rmtree(state_dir / FETCHED, ignore_errors=True)


def _fetchable(files: Files, where: str) -> Found:
    if missing := NEEDED - set(files.sizes()):
        raise FetchError(
            f"{files.where} has no {min(missing)}; of an adapter only safetensors are read, never pickles"
        )
    return Found(where, files=files)


def parse_source(text: str) -> AdapterSource:
    """A source as settings have it. Raises ConfigError for what is none."""
    place, *patterns = (part.strip() for part in text.split(","))
    allowed = tuple(pattern for pattern in patterns if pattern)
    if place.startswith(f"{DIR}:"):
        path = Path(place.removeprefix(f"{DIR}:"))
        if not path.is_dir():
            raise ConfigError(f"adapter_source {text!r}: no directory at {path}")
        return DirSource(path, allowed)
    if place.startswith(f"{HUB}:"):
        first = place.removeprefix(f"{HUB}:")
        if not first:
            raise ConfigError(f"adapter_source {text!r} names no repositories; write e.g. hub:my-org/*")
        return HubSource(text, (first, *allowed))
    if scheme_of(place) in SCHEMES:
        return RemoteSource(text, place, allowed)
    raise ConfigError(
        f"adapter_source {text!r} is none; one begins with dir:, hub:, s3://, gs://, https:// or http://"
    )


def find_adapter(
    sources: list[AdapterSource], name: str, *, kind: str | None = None, token: str | None = None
) -> Found:
    """What the first of `sources` has that allows `name` and knows it; `kind`: only sources of this one.

    Raises FetchNotFound where none has it, FetchError where one that may have it fails.
    """
    allowed = [each for each in sources if kind in (None, each.kind) and each.allows(name)]
    misses: list[str] = []
    for source in allowed:
        try:
            return source.find(name, token)
        except FetchNotFound as error:
            misses.append(str(error))
    raise FetchNotFound("; ".join(misses) or f"no adapter source may be asked for {name!r}")


def is_safe_name(name: str, base_model: str) -> bool:
    """Whether a source may be asked for it: one that could be registered, and no path."""
    try:
        check_name(name, base_model)
    except AdapterError:
        return False
    return not name.startswith(("/", "~", ".")) and "\\" not in name


def find_reference(sources: list[AdapterSource], reference: str, token: str | None = None) -> Found | None:
    """What one of `sources` has at a place in its own spelling (hub:org/name, s3://...), where it allows it;
    None where it is nobody's. Raises FetchError, FetchNotFound."""
    owner = owner_of(sources, reference)
    return None if owner is None else owner[0].find(owner[1], token)


def owner_of(sources: list[AdapterSource], reference: str) -> tuple[AdapterSource, str] | None:
    """Who may be asked for a place in its own spelling, and by what name; None where it is nobody's."""
    for source in sources:
        name = source.name_of(reference)
        if name is not None and is_safe_name(name, "") and source.allows(name):
            return source, name
    return None


def kind_of(where: str) -> str:
    """Of the source that a record's path names; that of a directory for what is made on this machine."""
    return DIR if where.startswith(("/", MERGE_PATH)) else where.removeprefix(PRIVATE).partition(":")[0]


def find_again(sources: list[AdapterSource], name: str, where: str) -> Found:
    """What was `Found` before, by this name, at `where`. Raises FetchError where no source has it, or has
    another revision by now."""
    where = where.removeprefix(PRIVATE)
    place = where if where.startswith(f"{HUB}:") else where.rpartition("@")[0]
    found = find_reference(sources, place) or find_adapter(sources, name)
    if found.where != where:
        raise FetchError(f"{where} is not to be had any more; there is {found.where} now")
    return found


def any_place(reference: str) -> AdapterSource:
    """The source of one adapter, whoever may ask for it: the operator's own word, on the command line."""
    if scheme_of(reference):
        return RemoteSource(reference, reference.rstrip("/").rpartition("/")[0], ())
    return HubSource(reference, ("*",))
