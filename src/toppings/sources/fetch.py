"""Copying files from elsewhere within bounds: of bytes and of time."""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeAlias
from urllib.error import URLError

from toppings.adapters.errors import AdapterError, AdapterNotFound

CHUNK_BYTES = 1 << 18
DENIALS = (401, 403)
"""What web servers and hubs answer who may not read something."""
MAX_REASON_CHARS = 300
OUR_OWN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What this machine has run out of: no fault of the place that was asked."""


class FetchError(AdapterError):
    """What was asked for cannot be had from where it is; the message says from where and why."""


class FetchNotFound(FetchError, AdapterNotFound):
    """Nothing is there by this name."""


class FetchDenied(FetchError):
    """The place gives it to others only; many say so as well of what is not there."""


class FetchSpoilt(FetchError):
    """What has come is no beginning to go on from."""


class FetchTooLarge(FetchSpoilt):
    """More than was announced, or than may be fetched."""


class FetchChanged(FetchSpoilt):
    """It is another content by now than was found first."""


@dataclass(eq=False)
class Room:
    """What a fetch may still take, of all its files together."""

    max_bytes: int
    timeout_s: float = math.inf
    num_bytes: int = 0
    ends_at: float = field(init=False)
    is_given_up: bool = False

    def __post_init__(self) -> None:
        self.ends_at = time.monotonic() + self.timeout_s

    def give_up(self) -> None:
        """From another thread: nothing more is fetched."""
        self.is_given_up = True

    def left_s(self, what: str) -> float:
        """Seconds, more than none. Raises FetchError where there are none."""
        if self.is_given_up:
            raise FetchError(f"{what} is not wanted any more")
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise FetchError(f"{what} has not come within {self.timeout_s:g} s")
        return left

    def take(self, num_bytes: int, what: str) -> None:
        """Raises FetchError where that is more than there is."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise FetchTooLarge(f"{what} is larger than {self.max_bytes} bytes, which is what may be fetched")
        self.left_s(what)

    def check(self, sizes: Mapping[str, int | None], where: str) -> None:
        """Before a byte is read."""
        total = sum(size or 0 for size in sizes.values())
        if self.num_bytes + total > self.max_bytes:
            raise FetchTooLarge(f"{where} has {total} bytes; at most {self.max_bytes} may be fetched")


class Opened(NamedTuple):
    """A file under way: `body` has `read`, and `close`; its first byte is the file's `start`th. `size`: of
    the whole file; None where that is not told."""

    body: Any
    start: int = 0
    size: int | None = None


Look: TypeAlias = tuple[int | None, str]
"""What a place tells of a file: its size, None where that is not told; and what is another one when the
content is, "" where the size has to do."""


class Files(Protocol):
    """The files of one adapter or model, somewhere, in one revision of it."""

    where: str
    """For messages and records."""
    version: str
    """Another one whenever the content may be another."""
    is_restricted: bool
    """Whether only some accounts may read them."""

    def sizes(self) -> Mapping[str, int | None]:
        """Of the files that there are and may be fetched, by name; None where it is not told beforehand."""
        ...

    def open(self, name: str, room: Room, start: int = 0) -> Opened:
        """From byte `start` on, or from 0 where it is not to be had otherwise, in this revision and no other.
        Nothing that is read of it waits longer than `room` lasts. Raises FetchError, FetchChanged."""
        ...


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever the client of a place raises, of whatever kind, is a FetchError that says why; but for what
    this machine itself has run out of."""
    try:
        yield
    except (FetchError, MemoryError):
        raise
    except Exception as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, OSError) and reason.errno in OUR_OWN:
            raise reason from error
        raise FetchError(f"{what} cannot be fetched: {one_line(reason)}") from error


def one_line(reason: object) -> str:
    """What is said of it elsewhere, for a message of ours: without control characters, and not at length."""
    said = " ".join("".join(c if c.isprintable() else " " for c in str(reason)).split())
    return said[:MAX_REASON_CHARS] or type(reason).__name__


def fetch(files: Files, directory: Path, room: Room) -> None:
    """Copies all of `files` into the new `directory`. Raises FetchError, OSError where that cannot be."""
    sizes = files.sizes()
    room.check(sizes, files.where)
    directory.mkdir(parents=True)
    for name, size in sizes.items():
        opened = files.open(name, room)
        with closing(opened.body), (directory / name).open("xb") as target:
            copy(opened, target, room, f"{files.where}: {name}", size=size)


def copy(
    opened: Opened,
    target: IO[bytes],
    room: Room,
    what: str,
    *,
    size: int | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> int:
    """The whole length of the file whose rest was copied; what trickles in counts against the time as it
    comes. `on_chunk` hears how long it is so far.

    Raises FetchError where it is not of `size` (None: as long as `opened` says): FetchTooLarge at the first
    byte beyond.
    """
    read = getattr(opened.body, "read1", opened.body.read)
    announced, num_bytes = opened.size if size is None else size, opened.start
    while chunk := _next(read, room, what):
        room.take(len(chunk), what)
        num_bytes += len(chunk)
        if announced is not None and num_bytes > announced:
            raise FetchTooLarge(f"{what} goes on after the {announced} bytes that were announced")
        target.write(chunk)
        if on_chunk is not None:
            on_chunk(num_bytes)
    if announced is not None and num_bytes != announced:
        raise FetchError(f"{what} has {num_bytes} bytes; {announced} were announced")
    return num_bytes


def _next(read: Callable[[int], bytes], room: Room, what: str) -> bytes:
    room.left_s(what)
    with explained(what):
        try:
            return read(CHUNK_BYTES)
        except Exception:
            room.left_s(what)  # else that is why
            raise


def sync_file(file: IO[bytes]) -> None:
    """All that was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """The names in it are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
