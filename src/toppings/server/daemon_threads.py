"""Threads for what may hang: an executor's are joined when the process ends, these are not."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class DaemonThreads:
    """At most `size` at once, each of one call; the others wait in turn. Used from one event loop only."""

    def __init__(self, size: int, name: str) -> None:
        self._free = asyncio.Semaphore(size)
        self._name = name

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """What `function` gives or raises. It goes on, and keeps its thread, where who waits is cancelled."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        await self._free.acquire()

        def work() -> None:
            try:
                end = partial(_set_result, outcome, function(*args))
            except BaseException as error:
                end = partial(_set_exception, outcome, error)
            with suppress(RuntimeError):  # the loop has gone, and who waited
                loop.call_soon_threadsafe(self._free.release)
                loop.call_soon_threadsafe(end)

        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError:
            self._free.release()
            raise
        return await outcome


def _set_result(outcome: "asyncio.Future[T]", result: T) -> None:
    if not outcome.cancelled():
        outcome.set_result(result)


def _set_exception(outcome: "asyncio.Future[T]", error: BaseException) -> None:
    if not outcome.cancelled():
        outcome.set_exception(error)
