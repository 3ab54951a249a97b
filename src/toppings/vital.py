"""Threads and tasks whose end would otherwise go unnoticed."""

import asyncio
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class EngineLostError(RuntimeError):
    """The engine cannot go on: its process is to end, another may take its place. The message says why."""


class VitalThread(threading.Thread):
    """A thread that the engine cannot do without: whoever relies on it asks `check` from time to time."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = target
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error
            logger.exception("the thread %s has failed", self.name)

    def check(self) -> None:
        """Raises EngineLostError where it has failed."""
        if self._failure is not None:
            raise EngineLostError(f"the thread {self.name} has failed: {self._failure!r}")


def log_failure(task: "asyncio.Task[object]") -> None:
    """A done-callback for tasks that nobody waits for."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the task %s has failed", task.get_name(), exc_info=error)
