"""Requests whose clients left before their end, and what they came to: for a front, which nobody tells."""

import time
from collections import deque
from collections.abc import Iterator

from toppings.cluster.report import LeftEntry
from toppings.exchanges.request_log import LOGGED_PATHS
from toppings.server.exchange import Exchange

MAX_LEFT = 256


class LeftRequests:
    """The last `MAX_LEFT`, oldest first."""

    def __init__(self) -> None:
        self._latest: deque[LeftEntry] = deque(maxlen=MAX_LEFT)
        self._number = 0

    def __iter__(self) -> Iterator[LeftEntry]:
        return iter(tuple(self._latest))

    def note(self, exchange: Exchange) -> None:
        """An exchange that is over."""
        timers = exchange.timers
        if not timers or exchange.path not in LOGGED_PATHS or exchange.outcome != "abort":
            return
        # By the clock, so that a server that was started anew goes on from where it was.
        self._number = max(self._number + 1, time.time_ns() // 1000)
        num_prompt = timers[0].num_prompt_tokens if len(timers) == 1 else None
        num_answer = sum(timer.num_tokens for timer in timers)
        entry = LeftEntry(self._number, exchange.tenant or "", exchange.request_id, num_prompt, num_answer)
        self._latest.append(entry)
