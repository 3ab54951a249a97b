"""The engine's loop: read messages, step, send what came out."""

import time
from typing import TYPE_CHECKING

from toppings.engine.ends import error_output
from toppings.engine.engine import Engine
from toppings.messages import (
    AbortRequest,
    AddRequest,
    GetStats,
    PinAdapter,
    RemoveAdapter,
    Reply,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    Unreadable,
)

if TYPE_CHECKING:
    from toppings.engine.heartbeat import Heartbeat
    from toppings.engine.transport import EngineEnd

IDLE_POLL_S = 0.5
"""How long an idle loop waits for a message, and how often any loop looks whether its client still lives."""
LOADING_POLL_S = 0.001
"""How often requests that wait for a read or for room are tried again while nothing else runs."""


class EngineLoop:
    """Runs until a Shutdown was obeyed, or nobody is left to serve."""

    def __init__(self, engine: Engine, end: "EngineEnd", heart: "Heartbeat") -> None:
        self._engine = engine
        self._end = end
        self._heart = heart
        self._removals: list[RemoveAdapter] = []
        self._stop_at: float | None = None
        self._look_at = 0.0

    def run(self) -> None:
        self._end.send(self._engine.info)
        wait_s = 0.0
        while not self._is_over():
            self._heart.turn()
            self._receive(wait_s)
            outputs = self._engine.step()
            self._send(outputs)
            self._engine.poll()
            self._answer_removals()
            wait_s = self._wait_s(has_run=bool(outputs))
        self._send(self._engine.abort_all("the server is shutting down"))
        self._engine.close()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        return not self._engine.has_requests or time.monotonic() > self._stop_at

    def _wait_s(self, *, has_run: bool) -> float:
        if self._engine.has_running or has_run:
            return 0.0
        return LOADING_POLL_S if self._engine.has_requests or self._removals else IDLE_POLL_S

    def _receive(self, wait_s: float) -> None:
        """Handle all messages that are there; wait for the first one only."""
        while (message := self._end.receive(wait_s)) is not None:
            self._handle(message)
            wait_s = 0.0
        if time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + IDLE_POLL_S
            if self._heart.is_orphaned:
                self._stop_at = 0.0

    def _handle(self, message: ToEngine | Unreadable) -> None:
        match message:
            case Unreadable():
                self._refuse(message)
            case AddRequest():
                self._add(message)
            case AbortRequest():
                self._engine.abort(message.request_id)
            case RemoveAdapter():
                self._engine.adapters.request_removal(message.adapter_id)
                self._removals.append(message)
            case PinAdapter():
                self._end.send(self._pin(message))
            case GetStats():
                self._end.send(self._engine.stats(message.call_id, only_changes=True))
            case Shutdown():
                self._stop_at = time.monotonic() + message.deadline_s

    def _add(self, message: AddRequest) -> None:
        if self._stop_at is not None:
            self._send([error_output(message.request_id, "the server is shutting down")])
        elif (refusal := self._engine.add(message)) is not None:
            self._send([refusal])

    def _refuse(self, message: Unreadable) -> None:
        if message.request_id is not None:
            self._send([error_output(message.request_id, message.reason)])
        if message.call_id is not None:
            self._end.send(Reply(message.call_id, message.reason))

    def _pin(self, message: PinAdapter) -> Reply:
        try:
            self._engine.adapters.set_pinned(message.adapter_id, message.is_pinned)
        except ValueError as error:
            return Reply(message.call_id, str(error))
        return Reply(message.call_id)

    def _answer_removals(self) -> None:
        for removal in [r for r in self._removals if self._engine.is_removed(r.adapter_id)]:
            self._removals.remove(removal)
            self._end.send(Reply(removal.call_id))

    def _send(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._end.send(StepOutputs(outputs))
