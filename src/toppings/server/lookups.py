"""One look-up for all who ask for the same at once; a failure is remembered for a while."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from toppings.adapters.latest import Latest
from toppings.server.errors import RETRY_AFTER_S, ApiError, describe

T = TypeVar("T")
MAX_PENDING = 64
"""Looked for at once; more are answered 503."""
FAILURE_S = 10.0
"""How long a failure is remembered."""
MAX_FAILURES = 4096


class Lookups(Generic[T]):
    """Used from one event loop only."""

    def __init__(self) -> None:
        self._pending: dict[Hashable, asyncio.Task[T]] = {}
        self._failures: Latest[Hashable, tuple[float, ApiError]] = Latest(MAX_FAILURES)

    async def once(self, key: Hashable, look: Callable[[], Coroutine[None, None, T]]) -> T:
        """What `look` gives, which goes on though who asked is gone. Raises ApiError."""
        self._forget_failures()
        if key in self._failures:
            raise replace(self._failures[key][1])  # one that is raised again holds whom it passed before
        task = self._pending.get(key)
        if task is None:
            if len(self._pending) >= MAX_PENDING:
                message = f"{len(self._pending)} adapters are being fetched; try again later"
                headers = {"Retry-After": str(RETRY_AFTER_S)}
                raise ApiError(503, message, "ServiceUnavailableError", headers=headers)
            task = self._pending[key] = asyncio.create_task(look())
            task.add_done_callback(partial(self._note, key))
        return await asyncio.shield(task)

    def _note(self, key: Hashable, task: "asyncio.Task[T]") -> None:
        self._pending.pop(key, None)
        self._failures.pop(key, None)
        if task.cancelled() or task.exception() is None:
            return
        error = describe(task.exception() or RuntimeError())
        self._failures[key] = (time.monotonic() + FAILURE_S, replace(error))

    def _forget_failures(self) -> None:
        now = time.monotonic()
        while self._failures and next(iter(self._failures.values()))[0] <= now:
            self._failures.popitem(last=False)
