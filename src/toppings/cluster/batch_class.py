"""Batch requests (`slo.py`) in a fleet: where there is room for one, and those that wait for some."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from toppings.cluster.policies.base import PolicySettings
from toppings.cluster.snapshot import Choice

BATCH_SHARE = 0.8
"""Of the objectives, that a server to which a batch request is sent may come to by it."""
MAX_TRIED = 8
"""Requests that are held, first to last, for which a place is looked for at once: models differ in theirs."""

T = TypeVar("T")


class SpareTime:
    """What servers have left for batch requests. A decode step with the request's sequence, and the time
    until its first token, have to stay within `BATCH_SHARE` of the objectives. Its prompt holds up the tokens
    of all that run there: prompts of batch requests get the share of a server's time that decode steps leave,

        1 - TPT / (BATCH_SHARE x slo_tpt_ms)

    so that after one of p ms the next may come p / share later. Without requests a server has all its time.
    """

    def __init__(self, settings: PolicySettings, ticks_per_s: float) -> None:
        self._slo_tpt_ms = BATCH_SHARE * settings.slo_tpt_ms
        self._slo_ttft_ms = BATCH_SHARE * settings.slo_ttft_ms
        self._ticks_per_ms = ticks_per_s / 1e3
        self._next_at: dict[str, float] = {}

    def take(self, choice: Choice, num_requests: float, now: float) -> bool:
        """Whether there is room where the policy would send one, beside so many requests; then it is taken.
        Policies that predict nothing find room anywhere.
        """
        tpt_ms, ttft_ms, server = choice.predicted_tpt_ms, choice.predicted_ttft_ms, choice.instance_id
        if tpt_ms is None or ttft_ms is None:
            return True
        is_due = now >= self._next_at.get(server, now)
        is_within = tpt_ms < self._slo_tpt_ms and ttft_ms <= self._slo_ttft_ms
        if num_requests and not (is_due and is_within):
            return False
        share = max(1.0 - tpt_ms / self._slo_tpt_ms, 1.0 - BATCH_SHARE)
        self._next_at[server] = now + (ttft_ms - tpt_ms) / share * self._ticks_per_ms
        return True

    def forget(self, instance_id: str) -> None:
        self._next_at.pop(instance_id, None)


class Held(Generic[T]):
    """Batch requests that wait for room, in the order they came."""

    def __init__(self) -> None:
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: T) -> None:
        self._waiting.append(request)

    def discard(self, request: T) -> None:
        if request in self._waiting:
            self._waiting.remove(request)

    def pop(self) -> T:
        """The first of them. Raises IndexError where there is none."""
        return self._waiting.popleft()

    def look(self, place: Callable[[T], bool]) -> None:
        """There may be room: `place` says whether it has found some for a request, which is then let go."""
        for request in list(self._waiting)[:MAX_TRIED]:
            if place(request):
                self._waiting.remove(request)
