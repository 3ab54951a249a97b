"""Work that a thread of its own does later, in order: nobody waits for it, what is too much is dropped."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from toppings.vital import VitalThread

logger = logging.getLogger(__name__)

COMPLAIN_S = 60.0
"""How often it is told that something is being dropped."""

T = TypeVar("T")


class Backlog(Generic[T]):
    """Hands each item to `work`. At most `max_items` wait; what comes beyond that, or `work` fails at, is
    dropped and counted, and the log says so once a minute, of what is called `name`."""

    def __init__(self, name: str, work: Callable[[T], None], max_items: int) -> None:
        self._queue: queue.Queue[T | None] = queue.Queue(max_items)
        self._name, self._work = name, work
        self._num_dropped = 0
        self._lock = threading.Lock()
        self._complain_at = 0.0
        self._thread = VitalThread(self._run, f"backlog-{name}")
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def put(self, item: T, num_items: int = 1) -> None:
        """Takes the item, which must not change any more; from any thread. `num_items`: as how many it counts
        where it is dropped."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop("too many wait", num_items)

    def close(self, linger_s: float) -> bool:
        """Whether all that waited has been worked on, within so long."""
        ends_at = time.monotonic() + linger_s
        with suppress(queue.Full):
            self._queue.put(None, timeout=linger_s)
            self._thread.join(max(0.0, ends_at - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._work(item)
            except Exception as error:
                self._drop(repr(error))

    def _drop(self, reason: str, num_items: int = 1) -> None:
        now = time.monotonic()
        with self._lock:
            self._num_dropped += num_items
            num_dropped, is_told = self._num_dropped, now >= self._complain_at
            if is_told:
                self._complain_at = now + COMPLAIN_S
        if is_told:
            logger.warning("%s: %d are dropped so far: %s", self._name, num_dropped, reason)
