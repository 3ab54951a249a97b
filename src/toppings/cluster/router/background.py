"""Work that goes on beside requests: a fault in one turn is logged, and the next turn comes all the same.

It is nobody's who asks, whatever request has begun it: an empty context keeps that one's id out of the logs.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context

logger = logging.getLogger(__name__)


def start_loop(name: str, interval_s: float, turn: Callable[[], Awaitable[bool]]) -> "asyncio.Task[None]":
    """A task that takes a turn every `interval_s` until one returns False, or the task is cancelled."""

    async def loop() -> None:
        goes_on = True
        while goes_on:
            await asyncio.sleep(interval_s)
            try:
                goes_on = await turn()
            except Exception:  # whatever it is, it must not end the loop
                logger.exception("%s failed; it is tried again in %g s", name, interval_s)

    return asyncio.create_task(loop(), name=name, context=Context())


def start_once(name: str, work: Callable[[], Awaitable[None]]) -> "asyncio.Task[None]":
    """A task whose failure is logged. Whoever starts it keeps it, so that it is not collected as it runs."""

    async def run() -> None:
        try:
            await work()
        except Exception:
            logger.exception("%s failed", name)

    return asyncio.create_task(run(), name=name, context=Context())
