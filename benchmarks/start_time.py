"""How long `toppings serve` takes to be ready, by the clock and in processor time.

    python benchmarks/start_time.py                  # the demo and the real model that the set-up installs
    python benchmarks/start_time.py --rounds 1 --model demo
    python benchmarks/start_time.py --toy

Each start is a process of its own with a state directory that the starts before it of the same model have
left: the first one, which packs adapters, measures the CPU's products and may compile kernels, is given apart
as `first_s`. `ready_s`: the median of the others, from the start of the process to an answer of /ready;
`cpu_s`: what all of its processes had computed by then, the least of them, which other work on the machine
disturbs less. Aims: 4 s for the demo, 8 s for the real model, on two cores with nothing beside. Ends in one
JSON line.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toppings.config import Config
from toppings.lab.http.server import free_port, running_server
from toppings.lab.machine import describe_machine
from toppings.lab.script import finish, make_parser, parse

AIMS_S = {"demo": 4.0, "": 8.0}
"""By what is served; "": what `toppings serve` takes where no model is named."""
CACHE_BYTES = 64 * 2**20
PARENT, USER, SYSTEM = 1, 11, 12
"""Places in /proc/<pid>/stat behind the command's name: its parent, and ticks that it has computed."""


def descendants(pid: int) -> Iterator[list[str]]:
    """What the kernel tells of the processes that `pid` has started, and that these have."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats[int(file.parent.name)] = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
    found = {pid}
    while more := {each for each, stat in stats.items() if int(stat[PARENT]) in found} - found:
        found |= more
    yield from (stats[each] for each in found - {pid})


def computed_s() -> float:
    """Processor time of the processes that this one has started, ended ones that were waited for included."""
    times = os.times()
    ticks = sum(int(stat[USER]) + int(stat[SYSTEM]) for stat in descendants(os.getpid()))
    return ticks / os.sysconf("SC_CLK_TCK") + times.children_user + times.children_system


async def start(config: Config) -> tuple[float, float]:
    """Seconds until it is ready, by the clock and computed."""
    started_at, computed = time.perf_counter(), computed_s()
    async with running_server(config):
        return time.perf_counter() - started_at, computed_s() - computed


def starts_of(model: str, directory: Path, num_rounds: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "port": free_port(),
        "log_dir": str(directory / "logs"),
        "state_dir": str(directory / "state"),
        "kv_cache_bytes": CACHE_BYTES,
    }
    config = Config.from_settings({**settings, **({"model": model} if model else {})})
    first, *others = [asyncio.run(start(config)) for _ in range(num_rounds + 1)]
    return {
        "ready_s": statistics.median(wall for wall, _ in others),
        "cpu_s": min(cpu for _, cpu in others),
        "first_s": first[0],
        "first_cpu_s": first[1],
    }


def main() -> None:
    parser = make_parser(__doc__, "the demo, once")
    parser.add_argument("--model", help="only this one, as toppings serve takes it")
    parser.add_argument("--rounds", type=int, default=5, help="starts behind the first")
    args = parse(parser)
    if args.toy:
        args.rounds, args.model = 1, "demo"
    models = list(AIMS_S) if args.model is None else [args.model]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="toppings-start-") as directory:
        for number, model in enumerate(models):
            found = starts_of(model, Path(directory) / str(number), args.rounds)
            result[model or "default"] = {**found, "aim_s": AIMS_S.get(model)}
    finish(args, "start_time", starts=result, machine=describe_machine())


if __name__ == "__main__":
    main()
