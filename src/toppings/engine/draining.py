"""Room made for a request whose adapter has found none for too long: the least valuable adapters in use admit
nobody until it has started, and those that keep their room for as long again are preempted."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from toppings.core import Request
from toppings.engine.adapter_placement import AdapterPlacement


@dataclass(slots=True)
class Drain:
    """For one starved request: `adapter_ids` admit nobody until it has started."""

    request: Request
    adapter_ids: frozenset[int]
    started_at: float


class Draining:
    """One drain at a time, for whoever is blocked longest. `max_wait_s`: how long that may be."""

    def __init__(self, adapters: AdapterPlacement, max_wait_s: float) -> None:
        self.num_drains = 0
        self._adapters = adapters
        self._max_wait_s = max_wait_s
        self._blocked_at: dict[Request, float] = {}  # since when its adapter found no room, longest first
        self._drain: Drain | None = None

    @property
    def is_on(self) -> bool:
        return self._drain is not None

    @property
    def starved(self) -> int | None:
        """The adapter of the request that has found no room for longest."""
        return next((request.adapter_id for request in self._blocked_at), None)

    def note_blocked(self, request: Request, now: float) -> None:
        """There was no room for its adapter."""
        self._blocked_at.setdefault(request, now)

    def forget(self, request: Request) -> None:
        """It starts, or has ended."""
        self._blocked_at.pop(request, None)
        if self._drain is not None and self._drain.request is request:
            self._drain = None

    def may_start(self, request: Request) -> bool:
        """False where starting it would take the room that is being made for a starved request."""
        if self._drain is None or request is self._drain.request or request.adapter_id is None:
            return True
        return request.adapter_id not in self._drain.adapter_ids and self._adapters.holds(request.adapter_id)

    def is_due(self, now: float) -> bool:
        """There is a drain, or one is to begin."""
        longest = min(self._blocked_at.values(), default=now)
        return self._drain is not None or now - longest > self._max_wait_s

    def quiet_until(self) -> float:
        """Before this instant nothing begins, and nobody is preempted, if nobody else is blocked."""
        since = min(self._blocked_at.values(), default=float("inf"))
        return (since if self._drain is None else self._drain.started_at) + self._max_wait_s

    def advance(self, now: float, running: Iterable[Request]) -> list[Request]:
        """Begins to drain for the request starved longest; those of `running` that keep their room too long.

        Who has been preempted so runs to its end the next time: else two adapters for which there is one
        room could take it from each other for ever.
        """
        if self._drain is None:
            self._begin(now)
        elif now - self._drain.started_at > self._max_wait_s:
            ids = self._drain.adapter_ids
            return [r for r in running if r.adapter_id in ids and not r.was_drained]
        return []

    def _begin(self, now: float) -> None:
        starved, blocked_at = next(iter(self._blocked_at.items()), (None, now))
        if starved is None or starved.adapter_id is None or now - blocked_at <= self._max_wait_s:
            return
        victims = frozenset(self._adapters.victims_for(starved.adapter_id))
        self._drain = Drain(starved, victims, now)
        self.num_drains += 1

    def check_integrity(self, waiting: Collection[Request]) -> None:
        assert set(self._blocked_at) <= set(waiting), "a blocked request is gone"
