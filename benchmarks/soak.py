"""A server under steady mixed load for an hour, with everything that goes wrong around a server.

Adapters come and go, processes are killed or hang, disks fill up, the registry is locked, clients dawdle. The
time is cut into cycles. In each, every fault comes once, the load runs on, then it pauses, and what
the server holds is measured: so that all measurements are alike, the engine's process having been replaced
before each. The aims: nothing is lost, no answer is a 5xx but 503 and 507 or takes longer than 10 s, and from
the first measurement (after ten minutes) to the last memory grows by less than 1 %, descriptors and shared
memory not at all. What is known so far is written to --json after each cycle. Ends in one JSON line; the exit
code is 1 where an aim is missed.
"""

import argparse
import asyncio
import itertools
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from hostile.fault_plan import Fault, planned_faults
from hostile.faults import SmallDisk
from hostile.fuzzing import demo_workshop, settle
from hostile.load import BASE, Client
from hostile.probe import HealthProbe
from hostile.results import aim, finish, write
from hostile.routes import known_routes
from hostile.served import Served, Usage
from hostile.shots import draw_shots
from hostile.tally import Tally

NUM_CLIENTS = 16
PAUSE_S = 0.6
NUM_ADAPTERS = 8
SHARE_OF_FAULTS = 0.7
SHARE_OF_LOAD = 0.9
"""Of a cycle: faults come until then, the load runs until then."""
PATIENCE_S, TOY_PATIENCE_S = 10.0, 60.0
"""The longest that an answer, or the end of a fault, may take; a toy run asks nothing of the machine."""
TOY_CYCLE_S = 10.0
DISK_BYTES = 64 * 2**20
OPTIONS = (
    *("--num-threads", "1", "--mode", "cpu_assisted", "--assist-workers", "1", "--max-model-len", "1024"),
    *("--device-pool-bytes", "1500KB", "--host-store-bytes", "4MB", "--kv-cache-bytes", "64MB"),
)
"""Room for some of the demo's adapters only, so that they are evicted and loaded all the time."""


class Soak:
    def __init__(
        self,
        served: Served,
        folder: Path,
        disks: dict[str, SmallDisk],
        *,
        seed: int,
        wanted: str,
        patience_s: float,
    ) -> None:
        self.served = served
        self.tally = Tally(patience_s)
        self.recoveries: dict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        self.usages: list[Usage] = []
        self.health: list[dict[str, float]] = []
        self.disks = disks
        self._started_at = time.time()
        self._folders = make_adapters(folder)
        self._seed = seed
        self._wanted = wanted

    async def run(self, cycles: int, cycle_s: float, path: Path | None, measured: dict[str, Any]) -> None:
        for number in range(cycles):
            with HealthProbe(self.served.port) as probe:
                await self._cycle(number, cycle_s)
            self.health.append(probe.summary())
            try:
                self.usages.append(await asyncio.to_thread(settle, self.served))
            except (OSError, TimeoutError, KeyError) as error:
                self.problems.append(f"cycle {number}: {error!r}")
            measured |= self.result()
            write({**measured, "is_partial": True}, path)
            if self.served.process.poll() is not None:
                self.problems.append(f"the server ended with {self.served.process.returncode}")
                return

    async def _cycle(self, number: int, cycle_s: float) -> None:
        _, document = await asyncio.to_thread(self.served.ask, "/openapi.json")
        _, cards = await asyncio.to_thread(self.served.ask, "/v1/models")
        demo = [card["id"] for card in cards["data"] if card["id"] not in {f.name for f in self._folders}]
        shots = draw_shots(known_routes(document, str(self._folders[0])), self._seed + number, 10**9)
        client = Client(
            self.served.url,
            self.tally,
            models=[*demo, BASE, *(folder.name for folder in self._folders[:2])],
            folders=self._folders,
            shots=shots,
            seed=self._seed + number,
        )
        stop = asyncio.Event()
        load = asyncio.create_task(client.run(stop, NUM_CLIENTS, PAUSE_S))
        ends_at = time.monotonic() + cycle_s * SHARE_OF_LOAD
        await self._faults(cycle_s * SHARE_OF_FAULTS)
        await asyncio.sleep(max(0.0, ends_at - time.monotonic()))
        stop.set()
        await load
        await client.close()

    async def _faults(self, within_s: float) -> None:
        """One after the other, at even distances; one that takes longer moves the rest."""
        faults = [
            fault for fault in planned_faults(self.disks, self.tally.limit_s) if self._wanted in fault.name
        ]
        starts = [time.monotonic() + within_s * (i + 0.5) / len(faults) for i in range(len(faults))]
        for start, fault in zip(starts, faults, strict=True):
            await asyncio.sleep(max(0.0, start - time.monotonic()))
            if self.served.process.poll() is None:
                await asyncio.to_thread(self._one_fault, fault)

    def _one_fault(self, fault: Fault) -> None:
        try:
            if (seconds := fault.cause(self.served)) is not None:
                self.recoveries[fault.name].append(seconds)
        except (OSError, TimeoutError, AssertionError) as error:
            self.problems.append(f"{fault.name}: {error!r}"[:300])

    def result(self) -> dict[str, Any]:
        first, last = (self.usages[0], self.usages[-1]) if self.usages else (None, None)
        return {
            "minutes": (time.time() - self._started_at) / 60,
            "requests": self.tally.as_dict(),
            "recovery_s": dict(self.recoveries),
            "problems": self.problems,
            "health_ms": self.health,
            "usage": {"at_cycle_ends": [usage.as_dict() for usage in self.usages]},
            "drift_percent": {} if first is None or last is None else drift(first, last),
        }


