"""Files of web servers: read within bounds of time, from where they were asked for."""

import hashlib
import io
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from socket import SocketIO, socket
from typing import IO, Any
from urllib.parse import quote, urlsplit

from toppings.sources.fetch import (
    DENIALS,
    FetchChanged,
    FetchDenied,
    FetchError,
    FetchNotFound,
    Look,
    Opened,
    Room,
    copy,
    explained,
    one_line,
)

WAIT_S = 10.0
"""The longest wait for a connection, and for the next bytes."""
PARTIAL = 206
READ = "sha256:"
"""Begins the mark of a file that was read for it."""
LENGTH = re.compile("[0-9]{1,18}")
PATH_MARKS = "/%:@!$&'()*+,;=~"
"""Of an address's path, spelt as they are like letters and digits of ASCII; the rest by percent signs."""


class WebPlace:
    """What a web server has below `address`; it cannot be listed."""

    def __init__(self, address: str) -> None:
        self._address = address

    def look(self, name: str, room: Room) -> Look | None:
        """By the server's mark, or the time of the last change. A file of which neither these nor its size
        are told is read for it. None: there is no such file. Raises FetchDenied."""
        try:
            with open_url(f"{self._address}/{name}", room, method="HEAD") as answer:
                size, mark = _length(answer), next(iter(_marks(answer)), "")
        except FetchNotFound:
            return None
        return self._read(name, room) if size is None and not mark else (size, mark)

    def open(self, name: str, room: Room, found: Look, start: int = 0) -> Opened:
        """What was `found`. Raises FetchError, FetchChanged."""
        url, mark = f"{self._address}/{name}", found[1]
        headers = {}
        if start and mark.startswith('"'):  # weak marks may be of other bytes, and so may times
            headers = {"Range": f"bytes={start}-", "If-Range": mark}
        answer = open_url(url, room, headers)
        told = {each.removeprefix("W/") for each in _marks(answer)}
        if mark and told and mark.removeprefix("W/") not in told:
            answer.close()
            raise FetchChanged(f"{url} has changed since it was looked for")
        if mark.startswith(READ) and not told:
            return Opened(_Unchanged(answer, mark, url), 0, found[0])
        length = _length(answer)
        if answer.status != PARTIAL:
            return Opened(answer, 0, length)
        if not str(answer.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            answer.close()
            raise FetchError(f"{url} gives {answer.headers.get('Content-Range')}, not bytes {start} on")
        return Opened(answer, start, None if length is None else start + length)

    def _read(self, name: str, room: Room) -> tuple[int, str]:
        digest = _Digest()
        opened = self.open(name, room, (None, ""))
        with closing(opened.body):
            size = copy(opened, digest, room, f"{self._address}/{name}")
        return size, f"{READ}{digest.sha256.hexdigest()}"


class _Digest(io.BytesIO):
    """Keeps nothing of what is written but its digest."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)


class _Unchanged:
    """An answer whose content has to be what `mark` says."""

    def __init__(self, answer: HTTPResponse, mark: str, url: str) -> None:
        self._answer, self._mark, self._url = answer, mark, url
        self._digest = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        """Raises FetchChanged at the end of another one."""
        chunk = self._answer.read1(num_bytes)
        self._digest.update(chunk)
        if not chunk and self._mark != f"{READ}{self._digest.hexdigest()}":
            raise FetchChanged(f"{self._url} has changed since it was looked for")
        return chunk

    def close(self) -> None:
        self._answer.close()


def _length(answer: HTTPResponse) -> int | None:
    """Raises FetchError for one that is none; the answer is closed then."""
    length = answer.headers.get("Content-Length")
    if length is None or "Transfer-Encoding" in answer.headers:
        return None
    if LENGTH.fullmatch(length.strip()) is None:
        answer.close()
        raise FetchError(f"{answer.url} announces {one_line(length)[:40]!r} as its length in bytes")
    return int(length)


def _marks(answer: HTTPResponse) -> list[str]:
    """The best one first."""
    return [str(mark) for name in ("ETag", "Last-Modified") if (mark := answer.headers.get(name))]


def open_url(
    url: str,
    room: Room,
    headers: Mapping[str, str] | None = None,
    *,
    to_other_hosts: bool = False,
    method: str = "GET",
) -> HTTPResponse:
    """The answer of a web server to `url`, whose path need not be percent-encoded.

    Raises FetchError; FetchNotFound for 404 and 410, FetchDenied for 401 and 403.
    """
    opener = urllib.request.build_opener(
        _Redirects(to_other_hosts=to_other_hosts), _Http(room, url), _Https(room, url)
    )
    with explained(url):
        parts = urlsplit(url)
        spelt = parts._replace(path=quote(parts.path, safe=PATH_MARKS)).geturl()
        request = urllib.request.Request(spelt, headers=dict(headers or {}), method=method)
        try:
            answer: HTTPResponse = opener.open(request, timeout=min(WAIT_S, room.left_s(url)))
        except urllib.error.HTTPError as error:
            error.close()
            said = f"{url} answers {error.code} {one_line(error.reason)}"
            if error.code in DENIALS:
                raise FetchDenied(f"{said}: it is not there, or may not be read") from error
            raise (FetchNotFound if error.code in (404, 410) else FetchError)(said) from error
        except Exception:
            room.left_s(url)  # else that is why
            raise
    return answer


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
        if request is not None:
            request.method = req.get_method()  # a HEAD stays one
            if not is_same:
                request.remove_header("Authorization")
            fp.close()  # else the library reads the answer's body, of whatever length
        return request


class _Timed(io.RawIOBase):
    """An answer as it comes: each wait for bytes, of its head or its body, ends with the room's time."""

    def __init__(self, source: socket, room: Room, url: str) -> None:
        self._socket, self._room, self._url = source, room, url
        self._raw: SocketIO = source.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(min(WAIT_S, self._room.left_s(self._url)))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket, *args: Any, room: Room, url: str, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Timed(sock, room, url))


class _Http(urllib.request.HTTPHandler):
    def __init__(self, room: Room, url: str) -> None:
        super().__init__()
        self._response = partial(_Response, room=room, url=url)

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPConnection, self._response), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, room: Room, url: str) -> None:
        super().__init__()
        self._response = partial(_Response, room=room, url=url)

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        context = ssl.create_default_context()
        return self.do_open(partial(_connection, HTTPSConnection, self._response), req, context=context)


def _connection(
    kind: type[HTTPConnection], response: "partial[_Response]", host: str, **options: Any
) -> HTTPConnection:
    connection = kind(host, **options)
    connection.response_class = response  # type: ignore[assignment]
    return connection
