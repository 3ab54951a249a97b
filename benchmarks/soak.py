"""A server under steady mixed load for an hour, with everything that goes wrong around a server.

Adapters come and go, processes are killed or hang, disks fill up, the registry is locked, clients dawdle. The
time is cut into cycles. In each, faults come one after the other, the load runs on, then it pauses, and what
the server holds is measured. The engine is killed and stopped in the first cycle and in the last one: between
them, every process but the workers' is the same, so that what it would lose for ever is seen. At the very end
the server itself is killed, and started anew.

The aims: nothing is lost, no answer is a 5xx but 503 and 507 or takes longer than 10 s, and from the first
measurement (after ten minutes) to any later one memory grows by less than 1 %, descriptors and shared memory
not at all. What is known so far is written to --json after each cycle. Ends in one JSON line; the exit code
is 1 where an aim is missed.
"""

import argparse
import asyncio
import itertools
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from hostile.fault_plan import Fault, engine_faults, lasting_faults, server_fault
from hostile.faults import SmallDisk
from hostile.fuzzing import demo_workshop, settle
from hostile.load import BASE, Client
from hostile.results import finish
from hostile.routes import known_routes
from hostile.served import Program, Served
from hostile.shots import draw_shots
from hostile.soaking import Soak, growth_aims, growth_percent
from hostile.tally import Tally

NUM_ADAPTERS = 8
PATIENCE_S, TOY_PATIENCE_S = 10.0, 60.0
"""The longest that an answer, or the end of a fault, may take; a toy run asks nothing of the machine."""
TOY_PHASE_S, LAST_PHASE_S = 10.0, 60.0
DISK_BYTES = 64 * 2**20
OPTIONS = (
    *("--num-threads", "1", "--mode", "cpu_assisted", "--assist-workers", "1", "--max-model-len", "1024"),
    *("--device-pool-bytes", "1500KB", "--host-store-bytes", "4MB", "--kv-cache-bytes", "64MB"),
)
"""Room for some of the demo's adapters only, so that they are evicted and loaded all the time."""


def make_adapters(folder: Path) -> list[Path]:
    shop = demo_workshop()
    return [
        shop.write(folder / f"soak-{number}", shop.tensors(rank), r=rank)
        for number, rank in zip(range(NUM_ADAPTERS), itertools.cycle((2, 8, 16, 32)))
    ]


def make_client(front: Program, folders: list[Path], demo: list[str], tally: Tally, seed: int) -> Client:
    _, document = front.ask("/openapi.json")
    return Client(
        front.url,
        tally,
        models=[*demo, BASE, *(folder.name for folder in folders[:2])],
        folders=folders,
        shots=draw_shots(known_routes(document, str(folders[0])), seed, 10**9),
        seed=seed,
    )


def demo_models(served: Served) -> list[str]:
    """Each has answered, as completion and as chat: what starts with the first of them has started."""
    names = [card["id"] for card in served.ask("/v1/models")[1]["data"]]
    for name in names:
        body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello."}]}
        assert served.complete(name)[0] == served.ask("/v1/chat/completions", body)[0] == 200
    return [name for name in names if name != BASE]


def small_disks(folder: Path) -> dict[str, SmallDisk]:
    """For logs and for state; none where this process may not mount."""
    try:
        return {name: SmallDisk(folder / name, DISK_BYTES) for name in ("log", "state")}
    except PermissionError:
        print("cannot mount small disks: no disk is filled", file=sys.stderr)
        return {}


def plan(
    served: Served, disks: dict[str, SmallDisk], args: argparse.Namespace, patience_s: float
) -> list[tuple[float, list[Fault]]]:
    lasting, engines = lasting_faults(served, disks, patience_s), engine_faults(served, patience_s)
    if args.toy:
        phases = [(TOY_PHASE_S, [*engines, *lasting])]
    else:
        cycle_s, num_cycles = args.cycle_minutes * 60, max(3, round(args.minutes / args.cycle_minutes))
        phases = [(cycle_s, lasting)] * num_cycles
        phases[0] = phases[-1] = (cycle_s, [*engines * max(1, int(args.cycle_minutes // 5)), *lasting])
        phases.append((LAST_PHASE_S, [server_fault(served, patience_s)]))
    return [(seconds, [each for each in faults if args.faults in each.name]) for seconds, faults in phases]


def measure(folder: Path, disks: dict[str, SmallDisk], args: argparse.Namespace) -> dict[str, Any]:
    directories = {f"{name}_dir": disk.path / "server" for name, disk in disks.items()}
    patience_s = TOY_PATIENCE_S if args.toy else PATIENCE_S
    roots = folder / "adapters"
    with Served(folder / "server", *OPTIONS, "--adapter-roots", str(roots), **directories) as served:
        clients = partial(make_client, served, make_adapters(roots), demo_models(served))
        start = settle(served)
        soak = Soak(served, clients, lambda: settle(served), seed=args.seed, patience_s=patience_s)
        asyncio.run(soak.run(plan(served, disks, args, patience_s), args.json))
    result = {"benchmark": "soak", **soak.result(), "aims": soak.aims()}
    result["usage"]["start"] = start.as_dict()
    if not args.toy and len(soak.usages) > 2:
        first, *later, _ = soak.usages  # the last is another process's
        result["growth_percent"] = growth_percent(first, later)
        result["aims"] += growth_aims(result["growth_percent"])
    return result


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
    with tempfile.TemporaryDirectory(prefix="toppings-soak-") as name:
        disks = small_disks(Path(name) / "disks")
        try:
            result = measure(Path(name), disks, args)
        finally:
            for disk in disks.values():
                disk.close()
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
