"""How much faster than time the simulator runs on one core, and what loading a day's trace takes.

    python benchmarks/simulator_speed.py           # the published simulation's setting, every policy: minutes
    python benchmarks/simulator_speed.py --toy

60 instances at 340 requests/s, and one instance at a 60th of it: processor time of this process against
simulated time, the least of `--repeats` runs, since what else the machine does makes a run slower, never
faster; making the trace is not counted. The aim is 60 times real time with rank_aware, and 1,000 times for
one instance.

The day is a file of the Azure Functions 2019 format, 40,000 functions by 1,440 minutes, made up with few
popular functions and many that are hardly called; a process of its own loads it at 340 requests/s, 29 million
requests. The aim is 60 s and 4 GiB. Ends in one JSON line.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toppings.cluster.policies import POLICIES
from toppings.lab.reproduce import published
from toppings.lab.reproduce.fleet_runs import FleetSpec
from toppings.lab.script import finish, make_parser, parse
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import load_trace
from toppings.sim.readers.azure_functions_2019 import NAMES
from toppings.sim.simulator import Simulator

FORM = "bgmv"
MINUTES_PER_DAY = 1440
MEAN_COUNTS_A_DAY = (0.1, 1e6)
"""Of the least and of the most popular function; geometric between them."""


@dataclass(frozen=True)
class Scale:
    num_instances: int
    duration_s: float
    num_functions: int
    num_minutes: int


FULL = Scale(published.SIMULATION_INSTANCES, 60.0, published.SIMULATION_FUNCTIONS, MINUTES_PER_DAY)
TOY = Scale(num_instances=4, duration_s=3.0, num_functions=30, num_minutes=5)


def times_real_time(spec: FleetSpec, policy: str, rate: float, repeats: int) -> tuple[float, float]:
    """Simulated over processor time, and microseconds of processor time per request. The first, short run
    leaves imports and compilers out."""
    simulate_s(replace(spec, duration_s=1.0), policy, rate)
    elapsed_s, num_requests = min(simulate_s(spec, policy, rate) for _ in range(repeats))
    return spec.duration_s / elapsed_s, elapsed_s / num_requests * 1e6


def simulate_s(spec: FleetSpec, policy: str, rate: float) -> tuple[float, int]:
    trace = spec.workload(rate).make_trace(0)
    simulator = Simulator(spec.config(FORM, policy, 0), trace)
    started_at = time.process_time()
    simulator.run()
    return time.process_time() - started_at, len(trace)


def speeds(scale: Scale, policies: Sequence[str], mode: str, repeats: int) -> dict[str, dict[str, float]]:
    fleet = FleetSpec(num_instances=scale.num_instances, duration_s=scale.duration_s, mode=mode)
    one = replace(fleet, num_instances=1, duration_s=10 * scale.duration_s)
    rate = fleet_rate(scale)
    factors: dict[str, dict[str, float]] = {}
    for policy in policies:
        factor, us = times_real_time(fleet, policy, rate, repeats)
        alone, _ = times_real_time(one, policy, rate / scale.num_instances, repeats)
        factors[policy] = {"fleet": factor, "one_instance": alone, "us_per_request": us}
        print(
            f"{policy:22s} {scale.num_instances} servers {factor:6.1f}x, "
            f"one {alone:7.0f}x, {us:5.1f} us/request"
        )
    return factors


def fleet_rate(scale: Scale) -> float:
    return published.SIMULATION_RPS * scale.num_instances / published.SIMULATION_INSTANCES


def write_day(path: Path, num_functions: int, num_minutes: int) -> None:
    rng = np.random.default_rng(0)
    most_first = np.geomspace(*MEAN_COUNTS_A_DAY[::-1], num_functions) / MINUTES_PER_DAY
    with path.open("w") as file:
        file.write(",".join([*NAMES, *map(str, range(1, num_minutes + 1))]) + "\n")
        for i, mean in enumerate(most_first.tolist()):
            counts = rng.poisson(mean, num_minutes).tolist()
            file.write(f"owner,app-{i // 4},function-{i},http," + ",".join(map(str, counts)) + "\n")


def load_day(path: Path, rate: float) -> dict[str, float]:
    """Time and peak memory of this process; it must be a fresh one."""
    before_mib = _peak_mib()
    started_at = time.perf_counter()
    trace = load_trace(path, TraceOptions(rate=rate))
    return {
        "elapsed_s": time.perf_counter() - started_at,
        "peak_mib": _peak_mib(),
        "before_mib": before_mib,
        "num_requests": len(trace),
        "file_mib": path.stat().st_size / 2**20,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def day_load(scale: Scale) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "invocations_per_function_md.anon.d01.csv"
        write_day(path, scale.num_functions, scale.num_minutes)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            loaded = pool.submit(load_day, path, fleet_rate(scale)).result()
    print(
        f"a day of {scale.num_functions:,} functions, {loaded['num_requests']:,} requests: "
        f"{loaded['elapsed_s']:.1f} s, {loaded['peak_mib']:.0f} MiB"
    )
    return loaded


def main() -> None:
    parser = make_parser(__doc__, "a few servers and seconds")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--duration", type=float, default=FULL.duration_s, help="simulated seconds")
    parser.add_argument("--mode", default=FleetSpec.mode, help="what a cold adapter's prefill does")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts")
    options = parse(parser)
    scale = TOY if options.toy else replace(FULL, duration_s=options.duration)
    finish(
        options,
        "simulator_speed",
        num_instances=scale.num_instances,
        rate=fleet_rate(scale),
        repeats=options.repeats,
        x=speeds(scale, options.policies.split(","), options.mode, options.repeats),
        day=day_load(scale),
    )


if __name__ == "__main__":
    main()
