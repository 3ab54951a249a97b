"""Waits for what comes about on any machine, however busy it is: only a failure takes all the patience."""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 60.0
_LOOK_S = 0.002


def wait_until(is_so: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    stop_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < stop_at, f"it did not come about in {limit_s:g} s"
        time.sleep(_LOOK_S)


async def until(is_so: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    """`wait_until`, while the event loop goes on."""
    stop_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < stop_at, f"it did not come about in {limit_s:g} s"
        await asyncio.sleep(_LOOK_S)
