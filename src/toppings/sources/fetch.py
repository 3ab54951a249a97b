"""Copying files from elsewhere within bounds: of bytes, of time, and of where they come from."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from toppings.adapters.errors import AdapterError, AdapterNotFound

CHUNK_BYTES = 1 << 18
CONNECT_TIMEOUT_S = 10.0
"""Also the longest wait for the next bytes."""


class FetchError(AdapterError):
    """What was asked for cannot be had from where it is; the message says from where and why."""


class FetchNotFound(FetchError, AdapterNotFound):
    """Nothing is there by this name."""


@dataclass
class Room:
    """What a fetch may still take, of all its files together."""

    max_bytes: int
    timeout_s: float
    num_bytes: int = 0
    ends_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.ends_at = time.monotonic() + self.timeout_s

    def take(self, num_bytes: int, what: str) -> None:
        """Raises FetchError where that is more than there is."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise FetchError(f"{what} is larger than {self.max_bytes} bytes, which is what may be fetched")
        if time.monotonic() > self.ends_at:
            raise FetchError(f"{what} has not come within {self.timeout_s:g} s")

    def check(self, sizes: Mapping[str, int | None], where: str) -> None:
        """Before a byte is read."""
        if self.num_bytes + sum(size or 0 for size in sizes.values()) > self.max_bytes:
            total = sum(size or 0 for size in sizes.values())
            raise FetchError(f"{where} has {total} bytes; at most {self.max_bytes} may be fetched")


class Files(Protocol):
    """The files of one adapter, somewhere, in one revision of it."""

    where: str
    """For messages and records."""
    version: str
    """Another one whenever the content may be another."""

    def sizes(self) -> Mapping[str, int | None]:
        """Of the files that there are and may be fetched, by name; None where it is not told beforehand."""
        ...

    def open(self, name: str) -> IO[bytes]: ...


def fetch(files: Files, directory: Path, room: Room) -> None:
    """Copies all of `files` into the new `directory`. Raises FetchError, OSError where that cannot be."""
    sizes = files.sizes()
    room.check(sizes, files.where)
    directory.mkdir(parents=True)
    for name, size in sizes.items():
        what = f"{files.where}: {name}"
        try:
            with files.open(name) as source, (directory / name).open("xb") as target:
                num_bytes = copy(source, target, room, what)
        except (HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as error:
            raise FetchError(f"{what} could not be fetched: {error or type(error).__name__}") from error
        if size is not None and num_bytes != size:
            raise FetchError(f"{what} has {num_bytes} bytes; {size} were announced")


def copy(source: IO[bytes], target: IO[bytes], room: Room, what: str) -> int:
    """Bytes that were copied; what trickles in counts against the time as it comes."""
    read: Any = getattr(source, "read1", source.read)
    num_bytes = 0
    while chunk := read(CHUNK_BYTES):
        room.take(len(chunk), what)
        target.write(chunk)
        num_bytes += len(chunk)
    return num_bytes


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Followed to the same host, and where `to_other_hosts` over https to others, without the credentials."""

    def __init__(self, *, to_other_hosts: bool) -> None:
        self._to_other_hosts = to_other_hosts

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        is_same = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        if not is_same and not (self._to_other_hosts and new.scheme == "https"):
            raise FetchError(
                f"{req.full_url} redirects elsewhere, to {new.scheme}://{new.netloc}: not followed"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and not is_same:
            request.remove_header("Authorization")
        return request


def open_url(
    url: str, headers: Mapping[str, str] | None = None, *, to_other_hosts: bool = False, method: str = "GET"
) -> Any:
    """The answer of a web server, a stream with `headers`. Raises FetchError; FetchNotFound for 404."""
    opener = urllib.request.build_opener(_Redirects(to_other_hosts=to_other_hosts))
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    try:
        return opener.open(request, timeout=CONNECT_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        kind = FetchNotFound if error.code == 404 else FetchError
        raise kind(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        raise FetchError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
