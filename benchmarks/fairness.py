"""Who is served how much: tenants that compete, with fair scheduling and first come first served beside it.

    python benchmarks/fairness.py --json benchmarks/results/fairness.json
    python benchmarks/fairness.py --preset tiny --minutes 3
    python benchmarks/fairness.py --shapes flood --minutes 8
    python benchmarks/fairness.py --toy

Simulated, ten minutes each, with the published costs of a 7B model: the two-client shapes of the synthetic
workloads of Sheng et al. (OSDI 2024). Two that ask for too much, at different rates; one that comes and goes,
within its share and beyond it; prompts and answers of different lengths; one that asks for more and more; and
weights. Told for each tenant: its share of the tokens while all compete, by weight, a prompt's once and drawn
ones twice, and TTFT; for both: the largest difference of what tenants got that were backlogged throughout,
and tokens per second.

Measured, on an engine in this process: one tenant floods it, 250 requests wide, with long prompts, the other
sends short requests, one every so often; then the shapes above that overload it, at rates that are so many
times what the engine can do. The policies take turns, a step of one after a step of the other, each with the
processor time of its own steps as its clock: so what else the machine does slows both alike. All of it takes
`--minutes`, whatever else runs; of these the weights have half, which is ten minutes of each policy where all
is 45. Ends in one JSON line.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from toppings.cluster.perf_model import load_perf_model
from toppings.engine.engine import Engine
from toppings.engine.fair_queue import OUTPUT_WEIGHT
from toppings.lab.machine import describe_machine
from toppings.lab.players.lanes import Lane, run_lanes
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.simulation.metrics import latencies_of, tokens_by
from toppings.lab.summary import Stats
from toppings.lab.validation.world import make_world
from toppings.sim.records import SimResult
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import FloatArray, Tenants, Trace
from toppings.synth import PRESETS, AdapterShape

POLICIES = ("fair", "fcfs")
MINUTE = 60.0
KV_TOKENS = 10_000  # as published for a 7B model on 24 GB
RANK = 16
FLOOD_WIDTH = 250
LONG, SHORT = 256, 64
"""Tokens of prompts on the engine."""
SHARES = {"flood": 0.2, "both overloaded": 0.2, "short beside long answers": 0.1, "weights 1 and 3": 0.5}
"""Of the time that the engine has."""
BURST_SHARE = 0.1
"""At most, for what the rates are multiples of."""
TOY_S = 2.0


def main() -> None:
    began_at = time.monotonic()
    parser = make_parser(__doc__, "a minute of each simulated workload, and a moment of each on the engine")
    parser.add_argument("--preset", default="small-211m", choices=tuple(PRESETS), help="model of the engine")
    parser.add_argument("--minutes", type=float, default=45.0, help="that all of it takes")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(SHARES),
        default=tuple(SHARES),
        help="of the measured, only these",
    )
    args = parse(parser)
    simulated = simulate_all(MINUTE if args.toy else 10 * MINUTE)
    ends_at = time.monotonic() + TOY_S if args.toy else began_at + MINUTE * args.minutes
    preset, width = ("tiny", 40) if args.toy else (args.preset, FLOOD_WIDTH)
    engine = measure(preset, ends_at, args.shapes, width=width)
    finish(args, "fairness", machine=describe_machine(), simulated=simulated, engine=engine)


# --- simulated ---


def every(rate_per_min: float, duration_s: float) -> FloatArray:
    """Arrivals at even distances."""
    return np.arange(0.0, duration_s, MINUTE / rate_per_min)


def on_and_off(rate_per_min: float, duration_s: float) -> FloatArray:
    """A minute each."""
    at = every(rate_per_min, duration_s)
    return np.asarray(at[(at // MINUTE) % 2 == 0])


def rising(rate_per_min: float, duration_s: float) -> FloatArray:
    """From nothing to `rate_per_min`."""
    num = int(rate_per_min * duration_s / MINUTE / 2)
    return duration_s * np.sqrt(np.arange(num) / num)


Client = tuple[FloatArray, int, int, float]
"""Arrivals in s, tokens of prompts and of answers, weight."""


def workloads(duration_s: float) -> dict[str, list[Client]]:
    def client(
        arrivals: Callable[[float, float], FloatArray],
        rate: float,
        prompt: int = 256,
        response: int = 256,
        weight: float = 1.0,
    ) -> Client:
        return arrivals(rate, duration_s), prompt, response, weight

    return {
        "both overloaded": [client(every, 90), client(every, 180)],
        "on and off within its share": [client(on_and_off, 30), client(every, 240)],
        "on and off beyond its share": [client(on_and_off, 120), client(every, 180)],
        "short beside long answers": [client(every, 1440, 256, 16), client(every, 360, 16, 256)],
        "rising beside steady": [client(every, 30), client(rising, 240)],
        "weights 1 and 3": [client(every, 180), client(every, 180, weight=3.0)],
    }


def trace_of(clients: Sequence[Client], duration_s: float, names: Sequence[str]) -> Trace:
    """All have an adapter of their own."""
    arrivals = np.concatenate([client[0] for client in clients])
    order = np.argsort(arrivals, kind="stable")
    owners = np.repeat(np.arange(len(clients)), [len(client[0]) for client in clients])[order]
    prompts, responses = (np.array([client[i] for client in clients])[owners] for i in (1, 2))
    return Trace(
        arrivals[order],
        owners.astype(np.int32),
        prompts.astype(np.int32),
        responses.astype(np.int32),
        np.full(len(clients), RANK, dtype=np.int32),
        duration_s,
        "fairness",
        tenants=Tenants(owners.astype(np.int32), tuple(names), [client[3] for client in clients]),
    )


def simulate_all(duration_s: float) -> dict[str, Any]:
    config = SimConfig(
        perf_model=load_perf_model("published"), kv_cache_tokens=KV_TOKENS, max_model_len=2048, mode="cached"
    )
    results: dict[str, Any] = {}
    for name, clients in workloads(duration_s).items():
        trace = trace_of(clients, duration_s, [f"client {i + 1}" for i in range(len(clients))])
        results[name] = {
            policy: told(
                Simulator(replace(config, scheduling_policy=policy), trace).run(until_s=duration_s),
                duration_s,
            )
            for policy in POLICIES
        }
    return results


def service(result: SimResult, at_s: float) -> FloatArray:
    """Of each tenant [T] until an instant, in tokens of prompts, by weight."""
    tenants = result.tenants
    assert tenants is not None
    all_tokens = tokens_by(result, round(at_s * NS_PER_S))
    prompts = np.where(all_tokens > 0, result.num_prompt_tokens, 0)
    weighted = prompts + OUTPUT_WEIGHT * (all_tokens - prompts)
    sums = np.bincount(tenants.indices, weights=weighted, minlength=len(tenants.names))
    return np.asarray(sums / np.asarray(tenants.weights))


def told(result: SimResult, duration_s: float) -> dict[str, Any]:
    tenants = result.tenants
    assert tenants is not None
    got = service(result, duration_s)
    over_time = np.array([service(result, at) for at in np.linspace(MINUTE / 4, duration_s, 60)])
    weights = np.asarray(tenants.weights)
    return {
        "served_share": dict(zip(tenants.names, (got * weights / (got @ weights)).tolist())),
        "served_by_weight": (got / got.max()).tolist(),
        "max_difference_tokens": float(np.ptp(over_time, axis=1).max()),
        "ttft_s": {
            name: asdict(Stats.of(latencies_of(result, tenants.indices == i).ttft / 1e3))
            for i, name in enumerate(tenants.names)
        },
        "tokens_per_s": float(tokens_by(result, round(duration_s * NS_PER_S)).sum() / duration_s),
        "preemptions": sum(totals.num_preemptions for totals in result.instances),
    }


# --- measured ---


def measure(preset: str, ends_at: float, shapes: Sequence[str], *, width: int) -> dict[str, Any]:
    """Until `ends_at` of `time.monotonic`."""
    torch.set_num_threads(1)
    with (
        make_world(
            "",
            preset,
            AdapterShape(ranks=(8,)),
            2,
            mode="cached",
            max_num_seqs=16,
            max_num_batched_tokens=512,
        ) as world,
        world.engine() as engine,
    ):
        began_at = time.monotonic()
        rate = rate_of(engine, world.adapter_ids, began_at + BURST_SHARE * (ends_at - began_at))
        began_at = time.monotonic()
        left_s = max(0.0, ends_at - began_at)
        results: dict[str, Any] = {"preset": preset, "requests_per_s": rate}
        share, of_all = 0.0, sum(SHARES[name] for name in shapes)
        for name in shapes:
            part = SHARES[name] / of_all
            share += part
            seconds = max(TOY_S, part * left_s)  # more than either policy's clock shows then
            clients = engine_clients(name, rate, seconds, width)
            results[name] = compared(
                engine,
                world.adapter_ids,
                clients,
                began_at + share * left_s,
                seconds,
                with_guest=name == "flood",
            )
            print(name, results[name]["throughput_ratio"], flush=True)
    if "flood" in results:
        flood = results["flood"]
        alone_ms, step_ms = flood["alone"]["ttft_ms"][0]["p99"], flood["fair"]["longest_step_ms"]
        flood["ttft_p99_bound_ms"] = 1.5 * alone_ms + step_ms
    return results


def rate_of(engine: Engine, adapter_ids: Sequence[int], ends_at: float) -> float:
    """Requests with long prompts and sixteen tokens each that the engine can do in a second, by a burst."""
    burst = trace_of([(np.zeros(16), LONG, 16, 1.0)], 1.0, ["burst"])
    done = run_lanes({"burst": Lane(engine, "fcfs", burst, adapter_ids)}, ends_at)["burst"]
    return float(done["tokens_per_s"]) / (LONG + OUTPUT_WEIGHT * 16)


def engine_clients(name: str, rate: float, seconds: float, width: int) -> list[Client]:
    """Whose rates are so many times `rate`."""

    def client(times: float, prompt: int, response: int, weight: float = 1.0) -> Client:
        return np.arange(0.0, seconds, 1.0 / (times * rate)), prompt, response, weight

    if name == "flood":
        flood = client(1.2, LONG, 16)
        return [(np.concatenate((np.zeros(width), flood[0])), *flood[1:]), client(0.2, SHORT, 8)]
    return {
        "both overloaded": [client(1.0, LONG, 16), client(2.0, LONG, 16)],
        "short beside long answers": [client(3.0, LONG, 4), client(2.0, 16, 64)],
        "weights 1 and 3": [client(2.0, LONG, 16), client(2.0, LONG, 16, 3.0)],
    }[name]


def compared(
    engine: Engine,
    adapter_ids: Sequence[int],
    clients: Sequence[Client],
    ends_at: float,
    seconds: float,
    *,
    with_guest: bool,
) -> dict[str, Any]:
    """By policy; of a flood also what its guest has `alone`. `throughput_ratio`: of what was served in a
    second, fair by first come first served; `steps_ratio`: in a step."""
    trace = trace_of(clients, seconds, [f"client {i + 1}" for i in range(len(clients))])
    lanes = {policy: Lane(engine, policy, trace, adapter_ids) for policy in POLICIES}
    if with_guest:
        lanes["alone"] = Lane(engine, "fair", trace_of(clients[1:], seconds, ["guest"]), adapter_ids)
    results: dict[str, Any] = dict(run_lanes(lanes, ends_at))
    fair, fcfs = (results[policy] for policy in POLICIES)
    results["throughput_ratio"] = fair["tokens_per_s"] / fcfs["tokens_per_s"]
    results["steps_ratio"] = fair["tokens_per_step"] / fcfs["tokens_per_step"]
    return results


if __name__ == "__main__":
    main()
