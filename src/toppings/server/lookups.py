"""One look-up for all who ask for the same at once; a failure is remembered for a while."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from toppings.adapters.latest import Latest
from toppings.server.errors import ApiError, describe, unavailable
from toppings.sources.fetch import FetchError, FetchNotFound

T = TypeVar("T")
Key: TypeAlias = tuple[str, ...]
"""The first one is the adapter's name."""
MAX_PENDING = 64
"""Looked for at once; more are answered 503."""
MAX_OF_NAME = 16
"""Of these, look-ups of one name, by other tokens or in other sources."""
MAX_WAITING = 1024
"""Who wait for all look-ups together; for those of one name half as many."""
FAILURE_S = 10.0
"""How long a failure is remembered."""
MAX_FAILURES = 4096


@dataclass(eq=False)
class _Pending(Generic[T]):
    """`outcome` is what all wait for; who waits may be told sooner than `task` ends."""

    task: asyncio.Task[None]
    outcome: asyncio.Future[T]
    num_waiting: int = 0


class Lookups(Generic[T]):
    """Used from one event loop only. With `remembers`, who asks again soon after a failure is told that."""

    def __init__(self, *, remembers: bool = True) -> None:
        self._remembers = remembers
        self._is_closed = False
        self._pending: dict[Key, _Pending[T]] = {}
        self._failures: Latest[Key, tuple[float, ApiError]] = Latest(MAX_FAILURES)

    async def once(self, key: Key, look: Callable[[], Coroutine[None, None, T]]) -> T:
        """What `look` gives, which goes on though who asked is gone. Raises ApiError: 503 where too many wait
        or are looked for, and once the server shuts down."""
        self._forget_failures()
        if key in self._failures:
            raise replace(self._failures[key][1])  # one that is raised again holds whom it passed before
        pending = self._find_or_begin(key, look)
        pending.num_waiting += 1
        try:
            return await asyncio.shield(pending.outcome)
        finally:
            pending.num_waiting -= 1

    def close(self) -> None:
        """Who waits is answered 503, as is who asks from now on."""
        self._is_closed = True
        for pending in self._pending.values():
            if not pending.outcome.done():
                pending.outcome.set_exception(unavailable("the server is shutting down"))

    def _find_or_begin(self, key: Key, look: Callable[[], Coroutine[None, None, T]]) -> _Pending[T]:
        if self._is_closed:
            raise unavailable("the server is shutting down")
        of_name = [each for other, each in self._pending.items() if other[0] == key[0]]
        if sum(each.num_waiting for each in of_name) >= MAX_WAITING // 2:
            raise unavailable(f"too many requests wait for adapter {key[0]!r} to be fetched; try again later")
        if sum(each.num_waiting for each in self._pending.values()) >= MAX_WAITING:
            raise unavailable("too many requests wait for adapters to be fetched; try again later")
        if (pending := self._pending.get(key)) is not None:
            return pending
        if len(of_name) >= MAX_OF_NAME:
            raise unavailable(f"adapter {key[0]!r} is asked for in too many ways at once; try again later")
        if len(self._pending) >= MAX_PENDING:
            raise unavailable(f"{len(self._pending)} adapters are being fetched; try again later")
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(_retrieve)
        pending = _Pending(asyncio.create_task(self._run(key, look, outcome)), outcome)
        self._pending[key] = pending
        pending.task.add_done_callback(partial(self._note, key))
        return pending

    async def _run(
        self, key: Key, look: Callable[[], Coroutine[None, None, T]], outcome: asyncio.Future[T]
    ) -> None:
        """Raises nothing: whatever goes wrong is for those who wait."""
        try:
            found = await look()
        except Exception as error:
            if self._remembers:
                self._failures[key] = (time.monotonic() + FAILURE_S, replace(describe(error)))
            if not outcome.done():
                outcome.set_exception(error)
            return
        if not outcome.done():
            outcome.set_result(found)

    def _note(self, key: Key, task: asyncio.Task[None]) -> None:
        outcome = self._pending.pop(key).outcome
        if not outcome.done():  # the task was cancelled
            outcome.set_exception(unavailable("the server is shutting down"))

    def _forget_failures(self) -> None:
        now = time.monotonic()
        while self._failures and next(iter(self._failures.values()))[0] <= now:
            self._failures.popitem(last=False)


def not_given(name: str, error: FetchError) -> ApiError:
    """What a source has not, or does not give."""
    if isinstance(error, FetchNotFound):
        return ApiError(404, f"The model `{name}` does not exist: {error}", "NotFoundError", "model")
    return ApiError(502, f"adapter {name!r} cannot be had: {error}", "BadGatewayError", "model")


def _retrieve(outcome: "asyncio.Future[T]") -> None:
    """What nobody waits for any more is no fault of a program that forgot it."""
    if not outcome.cancelled():
        outcome.exception()
