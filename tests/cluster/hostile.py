"""A server that is well by all it tells, and whose answers to requests are bytes that it was given."""

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n"
JSON, HTML, EVENTS = b"application/json", b"text/html", b"text/event-stream"
CHUNKED, CLOSING = b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"
CARDS = {"object": "list", "data": [{"id": "base", "parent": None}, {"id": "small", "parent": "base"}]}


def head(kind: bytes, more: bytes = CLOSING) -> bytes:
    return HEAD % (kind, more)


def plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


def told(text: bytes) -> bytes:
    """The answer to a head that asks for nothing of a model."""
    known = {b"/v1/models": plain(json.dumps(CARDS).encode()), b"/health": plain(b"{}")}
    return known.get(text.split()[1], plain(b"{}", b"404 Not Found"))


@dataclass
class Script:
    """What follows a request: `parts` in turn, the last one for ever where `repeats`; then the connection is
    closed, or left as it is where `hangs`.
    """

    parts: Iterable[bytes]
    repeats: bool = False
    hangs: bool = False
    num_asked: int = field(default=0, init=False)


@contextlib.asynccontextmanager
async def hostile(script: Script) -> AsyncIterator[str]:
    """The server's URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                text = await reader.readuntil(b"\r\n\r\n")
                if not text.startswith(b"POST"):
                    writer.write(told(text))
                    continue
                script.num_asked += 1
                await _misbehave(writer, script)
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@contextlib.asynccontextmanager
async def closing_idle_ones(num_at_once: int) -> AsyncIterator[str]:
    """A server that answers `num_at_once` requests together, each on a connection of its own, and closes a
    connection on which a second one comes."""
    answer = plain(json.dumps({"choices": [{"index": 0, "text": "x"}]}).encode())
    num_asked, is_full = itertools.count(1), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_answered = False
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                text = await reader.readuntil(b"\r\n\r\n")
                if not text.startswith(b"POST"):
                    writer.write(told(text))
                    continue
                length = re.search(rb"(?i)content-length: (\d+)", text)
                assert length is not None
                await reader.readexactly(int(length[1]))
                if has_answered:
                    break
                if next(num_asked) % num_at_once == 0:
                    is_full.set()
                    is_full.clear()
                else:
                    await is_full.wait()
                writer.write(answer)
                has_answered = True
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _misbehave(writer: asyncio.StreamWriter, script: Script) -> None:
    last = b""
    for last in script.parts:
        writer.write(last)
        await writer.drain()
    while script.repeats:
        writer.write(last)
        await writer.drain()
        await asyncio.sleep(0)
    if script.hangs:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
