"""A steady load with faults, in phases; what became of the requests, and what the processes hold then."""

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hostile.fault_plan import Fault
from hostile.load import Client
from hostile.probe import HealthProbe
from hostile.results import aim, write
from hostile.served import Program, Usage
from hostile.tally import REASONS_OF_5XX, Tally

NUM_CLIENTS = 8
PAUSE_S = 0.6
SHARE_OF_FAULTS = 0.7
SHARE_OF_LOAD = 0.9
"""Of a phase: faults come until then, the load runs until then."""


class Soak:
    """`front` takes the requests. `make_client(tally, seed)` makes the clients of one phase; `settle` returns
    what all processes hold once no request is left.
    """

    def __init__(
        self,
        front: Program,
        make_client: Callable[[Tally, int], Client],
        settle: Callable[[], Usage],
        *,
        seed: int,
        patience_s: float,
        allowed_5xx: tuple[int, ...] = REASONS_OF_5XX,
    ) -> None:
        self.tally = Tally(patience_s, allowed_5xx)
        self.recoveries: dict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        self.usages: list[Usage] = []
        self.health: list[dict[str, float]] = []
        self.load_averages: list[float] = []
        self._front = front
        self._make_client = make_client
        self.settle = settle
        self._seed = seed
        self._started_at = time.time()

    async def run(self, phases: Sequence[tuple[float, Sequence[Fault]]], path: Path | None) -> None:
        """Phases of so many seconds, with their faults. What is known is written to `path` after each."""
        for number, (seconds, faults) in enumerate(phases):
            with HealthProbe(self._front.port) as probe:
                await self._phase(number, seconds, faults)
            self.health.append(probe.summary())
            self.load_averages.append(os.getloadavg()[1])
            try:
                self.usages.append(await asyncio.to_thread(self.settle))
            except (OSError, TimeoutError, KeyError) as error:
                self.problems.append(f"after phase {number}: {error!r}")
            write({"benchmark": "soak", **self.result(), "is_partial": True}, path)
            if self._front.process.poll() is not None:
                self.problems.append(f"the server ended with {self._front.process.returncode}")
                return

    async def _phase(self, number: int, seconds: float, faults: Sequence[Fault]) -> None:
        client = await asyncio.to_thread(self._make_client, self.tally, self._seed + number)
        stop = asyncio.Event()
        async with client:
            load = asyncio.create_task(client.run(stop, NUM_CLIENTS, PAUSE_S))
            ends_at = time.monotonic() + seconds * SHARE_OF_LOAD
            await self._cause(faults, seconds * SHARE_OF_FAULTS)
            await asyncio.sleep(max(0.0, ends_at - time.monotonic()))
            stop.set()
            await load

    async def _cause(self, faults: Sequence[Fault], within_s: float) -> None:
        """One after the other, at even distances; one that takes longer moves the rest."""
        starts = [time.monotonic() + within_s * (i + 0.5) / len(faults) for i in range(len(faults))]
        for start, fault in zip(starts, faults, strict=True):
            await asyncio.sleep(max(0.0, start - time.monotonic()))
            if self._front.process.poll() is None:
                with self.tally.outage() if fault.is_outage else nullcontext():
                    await asyncio.to_thread(self._one_fault, fault)

    def _one_fault(self, fault: Fault) -> None:
        try:
            if (seconds := fault.cause()) is not None:
                self.recoveries[fault.name].append(seconds)
        except (OSError, RuntimeError, AssertionError) as error:  # TimeoutError is an OSError
            self.problems.append(f"{fault.name}: {error!r}"[:300])

    def result(self) -> dict[str, Any]:
        return {
            "minutes": (time.time() - self._started_at) / 60,
            "requests": self.tally.as_dict(),
            "recovery_s": dict(self.recoveries),
            "problems": self.problems,
            "health_ms": self.health,
            "load_averages": self.load_averages,
            "usage": {"after_phases": [usage.as_dict() for usage in self.usages]},
        }

    def aims(self) -> list[dict[str, Any]]:
        return [
            aim("requests lost", self.tally.lost + self.tally.open, 0),
            aim("answers that no server may give", self.tally.faults, 0),
            aim("faults that were not survived", len(self.problems), 0),
        ]


def most_growth_percent(first: Usage, later: Sequence[Usage]) -> dict[str, float]:
    """The most that anything has grown at any time."""
    grown = [first.growth_percent(each) for each in later]
    return {name: max(each[name] for each in grown) for name in grown[0]}


def growth_aims(grown: dict[str, float]) -> list[dict[str, Any]]:
    return [
        aim("growth of memory, %", grown["rss_bytes"], 1.0),
        aim("growth of shared memory, %", grown["shared_bytes"], 0.0),
        aim("growth of open descriptors, %", grown["num_fds"], 0.0),
        aim("growth of shared memory files, %", grown["num_memfds"], 0.0),
    ]
