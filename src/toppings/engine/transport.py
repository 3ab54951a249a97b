"""Messages between an engine and its client: over ZeroMQ where they are two processes, over queues in one.

Each end has `send` and a receive that suits its side: the engine's blocks with a time-out, the client's is a
coroutine. Both forms keep order and lose nothing.
"""

import asyncio
import queue
from typing import Any, Protocol

import msgspec

from toppings import core
from toppings.core import FromEngine, ToEngine

_CLASSES: dict[bytes, Any] = {
    cls.__name__.encode(): cls
    for cls in (
        core.Begin,
        core.AddRequest,
        core.AbortRequest,
        core.RemoveAdapter,
        core.PinAdapter,
        core.GetStats,
        core.Shutdown,
        core.StepOutputs,
        core.Reply,
        core.EngineStats,
        core.EngineReady,
        core.EngineFailed,
    )
}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {name: msgspec.msgpack.Decoder(cls) for name, cls in _CLASSES.items()}


def encode(message: ToEngine | FromEngine) -> list[bytes]:
    """Two frames: the message's class name, and its fields as MessagePack."""
    return [type(message).__name__.encode(), _ENCODER.encode(message)]


def decode(frames: list[bytes]) -> ToEngine | FromEngine:
    name, payload = frames
    message: ToEngine | FromEngine = _DECODERS[name].decode(payload)
    return message


class EngineEnd(Protocol):
    """What the engine's loop reads and writes."""

    def receive(self, timeout_s: float) -> ToEngine | None:
        """The next message; None where none came within `timeout_s` (0: only what is there already)."""

    def send(self, message: FromEngine) -> None: ...


class ClientEnd(Protocol):
    """What the client reads and writes."""

    async def receive(self) -> FromEngine: ...

    def send(self, message: ToEngine) -> None: ...

    def close(self) -> None: ...


class QueueEngineEnd:
    def __init__(self, client: "QueueClientEnd", loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop

    def receive(self, timeout_s: float) -> ToEngine | None:
        try:
            return self._client.outgoing.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None

    def send(self, message: FromEngine) -> None:
        try:
            self._loop.call_soon_threadsafe(self._client.incoming.put_nowait, message)
        except RuntimeError:  # the client's event loop is closed: nobody is left to hear it
            return


class QueueClientEnd:
    def __init__(self) -> None:
        self.outgoing: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.incoming: asyncio.Queue[FromEngine] = asyncio.Queue()

    async def receive(self) -> FromEngine:
        return await self.incoming.get()

    def send(self, message: ToEngine) -> None:
        self.outgoing.put(message)

    def close(self) -> None:
        """Queues need no closing."""
