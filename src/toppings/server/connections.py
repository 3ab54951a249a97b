"""Connections: how many there may be, and how long each may take to say something or to hear us out.

uvicorn's protocols bound none of that: a client could hold a connection without ever sending a request, or
leave an answer unread for ever. Both protocols that it knows are extended in the same way.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from toppings.open_files import raise_file_limit
from toppings.server.limits import MAX_HEAD_BYTES, MAX_URL_BYTES
from toppings.server.upgrades import UpgradeFilter

logger = logging.getLogger(__name__)

RESERVED_FILES = 256
"""Of what the process may open: the rest is for connections."""
MAX_CONNECTIONS = 16_384
FREE_FOR_S = 1.0
"""A connection that has been silent for less is not closed to make room: its request may be on its way."""

if TYPE_CHECKING:

    class _Base:
        """What is used of uvicorn's protocols."""

        cycle: Any
        transport: Any
        flow: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def connection_made(self, transport: Any) -> None: ...
        def connection_lost(self, exc: Exception | None) -> None: ...
        def data_received(self, data: bytes) -> None: ...
        def on_message_begin(self) -> None: ...
        def on_message_complete(self) -> None: ...
        def on_response_complete(self) -> None: ...
        def pause_writing(self) -> None: ...
        def resume_writing(self) -> None: ...
else:
    _Base = object


def raise_connection_limit() -> int:
    """Let this process open as many files as it may; returns how many of them connections may be."""
    num_files = raise_file_limit()
    return MAX_CONNECTIONS if num_files is None else max(1, min(MAX_CONNECTIONS, num_files - RESERVED_FILES))


class Connections:
    """All connections of one server by what they wait for, the longest waiting first; `sweep` is called ten
    times a second.

    `silent` ones owe us the rest of a head, `idle` ones are kept alive between two requests, `unread`
    ones hold an answer that the client does not take. Values are instants of `time.monotonic`.
    """

    def __init__(self, *, max_open: int, receive_timeout_s: float, send_timeout_s: float) -> None:
        self.max_open = max_open
        self.receive_timeout_s = receive_timeout_s
        self.send_timeout_s = send_timeout_s
        self.num_open = 0
        self.silent: dict[Bounded, float] = {}
        self.idle: dict[Bounded, float] = {}
        self.unread: dict[Bounded, float] = {}

    def protocol(self, *args: Any, **kwargs: Any) -> "Bounded":
        """What uvicorn calls for a new connection."""
        protocol: Bounded = BoundedProtocol(self, *args, **kwargs)
        return protocol

    def make_room(self) -> bool:
        """Whether one more may stay; closes the one that has been silent longest where there are too many."""
        if self.num_open <= self.max_open:
            return True
        now = time.monotonic()
        for waiting in (self.silent, self.idle):
            oldest, since = next(iter(waiting.items()), (None, now))
            if oldest is not None and now - since >= FREE_FOR_S:
                oldest.drop()
                return True
        return False

    def sweep(self) -> None:
        """Close what has waited for too long."""
        now = time.monotonic()
        for protocol in _since_before(self.silent, now - self.receive_timeout_s):
            protocol.time_out()
        for protocol in _since_before(self.unread, now - self.send_timeout_s):
            logger.info("a client left its answer unread for %g s and is dropped", self.send_timeout_s)
            protocol.drop()

    def forget(self, protocol: "Bounded") -> None:
        for waiting in (self.silent, self.idle, self.unread):
            waiting.pop(protocol, None)


def _since_before(waiting: "dict[Bounded, float]", instant: float) -> "list[Bounded]":
    """Dictionaries keep the order in which entries came, so the first young enough ends the search."""
    found = []
    for protocol, since in waiting.items():
        if since > instant:
            break
        found.append(protocol)
    return found


class Bounded(_Base):
    """A base before one of uvicorn's protocols: tells `Connections` what the connection waits for."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._all = connections
        self._num_head_bytes = 0
        self._is_refused = False
        self._upgrades = UpgradeFilter()
        self._is_between = False  # two requests, as the parser tells

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._all.num_open += 1
        if self._all.make_room():
            self._all.silent[self] = time.monotonic()
        else:
            self._refuse(503, "Service Unavailable", "the server has as many connections as it can hold")
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.num_open -= 1
        self._all.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._all.idle.pop(self, None) is not None:
            self._all.silent[self] = time.monotonic()
        if self._is_between and self._upgrades.is_done:
            self._upgrades = UpgradeFilter()
        if passed := self._upgrades.pass_on(data):
            super().data_received(passed)
        if self._is_busy:
            self._all.silent.pop(self, None)
            self._num_head_bytes = 0
        elif self in self._all.silent and not self._is_discarding:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES + MAX_URL_BYTES:
                self._refuse(431, "Request Header Fields Too Large", "the request's head is too large")

    def on_message_begin(self) -> None:
        self._is_between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._is_between = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif not self._is_busy:
            waiting = self._all.silent if self._is_discarding else self._all.idle
            waiting[self] = time.monotonic()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._all.unread[self] = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all.unread.pop(self, None)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def time_out(self) -> None:
        """A head that was begun is told so; one that never was is just closed."""
        if self._num_head_bytes and not self._is_refused:
            self._refuse(408, "Request Timeout", "the request's head did not come in time")
        else:
            self.drop()

    def drop(self) -> None:
        self._all.forget(self)
        self.transport.abort()

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_discarding(self) -> bool:
        """Answered before its body had come; what still comes of that is read and thrown away."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
        )
        self.transport.write(f"{head}content-length: {len(message)}\r\n\r\n{message}".encode())
        self._linger()

    def _linger(self) -> None:
        """A connection that is closed with bytes unread is reset, and its last answer lost: what still comes
        is thrown away until the client closes, or is dropped as one that has been silent."""
        self._is_refused = True
        self._all.forget(self)
        self._all.silent[self] = time.monotonic()
        self.transport.write_eof()

    def _close(self) -> None:
        """Closing waits until all has been written, which the client may never let happen."""
        self._all.forget(self)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._all.unread[self] = time.monotonic()


BoundedProtocol: Any = type("BoundedProtocol", (Bounded, AutoHTTPProtocol), {})
