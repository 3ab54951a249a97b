"""What it is worth that a router knows which prompts' beginnings its servers have computed, by simulation.

    python benchmarks/prefix_routing.py --json FILE     # two minutes on one core
    python benchmarks/prefix_routing.py --toy

Conversations of five turns on average, written to a file of Mooncake's form and read from it, on eight
servers; beside them one server with the cache and the speed of all. `cached`: share of the prompts' tokens
that were found in a cache; `imbalance`: the standard deviation of the servers' busy time over its mean.
Before that, what a decision costs, in processor time: for a prompt of `--blocks` blocks of which every server
was sent a part of its own length, without booking (`choose_us`) and with it (`place_us`). Ends in one JSON
line.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.perf_model import LinearModel, PerfModel, load_perf_model
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.simulation.metrics import summarize_run
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import load_trace
from toppings.sim.settings import SimConfig, base_tpt_ms
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import preset
from toppings.sim.trace import Trace, write_trace

POLICIES = ("rank_aware", "rank_aware_residency")
CONTEXT_LEN = 20_000
NAMES = [number.to_bytes(16, "little") for number in range(256)]
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """`kv_cache_tokens` of each server; `rates` in requests/s."""

    rates: tuple[float, ...] = (6.0,)
    duration_s: float = 90.0
    seeds: int = 5
    num_servers: int = 8
    num_adapters: int = 64
    kv_cache_tokens: int = 131_072
    fleets: tuple[int, ...] = (60, 1000)
    num_decisions: int = 2000


TOY = Plan(rates=(2.0,), duration_s=30.0, seeds=1, num_servers=2, fleets=(4,), num_decisions=20)


def trace_of(plan: Plan, rate: float, seed: int, directory: Path) -> Trace:
    workload = replace(preset("conversations"), rate=rate, duration_s=plan.duration_s)
    path = directory / f"{rate}-{seed}.jsonl"
    write_trace(workload.make_trace(seed), path)
    return load_trace(path, TraceOptions(num_adapters=plan.num_adapters, seed=seed))


def faster(model: PerfModel, times: int) -> PerfModel:
    """A machine that takes a part of the time for everything."""

    def scaled(forms: dict[str, LinearModel]) -> dict[str, LinearModel]:
        return {
            name: LinearModel({feature: ms / times for feature, ms in form.coefficients.items()})
            for name, form in forms.items()
        }

    return replace(model, decode_forms=scaled(model.decode_forms), prefill_forms=scaled(model.prefill_forms))


def config_of(plan: Plan, seed: int, **changes: Any) -> SimConfig:
    model = load_perf_model("published:mbgmv")
    settings = {
        "perf_model": model,
        "num_instances": plan.num_servers,
        "slo_tpt_ms": 1.5 * base_tpt_ms(model),
        "max_model_len": CONTEXT_LEN,
        "kv_cache_tokens": plan.kv_cache_tokens,
        "seed": seed,
    }
    return SimConfig(**{**settings, **changes})


def alone(plan: Plan) -> Row:
    """Settings of one server in place of all."""
    return {
        "num_instances": 1,
        "perf_model": faster(load_perf_model("published:mbgmv"), plan.num_servers),
        "kv_cache_tokens": plan.num_servers * plan.kv_cache_tokens,
        "max_num_seqs": plan.num_servers * SimConfig.max_num_seqs,
        "max_num_batched_tokens": plan.num_servers * SimConfig.max_num_batched_tokens,
        "device_pool_bytes": plan.num_servers * SimConfig.device_pool_bytes,
    }


def simulated(plan: Plan) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as directory:
        for rate in plan.rates:
            traces = [trace_of(plan, rate, seed, Path(directory)) for seed in range(plan.seeds)]
            yield {"rate": rate, "case": "one server", **means(plan, traces, alone(plan))}
            for policy in POLICIES:
                for prefix_routing in ("off", "on"):
                    changes = {"policy": policy, "prefix_routing": prefix_routing}
                    case = f"{policy}, {prefix_routing}"
                    yield {"rate": rate, "case": case, **means(plan, traces, changes)}


def means(plan: Plan, traces: list[Trace], changes: Row) -> Row:
    """Over the seeds, and their standard deviations."""
    rows = []
    for seed, trace in enumerate(traces):
        result = Simulator(config_of(plan, seed, **changes), trace).run()
        summary, busy = summarize_run(result), np.array([each.busy_s for each in result.instances])
        rows.append(
            {
                "cached": summary.cached_share or 0.0,
                "ttft_mean_ms": summary.ttft_ms.mean,
                "ttft_p99_ms": summary.ttft_ms.p99,
                "attainment": summary.slo_attainment,
                "imbalance": float(busy.std() / busy.mean()),
            }
        )
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    spread = {name: float(column.std()) for name, column in columns.items()}
    return {**{name: float(column.mean()) for name, column in columns.items()}, "spread": spread}


# --- decisions ---


def decisions(plan: Plan, num_blocks: int) -> Iterator[Row]:
    for num_servers in plan.fleets:
        rng, names = random.Random(num_servers), count()
        snapshots = [
            InstanceSnapshot(
                instance_id=f"s{i}", perf_model=load_perf_model("published:mbgmv"), kv_tokens_total=4e5
            )
            for i in range(num_servers)
        ]
        brain = Dispatcher(make_policy("rank_aware", PolicySettings(slo_tpt_ms=60.0)), snapshots)
        for snapshot in snapshots:
            for _ in range(4):
                brain.sent(request_of(next(names), rng.randint(1, num_blocks)), snapshot.instance_id)
        requests = [request_of(next(names), num_blocks) for _ in range(plan.num_decisions)]
        started_at = time.process_time()
        for request in requests:
            depths = brain._prefixes.depths(request.blocks)
            assert depths is not None
            brain.policy.choose(request, brain.fleet.finding(depths * request.block_tokens))
        chosen_at = time.process_time()
        for request in requests:
            brain.place(request, 0.0)
            brain.ended(request.request_id)
        placed_at = time.process_time()
        yield {
            "servers": num_servers,
            "blocks": num_blocks,
            "choose_us": (chosen_at - started_at) / len(requests) * 1e6,
            "place_us": (placed_at - chosen_at) / len(requests) * 1e6,
        }


def request_of(number: int, num_blocks: int) -> RequestSnapshot:
    tokens = 256 * num_blocks + 64
    return RequestSnapshot(str(number), f"a{number % 512}", 8, tokens, 128.0, 0, NAMES[:num_blocks], 256.0)


def main() -> None:
    parser = make_parser(__doc__, "a few requests")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="loads of each kind")
    parser.add_argument("--blocks", type=int, default=32, help="of a prompt, for the times of decisions")
    options = parse(parser)
    plan = TOY if options.toy else Plan(seeds=options.seeds)
    found: dict[str, list[Row]] = {"decisions": [], "simulated": []}
    for name, rows in (("decisions", decisions(plan, options.blocks)), ("simulated", simulated(plan))):
        for row in rows:
            found[name].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "spread"})
    finish(options, "prefix_routing", **found)


if __name__ == "__main__":
    main()
