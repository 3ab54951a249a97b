"""One engine from its start to its end, watched: what it sends, whether it lives, whether it gets on."""

import asyncio
import math
from collections.abc import Callable
from contextlib import ExitStack

from toppings.config import EngineConfig
from toppings.engine.heartbeat import LOOK_S
from toppings.engine.meeting_place import MeetingPlace
from toppings.engine.process import EngineLog
from toppings.engine.spawn import Spawner
from toppings.engine.transport import ClientEnd
from toppings.messages import AddRequest, EngineReady, FromEngine, ToEngine

KILL_GRACE_S = 2.0
"""How long a process that was killed may take to go; beyond that, nobody waits for it."""
FORK_TIMEOUT_S = 10.0
"""A process that has forked an engine before does so again within this time, or is given up."""
START_SILENCE_S = 120.0
"""How long an engine that takes another's place may give no sign of life while it starts: imports and
compilers hold the interpreter."""
PARTS_GRACE_S = 15.0
"""A split model's lead finds out by itself which part hangs."""


class EngineLife:
    """`ready`, `failure`: what the engine has told of itself, set by whoever reads its messages."""

    def __init__(
        self,
        spawner: Spawner,
        config: EngineConfig,
        log: EngineLog,
        on_message: Callable[[FromEngine], None],
        *,
        is_first: bool,
    ) -> None:
        """Begins to start a process. Raises OSError where there can be none; nothing is left then."""
        self.ready: EngineReady | None = None
        self.ready_at = math.inf
        self.failure = ""
        self.kill_at = math.inf
        self._config = config
        self._is_first = is_first
        self._on_message = on_message
        self._place = MeetingPlace.make("engine")
        with ExitStack() as undo:
            undo.callback(self._place.close)
            address = f"ipc://{self._place.path / 'engine'}"
            self._end = ClientEnd(address)
            undo.callback(self._end.close)
            self._process = spawner.spawn(config, address, log)
            undo.pop_all()

    @property
    def name(self) -> str:
        """For messages: "the engine's process 123"."""
        return self._process.name

    def send(self, message: ToEngine) -> None:
        """Raises RequestError for a message that cannot be encoded."""
        self._end.send(message)

    def prepare(self, request: AddRequest) -> Callable[[], object]:
        """Encodes a request, and returns what sends it. Raises RequestError."""
        return self._end.prepare(request)

    def note_ready(self, info: EngineReady) -> None:
        self.ready, self.ready_at = info, asyncio.get_running_loop().time()
        self._place.close()  # both are connected

    async def run(self) -> str:
        """Until the process has ended, by itself or by force; says what became of it."""
        receiving = asyncio.create_task(self._receive())
        pulse, verdict = self._process.pulse, None
        try:
            while not pulse.has_ended and verdict is None:
                await asyncio.sleep(LOOK_S)
                pulse.look()
                verdict = self._verdict(receiving)
            if not pulse.has_ended:
                await self._kill()
            await asyncio.sleep(LOOK_S)  # its last messages may still be on their way
            how = self._process.how_it_ended() + ("" if self.ready else " while it started; see its log")
            return self.failure or verdict or how
        finally:
            receiving.cancel()
            self._end.close()
            self._place.close()
            pulse.close()

    async def _receive(self) -> None:
        while True:
            self._on_message(await self._end.receive())

    def _verdict(self, receiving: "asyncio.Task[None]") -> str | None:
        """Why it is to be ended; None while all is well."""
        pulse, name = self._process.pulse, self.name
        if pulse.has_ended:
            return None
        if asyncio.get_running_loop().time() > self.kill_at:
            return f"{name} did not end when it was told to, and was killed"
        if receiving.done():
            return f"{name} sent what cannot be read ({receiving.exception()!r}), and was killed"
        if (reason := self._why_given_up()) is not None:
            return f"{name} {reason}, and was killed"
        bound_s = self._config.step_timeout_s or math.inf
        if self._stuck_s > bound_s + PARTS_GRACE_S * (self._config.tensor_parallel_size > 1):
            return f"{name} hangs in a step, for more than {bound_s:g} s (step_timeout_s), and was killed"
        return None

    @property
    def _stuck_s(self) -> float:
        """Since its loop last turned; a start, however long, is no turn that hangs."""
        return min(self._process.pulse.stuck_s, asyncio.get_running_loop().time() - self.ready_at)

    def _why_given_up(self) -> str | None:
        pulse, waits_for_fork = self._process.pulse, self._waits_for_fork
        if waits_for_fork or self._config.heartbeat_timeout_s:
            return pulse.why_given_up(FORK_TIMEOUT_S if waits_for_fork else self._silence_bound_s())
        return None

    @property
    def _waits_for_fork(self) -> bool:
        return self._process.pulse.pid is None and self._process.is_of_warm

    def _silence_bound_s(self) -> float:
        """None at all for a first start, whose imports and compilations may take long."""
        bound_s = self._config.heartbeat_timeout_s
        if self.ready is not None:
            return bound_s
        return math.inf if self._is_first else max(bound_s, START_SILENCE_S)

    async def _kill(self) -> None:
        self._process.kill()
        pulse, loop = self._process.pulse, asyncio.get_running_loop()
        give_up_at = loop.time() + KILL_GRACE_S
        while not pulse.has_ended and loop.time() < give_up_at:
            await asyncio.sleep(LOOK_S)
            pulse.look()
