"""Asks /health again and again, from a process of its own: the load's work must not be measured with it."""

import http.client
import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Self

INTERVAL_S = 0.02
TIMEOUT_S = 30.0


@dataclass
class HealthProbe:
    """A context; after it `times` (s) and `statuses` (0: no answer) of every ask."""

    port: int
    times: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        output, _ = self._process.communicate(timeout=TIMEOUT_S * 2)  # its input ends, and so does it
        self.times, self.statuses = json.loads(output)

    def summary(self) -> dict[str, float]:
        """Milliseconds."""
        times = sorted(self.times) or [0.0]
        names = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
        quantiles = {name: times[min(len(times) - 1, int(len(times) * q))] * 1e3 for name, q in names.items()}
        return {"asked": len(self.times), **quantiles, "max": times[-1] * 1e3}


def _main(port: int) -> None:
    times, statuses = [], []
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        started_at = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            statuses.append(connection.getresponse().status)
        except (OSError, http.client.HTTPException):
            statuses.append(0)
        finally:
            connection.close()
        times.append(time.perf_counter() - started_at)
    print(json.dumps([times, statuses]))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
