"""Calls to an engine that wait for its answer."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any


class Calls:
    """Each gets exactly one answer: a result or an error."""

    def __init__(self) -> None:
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        return len(self._futures)

    async def ask(self, send: Callable[[int], None]) -> Any:
        """The answer to what `send` sends, with the call's id. Raises what `send` raises, or the error that
        is the answer."""
        call_id = next(self._ids)
        future = self._futures[call_id] = asyncio.get_running_loop().create_future()
        try:
            send(call_id)
            return await future
        finally:
            del self._futures[call_id]

    def answer(self, call_id: int, result: object, error: Exception | None = None) -> None:
        """Nothing happens where nobody waits for it any more."""
        future = self._futures.get(call_id)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        for call_id in self._futures:
            self.answer(call_id, None, make_error())
