"""The engine's client: what the HTTP server and `LLM` talk to. Needs neither torch nor a model."""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from toppings.bad_input import RequestError
from toppings.config import EngineConfig
from toppings.core import ALONE, Standing
from toppings.engine.calls import Calls
from toppings.engine.life import EngineLife
from toppings.engine.process import EngineLog
from toppings.engine.spawn import Spawner
from toppings.messages import (
    AbortRequest,
    AdapterStatus,
    AddRequest,
    Begin,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    GetStats,
    PinAdapter,
    PrefetchAdapter,
    RemoveAdapter,
    Reply,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from toppings.sampling_params import SamplingParams

EXIT_GRACE_S = 5.0
"""How long an engine that was told to end may take beyond its deadline before it is killed."""
STEADY_S = 20.0
"""An engine that has served for so long begins the count of restarts in a row anew."""
MAX_RESTART_DELAY_S = 2.0

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine has gone; what was asked of it will not be answered. Another may come in its place."""


class EngineStartError(RuntimeError):
    """The engine could not start; the message says why."""


class EngineClient:
    """One asyncio client of an engine. Each request and each call gets exactly one final answer.

    An engine that dies, or hangs and is ended for it, is replaced up to `max_restarts` times in a row; who
    waits for it is told by EngineDeadError. `died` is set when no other will come, `down_reason` says why
    there is none now.
    """

    def __init__(self, config: EngineConfig, log: EngineLog, max_restarts: int, spawner: Spawner) -> None:
        self.died = asyncio.Event()
        self.down_reason = "the engine is starting"
        self.num_restarts = 0
        self._config = config
        self._log = log
        self._max_restarts = max_restarts
        self._num_in_a_row = 0
        self._spawner = spawner
        self._life: EngineLife | None = None
        self._first: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._may_begin = False
        self._kill_at = math.inf  # set when it is to be closed
        self._closing = asyncio.Event()
        self._changed = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[RequestOutput | EngineDeadError]] = {}
        self._pending: set[str] = set()
        self._calls = Calls()
        self._adapters: dict[int, AdapterStatus] = {}  # as the engine has told, change by change
        self._supervisor = asyncio.create_task(self._supervise())

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        after: Awaitable[object] | None = None,
        log: EngineLog | None = None,
        max_restarts: int = 0,
        spawner: Spawner | None = None,
    ) -> "EngineClient":
        """Spawn an engine process and wait until it is ready; `spawner`: one that was prepared for it, which
        is closed with the client.

        It reads the model at once, but the registry only when `after` is done. Raises EngineStartError with
        its reason, or what `after` raises.
        """
        spawner = spawner or Spawner(stays=max_restarts > 0)
        client = cls(config, log or EngineLog(), max_restarts, spawner)
        try:
            if after is not None:
                await after
            client._begin()
            await asyncio.shield(client._first)
        except BaseException:
            client._close_at(0.0)
            await client.shutdown(0.0)
            raise
        return client

    @property
    def info(self) -> EngineReady:
        return self._first.result()

    @property
    def is_alive(self) -> bool:
        """There is an engine that takes requests."""
        return self._life is not None and self._life.ready is not None and not self.died.is_set()

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
        cache_salt: str | None = None,
        standing: Standing = ALONE,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as the engine draws tokens; closing the iterator early aborts the request. With a
        `cache_salt`, its tokens are shared with requests of the same salt only.

        Raises EngineDeadError where the engine goes away, RequestError for a request id already in use, a bad
        salt or a value that no message can carry.
        """
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._streams:
            raise RequestError(f"request id {request_id!r} is already in use")
        life = self._alive()
        message = AddRequest(
            request_id, prompt_token_ids, sampling, adapter_id, cache_salt, standing=standing
        )
        send = life.prepare(message)
        stream = self._streams[request_id] = asyncio.Queue()
        self._pending.add(request_id)
        has_ended = False
        try:
            send()
            while not has_ended:
                output = await stream.get()
                if isinstance(output, EngineDeadError):
                    raise output
                has_ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request_id]
            self._pending.discard(request_id)
            if not has_ended and life is self._life:
                life.send(AbortRequest(request_id))

    async def remove_adapter(self, adapter_id: int) -> None:
        """Returns when the adapter's requests have ended and its memory is free. An engine that dies has done
        with both, but the one that takes its place may have begun with the adapter: it is asked again."""
        while not self.died.is_set():
            with suppress(EngineDeadError):
                await self._until_changed()
                await self._call(lambda call_id: RemoveAdapter(call_id, adapter_id))
                return

    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None:
        """Raises RequestError where it cannot be pinned, EngineDeadError."""
        await self._call(lambda call_id: PinAdapter(call_id, adapter_id, is_pinned))

    async def prefetch_adapter(self, adapter_id: int) -> None:
        """Returns when its read is queued, where it is not in host memory. Raises as `pin_adapter`."""
        await self._call(lambda call_id: PrefetchAdapter(call_id, adapter_id))

    async def stats(self) -> EngineStats:
        """Raises EngineDeadError."""
        stats: EngineStats = await self._call(GetStats)
        return stats

    async def shutdown(self, deadline_s: float) -> None:
        """Let running requests finish, cut what is left after `deadline_s` seconds, end the engine; one that
        does not end itself is killed, so that this returns within `deadline_s` and some seconds."""
        self._close_at(asyncio.get_running_loop().time() + deadline_s + EXIT_GRACE_S)
        if self._life is not None:
            self._life.send(Shutdown(deadline_s))
        await asyncio.shield(self._supervisor)

    # --- asking ---

    def _alive(self) -> EngineLife:
        """Raises EngineDeadError where there is no engine that takes requests."""
        if self._life is None or self._life.ready is None or self.died.is_set():
            raise EngineDeadError(self.down_reason)
        return self._life

    async def _call(self, make_message: Callable[[int], ToEngine]) -> Any:
        life = self._alive()
        return await self._calls.ask(lambda call_id: life.send(make_message(call_id)))

    async def _until_changed(self) -> None:
        """Returns when there is an engine, or none will come."""
        while not (self.is_alive or self.died.is_set()):
            self._changed.clear()
            await self._changed.wait()

    # --- one engine after another ---

    async def _supervise(self) -> None:
        """Until the last one; everyone who waits for one that has gone is told."""
        reason = "the engine's supervisor has failed"
        try:
            while True:
                reason = await self._live()
                if not self._may_restart():
                    break
                self._num_in_a_row += 1
                self.num_restarts += 1
                self._tell(f"the engine is restarting: {reason}")
                which = f"restart {self._num_in_a_row} of at most {self._max_restarts} in a row"
                logger.error("%s; another engine takes its place (%s)", reason, which)
                await self._pause(min(self._num_in_a_row - 1, MAX_RESTART_DELAY_S))
        except Exception:
            logger.exception("the engine's supervisor has failed")
        finally:
            if not self._closing.is_set():
                logger.error("%s", reason)
            self._tell(f"the engine has died: {reason}")
            self.died.set()
            self._changed.set()
            if not self._first.done():
                self._first.set_exception(EngineStartError(reason))
                self._first.exception()  # nobody may be left to take it
            self._spawner.close()

    async def _live(self) -> str:
        """One engine from start to end; what became of it."""
        is_first = not self._first.done()
        try:
            life = EngineLife(self._spawner, self._config, self._log, self._dispatch, is_first=is_first)
        except OSError as error:
            return f"the engine's process cannot be started: {error}"
        self._life, life.kill_at = life, self._kill_at
        self._adapters.clear()
        if self._may_begin:
            life.send(Begin())
        try:
            return await life.run()
        finally:
            self._life = None
            if asyncio.get_running_loop().time() > life.ready_at + STEADY_S:
                self._num_in_a_row = 0

    def _begin(self) -> None:
        self._may_begin = True
        if self._life is not None:
            self._life.send(Begin())

    def _may_restart(self) -> bool:
        has_begun = self._first.done() and not self._first.cancelled()
        return has_begun and not self._closing.is_set() and self._num_in_a_row < self._max_restarts

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    def _close_at(self, instant: float) -> None:
        """No engine takes the place of this one, which is killed at `instant` if it has not ended."""
        self._closing.set()
        self._kill_at = min(self._kill_at, instant)
        if self._life is not None:
            self._life.kill_at = self._kill_at

    def _tell(self, reason: str) -> None:
        self.down_reason = reason
        self._pending.clear()
        for stream in self._streams.values():
            stream.put_nowait(EngineDeadError(reason))
        self._calls.fail_all(lambda: EngineDeadError(reason))

    # --- what the engine says ---

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                for output in message.outputs:
                    self._pending.discard(output.request_id)
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.put_nowait(output)
            case EngineStats():
                self._calls.answer(message.call_id, self._whole(message))
            case Reply():
                error = None if message.error is None else RequestError(message.error)
                self._calls.answer(message.call_id, None, error)
            case EngineReady():
                self._note_ready(message)
            case EngineFailed():
                if self._life is not None:
                    self._life.failure = message.reason

    def _note_ready(self, message: EngineReady) -> None:
        assert self._life is not None
        self._life.note_ready(message)
        logger.info("%s is ready", self._life.name)
        self.down_reason = ""
        self._changed.set()
        if not self._first.done():
            self._first.set_result(message)

    def _whole(self, stats: EngineStats) -> EngineStats:
        """With all adapters, of which the engine tells those that have changed since it was last asked."""
        for status in stats.adapters:
            if status.is_anywhere:
                self._adapters[status.adapter_id] = status
            else:
                self._adapters.pop(status.adapter_id, None)
        counters = {**stats.counters, "engine_restarts": self.num_restarts}
        adapters = [self._adapters[adapter_id] for adapter_id in sorted(self._adapters)]
        return replace(stats, adapters=adapters, counters=counters)
