"""Sends shots and judges the answers: what a server may say to an odd request, and how soon."""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hostile.shots import Shot
from hostile.tally import REASONS_OF_5XX

PARTIAL_WAIT_S = 0.2
"""How long the rest of a request is withheld before its client goes away."""
MAX_REFUSAL_BYTES = 16_384
"""A refusal names what is wrong; it does not send back a megabyte that it was given."""
LEFT_HANGING_S = 30.0
NUM_LOADED = 40


@dataclass(frozen=True)
class Reply:
    status: int
    headers: str
    body: bytes


@dataclass
class Report:
    """Of a volley: `sent` is the sum of `statuses` and `partial`, requests that were never whole."""

    sent: int = 0
    partial: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def note_time(self, seconds: float, name: str) -> None:
        self.slowest = sorted([*self.slowest, (seconds, name)], reverse=True)[:20]


async def fire(port: int, shots: Iterable[Shot], *, concurrency: int, limit_s: float) -> Report:
    """Every shot on a connection of its own. `limit_s`: longer answers are failures.

    The bytes of a few shots are made before the first of them leaves, so that no answer waits for that.
    """
    report, shots = Report(), iter(shots)

    async def gun(loaded: Iterator[tuple[Shot, bytes]]) -> None:
        for shot, wire in loaded:
            await _fire_one("127.0.0.1", port, shot, wire, report, limit_s)

    while loaded := [(shot, shot.wire()) for shot in itertools.islice(shots, NUM_LOADED)]:
        magazine = iter(loaded)
        await asyncio.gather(*(gun(magazine) for _ in range(concurrency)))
    return report


async def _fire_one(host: str, port: int, shot: Shot, wire: bytes, report: Report, limit_s: float) -> None:
    report.sent += 1
    started_at = time.perf_counter()
    try:
        reply = await asyncio.wait_for(exchange(host, port, wire, shot.is_whole), LEFT_HANGING_S)
    except (TimeoutError, OSError, ValueError) as error:
        report.failures.append(f"{shot.name}: no answer: {error!r}")
        return
    seconds = time.perf_counter() - started_at
    if reply is None:
        report.partial += 1
        if shot.is_whole:
            report.failures.append(f"{shot.name}: the connection was closed without an answer")
        return
    report.statuses[reply.status] += 1
    report.note_time(seconds, shot.name)
    if seconds > limit_s:
        report.failures.append(f"{shot.name}: answered {reply.status} after {seconds:.1f} s")
    if (fault := fault_of(reply)) is not None:
        report.failures.append(f"{shot.name}: {fault}")


async def exchange(host: str, port: int, wire: bytes, is_whole: bool = True) -> Reply | None:
    """Sends `wire` and reads until the server closes; None where it sent nothing."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        received = asyncio.create_task(reader.read())
        with suppress(ConnectionError):  # a server may answer, and close, before it has read all
            writer.write(wire)
            await writer.drain()
        wait = None if is_whole else PARTIAL_WAIT_S
        with suppress(TimeoutError, ConnectionError):
            data = await asyncio.wait_for(asyncio.shield(received), wait)
            return parse(data) if data else None
        received.cancel()
        return None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def parse(data: bytes) -> Reply:
    """Raises ValueError where `data` is no HTTP answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    start, _, headers = head.decode("latin-1").partition("\r\n")
    if not start.startswith("HTTP/1."):
        raise ValueError(f"not HTTP: {start[:80]!r}")
    headers = headers.lower()
    status = int(start.split()[1])
    if status == 100:
        return parse(body)
    return Reply(status, headers, _dechunked(body) if "transfer-encoding: chunked" in headers else body)


def _dechunked(body: bytes) -> bytes:
    pieces: list[bytes] = []
    while True:
        length, _, rest = body.partition(b"\r\n")
        size = int(length or b"", 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(rest[:size])
        body = rest[size + 2 :]


def fault_of(reply: Reply) -> str | None:
    """What is wrong with an answer, whatever was asked."""
    shown = reply.body[:200]
    if reply.status >= 500 and reply.status not in REASONS_OF_5XX:
        return f"answered {reply.status}: {shown!r}"
    if reply.status >= 500 and not reason(reply):
        return f"answered {reply.status} without a reason: {shown!r}"
    if reply.status >= 400 and len(reply.body) > MAX_REFUSAL_BYTES:
        return f"refused with {len(reply.body)} bytes: {shown!r}"
    if reply.status == 200 and "text/event-stream" in reply.headers and not _has_ended(reply.body):
        return f"a stream that stops in the middle: {reply.body[-200:]!r}"
    return None


def reason(reply: Reply) -> str:
    """The message of a refusal, in whichever of the API's shapes; empty where there is none."""
    try:
        content: Any = json.loads(reply.body)
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    error = content.get("error")
    if isinstance(error, dict):
        return str(error.get("message", ""))
    return str(error or content.get("message") or content.get("detail") or content.get("error_message") or "")


def _has_ended(body: bytes) -> bool:
    last = body.rstrip().rsplit(b"\n\n", 1)[-1]
    return any(end in last for end in (b"[DONE]", b'"error"', b'"message"', b'"finished":true')) or (
        b'"generated_text":"' in last
    )
