"""Messages between an engine's process and its client: one ZeroMQ pair over a UNIX socket.

Each end has `send` and a receive that suits its side: the engine's blocks with a time-out, the client's is a
coroutine. Order is kept and nothing is lost.
"""

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from toppings import messages
from toppings.bad_input import RequestError
from toppings.messages import FromEngine, ToEngine, Unreadable

_CLASSES: dict[bytes, Any] = {
    cls.__name__.encode(): cls
    for cls in (
        messages.Begin,
        messages.AddRequest,
        messages.AbortRequest,
        messages.RemoveAdapter,
        messages.PinAdapter,
        messages.PrefetchAdapter,
        messages.GetStats,
        messages.Shutdown,
        messages.StepOutputs,
        messages.Reply,
        messages.EngineStats,
        messages.EngineReady,
        messages.EngineFailed,
    )
}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {name: msgspec.msgpack.Decoder(cls) for name, cls in _CLASSES.items()}


def encode(message: ToEngine | FromEngine) -> list[bytes]:
    """Two frames: the message's class name, and its fields as MessagePack.

    Raises RequestError, with the field's name, for a value that cannot be sent.
    """
    try:
        return [type(message).__name__.encode(), _ENCODER.encode(message)]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"{_culprit(message)} cannot be sent to the engine: {error}") from error


def _culprit(message: Any) -> str:
    """The innermost field that cannot be encoded."""
    for each in fields(message):
        value = getattr(message, each.name)
        try:
            _ENCODER.encode(value)
        except Exception:
            return _culprit(value) if hasattr(value, "__dataclass_fields__") else each.name
    return type(message).__name__


def decode(frames: list[bytes]) -> ToEngine | FromEngine:
    name, payload = frames
    message: ToEngine | FromEngine = _DECODERS[name].decode(payload)
    return message


class EngineEnd:
    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = _unbounded(self._context.socket(zmq.PAIR))
        self._socket.connect(address)

    def receive(self, timeout_s: float) -> ToEngine | Unreadable | None:
        """The next message; None where none came within `timeout_s` (0: only what is there already)."""
        if not self._socket.poll(int(timeout_s * 1e3)):
            return None
        frames = self._socket.recv_multipart()
        try:
            return decode(frames)  # type: ignore[return-value]
        except msgspec.DecodeError as error:
            values = msgspec.msgpack.decode(frames[1])
            return Unreadable(values.get("request_id"), values.get("call_id"), str(error))

    def send(self, message: FromEngine) -> None:
        self._socket.send_multipart(encode(message))

    def close(self, linger_ms: int = 2000) -> None:
        """Returns when the last messages have left, or after `linger_ms`."""
        self._socket.close(linger=linger_ms)
        self._context.term()


class ClientEnd:
    """Binds `address`; belongs to one event loop."""

    def __init__(self, address: str) -> None:
        """Raises OSError where the address cannot be bound."""
        self._context = zmq.asyncio.Context()
        try:
            self._socket = _unbounded(self._context.socket(zmq.PAIR))
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, os.strerror(error.errno or 0), address) from error

    async def receive(self) -> FromEngine:
        return decode(await self._socket.recv_multipart())  # type: ignore[return-value]

    def send(self, message: ToEngine) -> None:
        """Raises RequestError for a message that cannot be encoded."""
        self.prepare(message)()

    def prepare(self, message: ToEngine) -> Callable[[], object]:
        """Encodes, and returns what sends. Raises RequestError."""
        # Without a bound on queued messages a send never waits, so its future needs no await.
        return partial(self._socket.send_multipart, encode(message))

    def close(self) -> None:
        self._context.destroy(linger=0)


def _unbounded(socket: Any) -> Any:
    socket.set_hwm(0)
    return socket
