"""The engine's client: what the HTTP server and `LLM` talk to. Needs neither torch nor a model."""

import asyncio
import contextlib
import itertools
import subprocess
import tempfile
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from toppings.config import EngineConfig
from toppings.core import (
    AbortRequest,
    AddRequest,
    Begin,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    GetStats,
    PinAdapter,
    RemoveAdapter,
    Reply,
    RequestError,
    RequestOutput,
    SamplingParams,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from toppings.engine.process import EngineLog, spawn_engine
from toppings.engine.transport import ClientEnd

LIVENESS_POLL_S = 0.1
EXIT_TIMEOUT_S = 10.0


class EngineDeadError(RuntimeError):
    """The engine has gone; what was asked of it will not be answered."""


class EngineStartError(RuntimeError):
    """The engine could not start; the message says why."""


class EngineClient:
    """One asyncio client of one engine. Each request and each call gets exactly one final answer."""

    def __init__(self, end: ClientEnd, is_engine_alive: Callable[[], bool]) -> None:
        self.died = asyncio.Event()
        self._end = end
        self._is_engine_alive = is_engine_alive
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._streams: dict[str, asyncio.Queue[RequestOutput | None]] = {}
        self._pending: set[str] = set()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
        self._cleanup = contextlib.ExitStack()

    @classmethod
    async def start(
        cls, config: EngineConfig, *, after: Awaitable[object] | None = None, log: EngineLog | None = None
    ) -> "EngineClient":
        """Spawn an engine process and wait until it is ready.

        It reads the model at once, but the registry only when `after` is done. Raises EngineStartError with
        its reason, or what `after` raises.
        """
        directory = tempfile.TemporaryDirectory(prefix="toppings-")
        address = f"ipc://{Path(directory.name) / 'engine'}"
        end = ClientEnd(address)
        process = spawn_engine(config, address, log or EngineLog())
        client = cls(end, lambda: process.poll() is None)
        client._cleanup.callback(directory.cleanup)
        client._cleanup.callback(end.close)
        client._cleanup.callback(_reap, process)
        try:
            if after is not None:
                await after
            end.send(Begin())
            await client._ready
        except BaseException:
            process.terminate()
            client._ready.cancel()
            await client.shutdown(0.0)
            raise
        return client

    @property
    def info(self) -> EngineReady:
        return self._ready.result()

    @property
    def is_alive(self) -> bool:
        return not self.died.is_set()

    @property
    def num_pending(self) -> int:
        """Requests that have had no output yet."""
        return len(self._pending)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapter_id: int | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as the engine draws tokens; closing the iterator early aborts the request.

        Raises EngineDeadError where the engine goes away, RequestError for a request id already in use.
        """
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._streams:
            raise RequestError(f"request id {request_id!r} is already in use")
        self._check_alive()
        stream = self._streams[request_id] = asyncio.Queue()
        self._pending.add(request_id)
        self._end.send(AddRequest(request_id, prompt_token_ids, sampling, adapter_id))
        has_ended = False
        try:
            while not has_ended:
                output = await stream.get()
                if output is None:
                    raise EngineDeadError("the engine has died; the request was not finished")
                has_ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request_id]
            self._pending.discard(request_id)
            if not has_ended and self.is_alive:
                self._end.send(AbortRequest(request_id))

    async def remove_adapter(self, adapter_id: int) -> None:
        """Returns when the adapter's requests have ended and its memory is free."""
        await self._call(lambda call_id: RemoveAdapter(call_id, adapter_id))

    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None:
        """Raises RequestError where it cannot be pinned."""
        await self._call(lambda call_id: PinAdapter(call_id, adapter_id, is_pinned))

    async def stats(self) -> EngineStats:
        stats: EngineStats = await self._call(GetStats)
        return stats

    async def shutdown(self, deadline_s: float) -> None:
        """Let running requests finish, cut what is left after `deadline_s` seconds, end the engine."""
        if self.is_alive:
            self._end.send(Shutdown(deadline_s))
            await self.died.wait()
        for task in self._tasks:
            task.cancel()
        self._cleanup.close()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")

    async def _call(self, make_message: Callable[[int], ToEngine]) -> Any:
        self._check_alive()
        call_id = next(self._call_ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self._end.send(make_message(call_id))
        try:
            return await future
        finally:
            del self._calls[call_id]

    async def _receive(self) -> None:
        while True:
            self._dispatch(await self._end.receive())

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    self._pending.discard(output.request_id)
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.put_nowait(output)
            case EngineStats():
                self._resolve(message.call_id, message)
            case Reply():
                error = None if message.error is None else RequestError(message.error)
                self._resolve(message.call_id, None, error)
            case EngineReady():
                self._ready.set_result(message)
            case EngineFailed():
                self._ready.set_exception(EngineStartError(message.reason))

    def _resolve(self, call_id: int, result: object, error: Exception | None = None) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    async def _watch(self) -> None:
        """Notice the engine's end, and tell everyone who still waits for it."""
        while self._is_engine_alive():
            await asyncio.sleep(LIVENESS_POLL_S)
        await asyncio.sleep(LIVENESS_POLL_S)  # its last messages may still be on their way
        self.died.set()
        if not self._ready.done():
            self._ready.set_exception(
                EngineStartError("the engine's process ended while it started; see its log")
            )
        for stream in self._streams.values():
            stream.put_nowait(None)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError("the engine has died"))


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was told to end; one that does not is killed."""
    try:
        process.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
