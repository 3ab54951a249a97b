"""Who is served how much: tenants that compete, with fair scheduling and first come first served beside it.

    python benchmarks/fairness.py --json benchmarks/results/fairness.json
    python benchmarks/fairness.py --preset tiny --seconds 90
    python benchmarks/fairness.py --toy

Simulated, ten minutes each, with the published costs of a 7B model: the two-client shapes of the synthetic
workloads of Sheng et al. (OSDI 2024). Two that ask for too much, at different rates; one that comes and goes,
within its share and beyond it; prompts and answers of different lengths; one that asks for more and more; and
weights. Told for each tenant: its share of the tokens while all compete, by weight, a prompt's once and drawn
ones twice, and TTFT; for both: the largest difference of what tenants got that were backlogged throughout,
and tokens per second.

Measured, on an engine in this process: one tenant floods it, 250 requests wide, with long prompts, the other
sends short requests, one every so often; then the shapes above that overload it, each for `--seconds`, at
rates that are so many times what the engine can do. Time is the processor time of the engine, and passes at
once where nothing runs, so that others on the machine do not count; beside it stand steps, tokens and loads,
which do not depend on the machine. Ends in one JSON line.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from toppings.cluster.perf_model import load_perf_model
from toppings.engine.fair_queue import OUTPUT_WEIGHT
from toppings.lab.players.engine import EnginePlayer
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.simulation.metrics import latencies_of, tokens_by
from toppings.lab.summary import Stats
from toppings.lab.validation.world import World, make_world
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
ROUNDS = 4
COUNTED = ("steps", "prompt_tokens", "generation_tokens", "preemptions", "adapter_loads")


def main() -> None:
    parser = make_parser(__doc__, "a minute of each workload, and a small flood")
    parser.add_argument("--preset", default="small-211m", choices=tuple(PRESETS), help="model of the engine")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each overload on the engine")
    args = parse(parser)
    duration_s = MINUTE if args.toy else 10 * MINUTE
    finish(args, "fairness", simulated=simulate_all(duration_s), engine=measure(args))


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


class ProcessorClock:
    """Processor time of this process; sleeps pass at once."""

    def __init__(self) -> None:
        self._slept_s = 0.0

    def now(self) -> float:
        return time.process_time() + self._slept_s

    def sleep_until(self, at: float) -> None:
        self._slept_s += max(0.0, at - self.now())

    def stopped(self) -> AbstractContextManager[None]:
        return nullcontext()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    preset, width, num_guests = ("tiny", 12, 4) if args.toy else (args.preset, FLOOD_WIDTH, 60)
    long, short = (96, 24) if args.toy else (256, 64)
    seconds = 1.0 if args.toy else args.seconds
    torch.set_num_threads(1)
    shape = AdapterShape(ranks=(8,))
    with make_world(
        "", preset, shape, 2, mode="cached", max_num_seqs=16, max_num_batched_tokens=128 if args.toy else 512
    ) as world:
        return {
            "preset": preset,
            "flood": measured(world, width, num_guests, long, short, 1 if args.toy else ROUNDS),
            "overload": overloads(world, long, seconds),
        }


def overloads(world: World, num_prompt: int, seconds: float) -> dict[str, Any]:
    """Two clients that ask for more than there is, by policy: what each got, by weight, of what got most."""
    burst = played(world, "fcfs", [(np.zeros(16), num_prompt, 16, 1.0)])
    rate = 16 / burst["seconds"]  # of requests like these that the engine can do

    def client(times: float, prompt: int, response: int, weight: float = 1.0) -> Client:
        return np.arange(0.0, seconds, 1.0 / (times * rate)), prompt, response, weight

    shapes = {
        "both overloaded": [client(1.0, num_prompt, 16), client(2.0, num_prompt, 16)],
        "short beside long answers": [client(3.0, num_prompt, 4), client(2.0, 16, 64)],
        "weights 1 and 3": [client(2.0, num_prompt, 16), client(2.0, num_prompt, 16, 3.0)],
    }
    results: dict[str, Any] = {"seconds": seconds}
    for name, clients in shapes.items():
        trace = trace_of(clients, seconds, [f"client {i + 1}" for i in range(len(clients))])
        results[name] = {policy: served(world, policy, trace, seconds) for policy in POLICIES}
    return results


def served(world: World, policy: str, trace: Trace, seconds: float) -> dict[str, Any]:
    """Until an instant; what is left then is ended. A prompt counts with its first token."""
    tenants = trace.tenants
    assert tenants is not None
    got = np.zeros(len(tenants.names))
    arrivals, prompts = trace.arrivals_s.tolist(), trace.prompt_tokens.tolist()
    with world.engine(scheduling_policy=policy) as engine:
        clock = ProcessorClock()
        messages = EnginePlayer(engine, world.adapter_ids, clock, is_cacheable=True).requests_of(trace)
        began_at, num_added, has_begun = clock.now(), 0, [False] * len(trace)
        while (now := clock.now() - began_at) < seconds:
            while num_added < len(arrivals) and arrivals[num_added] <= now:
                engine.add(messages[num_added])
                num_added += 1
            for output in engine.step():
                index = int(output.request_id)
                got[tenants.indices[index]] += OUTPUT_WEIGHT * len(output.token_ids)
                got[tenants.indices[index]] += 0 if has_begun[index] else prompts[index]
                has_begun[index] = True
            if not engine.has_requests and num_added < len(arrivals):
                clock.sleep_until(began_at + arrivals[num_added])
        engine.abort_all("the time is over")
    by_weight = got / np.asarray(tenants.weights)
    return {"served_by_weight": (by_weight / by_weight.max()).tolist(), "tokens_per_s": got.sum() / seconds}


def measured(
    world: World, width: int, num_guests: int, long: int, short: int, num_rounds: int
) -> dict[str, Any]:
    """The flood is there from the beginning; guests come one every so often while it lasts.

    Steps in which two adapters take part are dearer, whoever decides: so the ratio is told for one adapter
    that both use, too.
    """
    flood: Client = (np.zeros(width), long, 16, 1.0)
    flood_s = played(world, "fcfs", [flood])["seconds"]
    guests: Client = (np.linspace(0.05, 0.8, num_guests) * flood_s, short, 8, 1.0)
    alone = played(world, "fair", [guests])
    runs = best_of(world, [flood, guests], num_rounds)
    of_one = best_of(world, [flood, guests], num_rounds, has_one_adapter=True)
    return {
        "alone": alone,
        **runs,
        "ttft_p99_bound_ms": 1.5 * alone["ttft_ms"][0]["p99"] + runs["fair"]["longest_step_ms"],
        "throughput_ratio": runs["fcfs"]["seconds"] / runs["fair"]["seconds"],
        "throughput_ratio_one_adapter": of_one["fcfs"]["seconds"] / of_one["fair"]["seconds"],
        "steps_ratio": runs["fcfs"]["steps"] / runs["fair"]["steps"],
    }


def best_of(
    world: World, clients: Sequence[Client], num_rounds: int, *, has_one_adapter: bool = False
) -> dict[str, dict[str, Any]]:
    """By policy, its shortest run: what else runs on the machine only adds."""
    rounds = [
        {policy: played(world, policy, clients, has_one_adapter=has_one_adapter) for policy in POLICIES}
        for _ in range(num_rounds)
    ]
    return {policy: min((each[policy] for each in rounds), key=_seconds) for policy in POLICIES}


def _seconds(run: dict[str, Any]) -> float:
    return float(run["seconds"])


def played(
    world: World, policy: str, clients: Sequence[Client], *, has_one_adapter: bool = False
) -> dict[str, Any]:
    trace = trace_of(clients, 1e6, [f"client {i + 1}" for i in range(len(clients))])
    if has_one_adapter:
        trace = replace(trace, adapters=np.zeros_like(trace.adapters))
    steps_ms: list[float] = []
    with world.engine(scheduling_policy=policy) as engine:
        before = engine.stats(0).counters
        player = EnginePlayer(
            engine,
            world.adapter_ids,
            ProcessorClock(),
            on_step=lambda step: steps_ms.append(step.ms),
            is_cacheable=True,  # all prompts are this trace's, and differ
        )
        outcomes = player.play(trace)
        after = engine.stats(0).counters
    assert trace.tenants is not None
    ttft_ms = np.array([outcome.ttft_ms for outcome in outcomes])
    return {
        "seconds": max(outcome.sent_at + outcome.e2e_ms / 1e3 for outcome in outcomes),
        "ttft_ms": [asdict(Stats.of(ttft_ms[trace.tenants.indices == i])) for i in range(len(clients))],
        "longest_step_ms": max(steps_ms),
        **{name: after[name] - before[name] for name in COUNTED},
    }


if __name__ == "__main__":
    main()
