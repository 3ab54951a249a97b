"""Clients' connections: one is closed whose client takes too long to send a head or to take an answer."""

import asyncio
import logging
from typing import Any, cast

from aiohttp import web

logger = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """Around aiohttp's own protocol, which has no such limits; idle connections between requests are its."""

    def __init__(self, inner: asyncio.Protocol, head_timeout_s: float, write_timeout_s: float) -> None:
        self._inner, self._loop = inner, asyncio.get_running_loop()
        self._head_timeout_s, self._write_timeout_s = head_timeout_s, write_timeout_s
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None
        self._num_requests = 0

    # --- told by the handlers ---

    def begin(self) -> None:
        """A head has come, and its request is being answered."""
        self._num_requests += 1
        _stop(self._head)
        self._head = None

    def end(self) -> None:
        self._num_requests -= 1

    # --- told by the loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._await_head()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._head is None and not self._num_requests:
            self._await_head()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._write = self._loop.call_later(self._write_timeout_s, self._close, "took no answer")
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        _stop(self._write)
        self._write = None
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._write)
        self._head = self._write = None
        self._inner.connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self._loop.call_later(self._head_timeout_s, self._close, "sent no whole head")

    def _close(self, reason: str) -> None:
        if self._transport is not None:
            logger.info("a client %s in time: its connection is closed", reason)
            self._transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


@web.middleware
async def watched(request: web.Request, handler: Any) -> web.StreamResponse:
    """Tells the connection when a request of its begins and ends."""
    protocol = request.transport.get_protocol() if request.transport is not None else None
    connection = protocol if isinstance(protocol, Connection) else None
    if connection is not None:
        connection.begin()
    try:
        response: web.StreamResponse = await handler(request)
    finally:
        if connection is not None:
            connection.end()
    return response


async def listen(
    runner: web.AppRunner, *, host: str, port: int, head_timeout_s: float, write_timeout_s: float
) -> asyncio.Server:
    """Take connections of a runner that was set up."""
    make = runner.server
    assert make is not None, "the runner is set up first"

    def guarded() -> Connection:
        return Connection(make(), head_timeout_s, write_timeout_s)

    return await asyncio.get_running_loop().create_server(guarded, host, port, backlog=1024)
