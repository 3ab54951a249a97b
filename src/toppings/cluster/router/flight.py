"""Inference requests on their way, from a call to its end."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.instances import BoolArray
from toppings.cluster.report import LeftEntry
from toppings.cluster.router.calls import POOLED_PATHS, TOKEN_PATHS, Call
from toppings.cluster.router.directory import AdapterInfo
from toppings.cluster.router.meters import Meters
from toppings.cluster.snapshot import Choice, RequestSnapshot
from toppings.dashboard.recent import Recent
from toppings.exchanges.request_log import milliseconds
from toppings.tenants.account import Place
from toppings.tracing import Span

MAX_MOVES = 3
MAX_LEFT = 4096
"""Requests whose clients have left, of which servers may still tell what they came to."""


@dataclass(slots=True, eq=False)
class Flight:
    """`deadline` is set while it has no token yet: only then can it go elsewhere. `idle` is set while it
    waits for more of a stream that has begun; `heard_at` is when it began to wait, by the loop's clock.
    `num_tokens` is the length of its answer once that is whole. `tried` are the servers that gave it none.
    `place` is what it takes of its tenant's limits. `client_id` is the id that client and servers know it by.
    `is_reusing` a connection that was idle: its server may just have closed it.

    For the log: `server` is the one that it was sent to last, at `sent_at`, and `why`, where `tells_why`;
    `first_at`: the first bytes of its stream (both of `time.perf_counter`); `num_streamed` tokens so far.
    """

    call: Call
    request: RequestSnapshot
    place: Place
    instance_id: str = ""
    deadline: asyncio.Timeout | None = None
    idle: asyncio.Timeout | None = None
    heard_at: float = 0.0
    move_to: str | None = None
    num_moves: int = 0
    tried: set[str] = field(default_factory=set)
    received_at: float = field(default_factory=time.monotonic)
    num_tokens: int | None = None
    is_cut: bool = False
    client_id: str = ""
    has_begun: bool = False
    is_reusing: bool = False
    span: Span = field(default_factory=Span)  # of the request
    attempt: Span = field(default_factory=Span)  # of the server that is tried
    server: str = ""
    why: str = ""
    tells_why: bool = False
    num_attempts: int = 0
    sent_at: float | None = None
    first_at: float | None = None
    num_streamed: int = 0

    @property
    def num_answered(self) -> int:
        """Tokens of its answer, as far as they are known."""
        return self.num_streamed if self.num_tokens is None else self.num_tokens

    @property
    def num_counted(self) -> tuple[int, int] | None:
        """Tokens of its prompt, once an answer has begun, and of the answer; None where it generates none."""
        if self.call.path in TOKEN_PATHS:
            return None
        return (self.place.prompt_tokens if self.has_begun else 0), self.num_answered

    def measured(self, started_at: float) -> dict[str, Any]:
        """For its line of the log: times in ms since `started_at`."""

        def since_start(instant: float | None) -> float | None:
            return None if instant is None else milliseconds(instant - started_at)

        num_tokens = self.num_answered
        tpt_s = (time.perf_counter() - started_at) / num_tokens if num_tokens else None
        return {
            "server": self.server or None,
            "why": self.why or None,
            "attempts": self.num_attempts,
            "moves": self.num_moves,
            "prompt_tokens": self.place.prompt_tokens,
            "completion_tokens": num_tokens,
            "wait_ms": since_start(self.sent_at),
            "ttft_ms": since_start(self.first_at),
            "tpt_ms": None if tpt_s is None else milliseconds(tpt_s),
        }

    def may_move_to(self, instance_id: str) -> bool:
        """Whether it waits for its first token, was not moved too often and had no refusal there."""
        is_waiting = self.deadline is not None and self.call.is_stream
        return is_waiting and self.num_moves < MAX_MOVES and instance_id not in self.tried

    def name_of(self, instance_id: str) -> str:
        """Of a server, for who asks: where servers are is not for tenants to know."""
        return instance_id if self.place.account.tenant.is_admin else "a server"

    def settle(self, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """With its tenant, by what the answer says; calls that generate nothing are not counted."""
        if self.call.path not in TOKEN_PATHS:
            self.place.settle(prompt_tokens, answer_tokens)

    @property
    def is_drawn(self) -> bool:
        """A server draws tokens for it."""
        return bool(self.instance_id) and self.call.path not in (*TOKEN_PATHS, *POOLED_PATHS)

    def interrupt(self) -> None:
        """End the wait for the first token at once; the request is then tried elsewhere."""
        end_wait(self.deadline)

    def hurry(self, limit_s: float) -> None:
        """Wait no longer than this for more of the stream: its server has fallen silent."""
        if self.idle is not None:
            end_wait(self.idle, at=self.heard_at + limit_s)


class Flights:
    """All of them: made, placed on a server and ended there, maybe on one after the other."""

    def __init__(self, dispatcher: Dispatcher, meters: Meters, recent: Recent) -> None:
        self._dispatcher, self._meters, self._recent = dispatcher, meters, recent
        self._on: dict[str, dict[str, Flight]] = {}  # servers that have any
        self._num_made = 0
        # By server, tenant and the id that all know, which is the client's to choose: several may have one.
        self._left: dict[tuple[str, str, str], deque[Place]] = {}
        self._num_left = 0
        self._last_left: dict[str, int] = {}  # by server, the last that it told of

    def __len__(self) -> int:
        return sum(map(len, self._on.values()))

    def __iter__(self) -> Iterator[Flight]:
        return (flight for there in self._on.values() for flight in there.values())

    def on(self, instance_id: str) -> list[Flight]:
        """Those that a server has."""
        return list(self._on.get(instance_id, {}).values())

    def make(
        self, call: Call, adapter: AdapterInfo | None, place: Place, *, is_batch: bool = False
    ) -> Flight:
        """`adapter` is None where the call is for a base model."""
        self._num_made += 1
        request = RequestSnapshot(
            request_id=str(self._num_made),
            adapter=call.model if adapter else None,
            rank=adapter.rank if adapter else 0,
            prompt_tokens=call.prompt_tokens,
            response_tokens=self._dispatcher.lengths.expected(call.max_tokens or np.inf),
            adapter_bytes=adapter.num_bytes if adapter else 0,
            blocks=call.blocks,
            block_tokens=call.block_tokens,
            is_batch=is_batch,
        )
        return Flight(call, request, place)

    def place(
        self, flight: Flight, among: BoolArray, *, within_slo: bool = False, is_held: bool = False
    ) -> Choice | None:
        """Where it goes now, and counts until `end`. One that does not stream never shows its start: it
        counts as running. None where no server of these [N] is open. A batch request, and with `within_slo`
        any, gets no instance where the choice breaks the objectives.
        """
        started_at, request = time.perf_counter(), flight.request
        flight.move_to = None
        now = time.monotonic()
        choice = self._dispatcher.place(request, now, among=among, within_slo=within_slo)
        if not is_held:
            self._meters.decision_seconds.observe(time.perf_counter() - started_at)
        if choice is None or self._dispatcher.place_of(request.request_id) is None:
            return choice
        if choice.breaks_slo:
            self._meters.slo_at_risk.inc()
        if not flight.call.is_stream:
            self._dispatcher.started(request.request_id)
        flight.instance_id = flight.server = choice.instance_id
        flight.num_attempts, flight.sent_at = flight.num_attempts + 1, time.perf_counter()
        self._on.setdefault(choice.instance_id, {})[request.request_id] = flight
        self._meters.sent.labels(choice.instance_id).inc()
        self._meters.in_flight.labels(choice.instance_id).inc()
        return choice

    def start(self, flight: Flight) -> None:
        """The first bytes of its answer are there."""
        if flight.call.is_stream:
            self._dispatcher.started(flight.request.request_id)
        flight.place.start()
        flight.has_begun = True
        first_byte_s = time.monotonic() - flight.received_at
        self._meters.first_byte_seconds.observe(first_byte_s)
        self._recent.note_prompt(flight.request.prompt_tokens)
        if flight.call.is_stream:
            flight.first_at = time.perf_counter()
            self._recent.note_ttft(first_byte_s)

    def grow(self, flight: Flight, num_tokens: int) -> None:
        flight.num_streamed += num_tokens
        flight.place.spend(num_tokens)
        self._recent.note_tokens(num_tokens)
        self._dispatcher.grown(flight.request.request_id, num_tokens)

    def end(self, flight: Flight) -> None:
        """It has left the server, however it went."""
        there = self._on[flight.instance_id]
        del there[flight.request.request_id]
        if not there:
            del self._on[flight.instance_id]
        self._dispatcher.ended(flight.request.request_id, flight.num_tokens, now=time.monotonic())
        if flight.num_tokens:
            self._recent.note_tpt((time.monotonic() - flight.received_at) / flight.num_tokens)
            if not flight.call.is_stream:
                self._recent.note_tokens(flight.num_tokens)
        self._meters.in_flight.labels(flight.instance_id).dec()
        flight.instance_id = ""

    def leave(self, flight: Flight) -> None:
        """Its client is gone. What a whole answer has come to by then, its server tells later, if it is of
        ours: until then it counts as the mean of the answers before it, up to its `max_tokens`."""
        if not flight.is_drawn:
            return
        if not (flight.call.is_stream or flight.has_begun):
            flight.place.spend(round(flight.request.response_tokens))
        key = flight.instance_id, flight.place.account.name, flight.client_id
        self._left.setdefault(key, deque()).append(flight.place)
        self._num_left += 1
        if self._num_left > MAX_LEFT:
            self._pop_left(next(iter(self._left)))

    def _pop_left(self, key: tuple[str, str, str]) -> Place | None:
        """The first of them that left."""
        places = self._left.get(key)
        if places is None:
            return None
        place = places.popleft()
        self._num_left -= 1
        if not places:
            del self._left[key]
        return place

    def forget(self, instance_id: str) -> None:
        """A server that was removed tells nothing any more: those that left it count as they do."""
        self._last_left.pop(instance_id, None)
        self._left = {key: places for key, places in self._left.items() if key[0] != instance_id}
        self._num_left = sum(map(len, self._left.values()))

    def note_left(self, instance_id: str, told: Iterable[LeftEntry]) -> None:
        """What a server's requests had come to when their clients left; it tells of each more than once."""
        last = self._last_left.get(instance_id, 0)
        for entry in told:
            if entry.number > last:
                place = self._pop_left((instance_id, entry.tenant, entry.request_id))
                if place is not None:
                    place.settle(entry.prompt_tokens, entry.answer_tokens)
                self._last_left[instance_id] = max(entry.number, self._last_left.get(instance_id, 0))

    def to_move(self) -> Iterator[tuple[Flight, str]]:
        """Those without a token that should wait on another server by the policy, and which."""
        for move in self._dispatcher.moves():
            flight = self._on.get(move.source_id, {}).get(move.request_id)
            if flight is not None and flight.may_move_to(move.target_id):
                yield flight, move.target_id


def end_wait(wait: asyncio.Timeout | None, *, at: float = 0.0) -> None:
    """Let a wait run out now, or at this time of the loop's clock, but no later than it would."""
    when = wait.when() if wait is not None and not wait.expired() else None
    if wait is not None and when is not None:
        wait.reschedule(min(when, max(at, asyncio.get_running_loop().time())))