def drift(first: Usage, last: Usage) -> dict[str, float]:
    pairs = zip(first.as_dict().items(), last.as_dict().values(), strict=True)
    return {name: 100 * (after / before - 1) if before else 0.0 for (name, before), after in pairs}


def make_adapters(folder: Path) -> list[Path]:
    shop = demo_workshop()
    return [
        shop.write(folder / f"soak-{number}", shop.tensors(rank), r=rank)
        for number, rank in zip(range(NUM_ADAPTERS), itertools.cycle((2, 8, 16, 32)))
    ]


def judge(result: dict[str, Any], *, is_toy: bool) -> list[dict[str, Any]]:
    requests, grown = result["requests"], result["drift_percent"]
    aims = [
        aim("requests lost", requests["lost"] + requests["open"], 0),
        aim("answers that no server may give", requests["faults"], 0),
        aim("faults that were not survived", len(result["problems"]), 0),
    ]
    if not is_toy:
        aims += [
            aim("growth of memory, %", grown.get("rss_bytes", 100.0), 1.0),
            aim("growth of shared memory, %", grown.get("shared_bytes", 100.0), 1.0),
            aim("growth of open descriptors, %", grown.get("num_fds", 100.0), 0.0),
            aim("growth of shared memory files, %", grown.get("num_memfds", 100.0), 0.0),
        ]
    return aims


def small_disks(folder: Path) -> dict[str, SmallDisk]:
    """For logs and for state; none where this process may not mount."""
    try:
        return {name: SmallDisk(folder / name, DISK_BYTES) for name in ("log", "state")}
    except PermissionError:
        print("cannot mount small disks: no disk is filled", file=sys.stderr)
        return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cycle-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="", help="only those whose name holds this, such as worker")
    parser.add_argument("--toy", action="store_true", help="one short cycle: checks that it runs")
    parser.add_argument("--json", type=Path, help="also write the result to this file, after each cycle")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without taking its server and disks along
    cycle_s = TOY_CYCLE_S if args.toy else args.cycle_minutes * 60
    patience_s = TOY_PATIENCE_S if args.toy else PATIENCE_S
    cycles = 1 if args.toy else max(2, round(args.minutes / args.cycle_minutes))
    result: dict[str, Any] = {"benchmark": "soak", "cycles": cycles, "cycle_s": cycle_s}
    with tempfile.TemporaryDirectory(prefix="toppings-soak-") as name:
        folder = Path(name)
        disks = small_disks(folder / "disks")
        directories = {f"{disk_name}_dir": disk.path / "server" for disk_name, disk in disks.items()}
        roots = folder / "adapters"
        try:
            with Served(folder / "server", *OPTIONS, "--adapter-roots", str(roots), **directories) as served:
                start = settle(served)
                soak = Soak(served, roots, disks, seed=args.seed, wanted=args.faults, patience_s=patience_s)
                asyncio.run(soak.run(cycles, cycle_s, args.json, result))
                result |= soak.result()
                result["usage"]["start"] = start.as_dict()
        finally:
            for disk in disks.values():
                disk.close()
    result["aims"] = judge(result, is_toy=args.toy)
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
