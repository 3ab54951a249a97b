"""Waits for what comes about on any machine, however busy it is: only a failure takes all the patience."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 120.0
_LOOK_S = 0.002

T = TypeVar("T")


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


def first_good(measure: Callable[[], T], is_good: Callable[[T], object], num_tries: int = 8) -> T:
    """Of several measurements the first that a busy machine has not spoilt; the last one where all are."""
    for _ in range(num_tries):
        measured = measure()
        if is_good(measured):
            break
    return measured
