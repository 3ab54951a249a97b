"""What a machine does by itself, without an engine."""

import statistics
import time
from collections.abc import Callable

NUM_WARM_UP = 3


def median_s(action: Callable[[], object], num_rounds: int) -> float:
    """Of so many calls, after a few that are not counted."""
    times = []
    for _ in range(NUM_WARM_UP + num_rounds):
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[NUM_WARM_UP:])
