"""A server under steady mixed load for an hour, with everything that goes wrong around a server.

Adapters come and go, processes are killed or hang, disks fill up, the registry is locked, clients dawdle. The
time is cut into cycles. In each, faults come one after the other, the load runs on, then it pauses, and what
the server holds is measured. The engine is killed and stopped in the first cycle and in the last one: between
them, every process but the workers' is the same, so that what it would lose for ever is seen. At the very end
the server itself is killed, and started anew. With --fleet the load goes through a router to two servers,
which are killed and stopped in turn, as is the router; what the router holds is measured.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hostile.fault_plan import Fault, engine_faults, lasting_faults, server_fault
from hostile.faults import SmallDisk
from hostile.fleet import STATUSES_OF_5XX, Fleet
from hostile.fuzzing import demo_workshop, settle
from hostile.load import BASE, Client, pin
from hostile.results import finish
from hostile.routes import known_routes
from hostile.served import Program, Served
from hostile.shots import draw_shots
from hostile.soaking import Soak, growth_aims, most_growth_percent
from hostile.tally import Tally

NUM_ADAPTERS = 8
PATIENCE_S, TOY_PATIENCE_S = 10.0, 60.0
"""The longest that an answer, or the end of a fault, may take; a toy run asks nothing of the machine."""
TOY_PHASE_S, LAST_PHASE_S = 6.0, 60.0
DISK_BYTES = 64 * 2**20
OPTIONS = (
    *("--num-threads", "1", "--max-model-len", "1024", "--kv-cache-bytes", "64MB"),
    *("--device-pool-bytes", "1500KB", "--host-store-bytes", "4MB"),
)
"""Room for some of the demo's adapters only, so that they are evicted and loaded all the time."""
ASSISTED = ("--mode", "cpu_assisted", "--assist-workers", "1")
LOOKS = ("/stats", "/metrics", "/adapters", "/v1/models")
ROUTER_LOOKS = ("/instances", "/metrics", "/v1/models")


def make_adapters(folder: Path) -> list[Path]:
    shop = demo_workshop()
    return [
        shop.write(folder / f"soak-{number}", shop.tensors(rank), r=rank)
        for number, rank in zip(range(NUM_ADAPTERS), itertools.cycle((2, 8, 16, 32)))
    ]


def make_client(
    front: Program, served: Served, folders: list[Path], demo: list[str], tally: Tally, seed: int
) -> Client:
    """Of `front`, which takes the requests of `served` (the same, or a router before it)."""
    _, document = served.ask("/openapi.json")
    without, looks = ((), LOOKS) if front is served else ((pin,), ROUTER_LOOKS)
    return Client(
        front.url,
        tally,
        models=[*demo, BASE, *(folder.name for folder in folders[:2])],
        folders=folders,
        shots=draw_shots(known_routes(document, str(folders[0])), seed, 10**9),
        without=without,
        looks=looks,
        seed=seed,
    )


def demo_models(served: Served) -> list[str]:
    """Each has answered, as completion and as chat: what starts with the first of them has started."""
    names = [card["id"] for card in served.ask("/v1/models")[1]["data"]]
    for name in names:
        body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello."}]}
        assert served.complete(name)[0] == served.ask("/v1/chat/completions", body)[0] == 200
    return [name for name in names if name != BASE]


@contextmanager
def small_disks(folder: Path) -> Iterator[dict[str, SmallDisk]]:
    """For logs and for state; none where this process may not mount."""
    with ExitStack() as stack:
        disks = {}
        try:
            for name in ("log", "state"):
                disks[name] = SmallDisk(folder / name, DISK_BYTES)
                stack.callback(disks[name].close)
        except PermissionError:
            print("cannot mount small disks: no disk is filled", file=sys.stderr)
        yield disks


def plan(
    args: argparse.Namespace, lasting: list[Fault], ending: list[Fault], last: list[Fault]
) -> list[tuple[float, list[Fault]]]:
    """`lasting` faults come in every cycle, `ending` ones, which replace what is measured, in the first and
    the last; the `last` ones after all."""
    if args.toy:
        phases = [(TOY_PHASE_S, [*ending, *lasting, *last])]
    else:
        cycle_s, num_cycles = args.cycle_minutes * 60, max(3, round(args.minutes / args.cycle_minutes))
        phases = [(cycle_s, lasting)] * num_cycles
        phases[0] = phases[-1] = (cycle_s, [*ending * max(1, int(args.cycle_minutes // 5)), *lasting])
        if last:
            phases.append((LAST_PHASE_S, last))
    return [(seconds, [each for each in faults if args.faults in each.name]) for seconds, faults in phases]


def measure_server(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    roots, patience_s = folder / "adapters", patience(args)
    with small_disks(folder / "disks") as disks:
        directories = {f"{name}_dir": disk.path / "server" for name, disk in disks.items()}
        options = (*OPTIONS, *ASSISTED, "--adapter-roots", str(roots))
        with Served(folder / "server", *options, **directories) as served:
            clients = partial(make_client, served, served, make_adapters(roots), demo_models(served))
            lasting = lasting_faults(served, disks, patience_s)
            ending, last = engine_faults(served, patience_s), [server_fault(served, patience_s)]
            soak = Soak(served, clients, partial(settle, served), seed=args.seed, patience_s=patience_s)
            return run(args, soak, plan(args, lasting, ending, last))


def measure_fleet(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    roots, patience_s = folder / "adapters", patience(args)
    with Fleet(folder, (*OPTIONS, "--adapter-roots", str(roots))) as fleet:
        [demo, *_] = [demo_models(served) for served in fleet.servers]
        clients = partial(make_client, fleet.router, fleet.servers[0], make_adapters(roots), demo)
        phases = plan(args, fleet.faults(patience_s), [fleet.router_fault(patience_s)], [])
        how: dict[str, Any] = {"patience_s": patience_s, "allowed_5xx": STATUSES_OF_5XX}
        return run(args, Soak(fleet.router, clients, fleet.settle, seed=args.seed, **how), phases)


def patience(args: argparse.Namespace) -> float:
    return TOY_PATIENCE_S if args.toy else PATIENCE_S


def run(args: argparse.Namespace, soak: Soak, phases: list[tuple[float, list[Fault]]]) -> dict[str, Any]:
    start = soak.settle()
    asyncio.run(soak.run(phases, args.json))
    result = {"benchmark": "soak", **soak.result(), "aims": soak.aims()}
    result["usage"]["start"] = start.as_dict()
    alike = soak.usages[: max(3, round(args.minutes / args.cycle_minutes))]
    if not args.toy and len(alike) > 1:
        result["growth_percent"] = most_growth_percent(alike[0], alike[1:])
        result["aims"] += growth_aims(result["growth_percent"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--cycle-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="", help="only those whose name holds this, such as worker")
    parser.add_argument("--fleet", action="store_true", help="two servers behind a router")
    parser.add_argument("--toy", action="store_true", help="one short cycle: checks that it runs")
    parser.add_argument("--json", type=Path, help="also write the result to this file, after each cycle")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without taking its server and disks along
    with tempfile.TemporaryDirectory(prefix="toppings-soak-") as name:
        result = (measure_fleet if args.fleet else measure_server)(Path(name), args)
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
