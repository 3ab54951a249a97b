"""A link between host and device that is not there: its speed, kept by sleeping."""

import time


class EmulatedLink:
    """A link that carries one transfer at a time at `gbps` (10^9 bytes per second)."""

    def __init__(self, gbps: float) -> None:
        self._bytes_per_s = gbps * 1e9
        self._free_at = 0.0

    def wait_for_transfer(self, started_at: float, num_bytes: int) -> None:
        """Returns when a transfer that wanted to start at `started_at` would be over."""
        self._free_at = max(self._free_at, started_at) + num_bytes / self._bytes_per_s
        sleep_until(self._free_at)


def sleep_until(deadline: float) -> None:
    """Sleeps to an instant of `time.perf_counter`; ends up to about 0.1 ms late, which does not add up.

    Waking often to end on time would take cores from the model, whose threads wait for each other."""
    while (remaining := deadline - time.perf_counter()) > 0:
        time.sleep(remaining)
