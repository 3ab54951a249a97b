"""The transport between two processes: one ZeroMQ pair over a UNIX socket."""

from typing import Any

import zmq
import zmq.asyncio

from toppings.core import FromEngine, ToEngine
from toppings.engine.transport import decode, encode


class ZmqEngineEnd:
    def __init__(self, address: str) -> None:
        self._socket = _unbounded(zmq.Context.instance().socket(zmq.PAIR))
        self._socket.connect(address)

    def receive(self, timeout_s: float) -> ToEngine | None:
        if not self._socket.poll(int(timeout_s * 1e3)):
            return None
        return decode(self._socket.recv_multipart())  # type: ignore[return-value]

    def send(self, message: FromEngine) -> None:
        self._socket.send_multipart(encode(message))

    def close(self, linger_ms: int = 2000) -> None:
        """Wait up to `linger_ms` for the last messages to leave."""
        self._socket.close(linger=linger_ms)


class ZmqClientEnd:
    """Binds `address`; belongs to one event loop."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = _unbounded(self._context.socket(zmq.PAIR))
        self._socket.bind(address)

    async def receive(self) -> FromEngine:
        return decode(await self._socket.recv_multipart())  # type: ignore[return-value]

    def send(self, message: ToEngine) -> None:
        # Without a bound on queued messages a send never waits, so its future needs no await.
        self._socket.send_multipart(encode(message))

    def close(self) -> None:
        self._context.destroy(linger=0)


def _unbounded(socket: Any) -> Any:
    socket.set_hwm(0)
    return socket
