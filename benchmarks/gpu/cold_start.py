"""What does a cold adapter cost the first token, in every mode?

    python benchmarks/gpu/cold_start.py                     # Llama-2-7B's shape
    python benchmarks/gpu/cold_start.py --toy --device cpu  # the built-in model over an emulated link

One engine after another over the same adapters, which are in host memory. Between two requests an adapter
that fills the device pool is loaded, so that the one asked for next has gone. `cached` is measured first and
last. The time is from the request's arrival to its first token, alone on the device. Beside it: what the
measured profile predicts for each mode, and where that is more than 15 % off. Ends in one JSON line. Not yet
run on a GPU.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

from common import (
    ALL_LINEAR,
    QKV,
    Bench,
    bring_to_device,
    finish,
    greedy,
    host_copy_gbps,
    make_parser,
    median,
    note,
    noted,
    open_bench,
    random_prompt,
)

from toppings.assist.cost import CostProfile
from toppings.assist.plan import Comparison, compare
from toppings.config import MODES
from toppings.engine.assist import profile_path
from toppings.engine.base import open_registry, state_dir
from toppings.engine.engine import Engine
from toppings.lab.aims import Aim, at_most
from toppings.lab.players.engine import preload_host
from toppings.messages import AddRequest

FILLER = "filler"
MISS = 0.15
CPU_FORMS = ("cpu_assisted", "cpu_shrink")
TOY_LINK_GBPS = 0.5
TOY_RANK_DIVISOR = 8


@dataclass(frozen=True)
class Case:
    """A prompt for a cold adapter. `limit`: of auto's first token over that of cached, 0: it is judged by how
    much of the other modes' overhead is left."""

    targets: tuple[str, ...]
    rank: int
    num_tokens: int
    limit: float = 0.0

    @property
    def kind(self) -> str:
        return f"{'qkv' if self.targets == QKV else 'all'}-r{self.rank}"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.num_tokens} tokens"


CASES = (
    Case(QKV, 64, 128, 1.03),
    Case(QKV, 64, 512, 1.03),
    Case(ALL_LINEAR, 64, 512, 1.03),
    Case(ALL_LINEAR, 128, 64),
    Case(ALL_LINEAR, 256, 64),
)
OF_PIPELINED, OF_ON_DEMAND = 0.6, 0.4
"""What auto may have of the overhead of these modes."""
WARM_UP = 3

Times = dict[str, dict[str, list[float]]]
"""ms of first tokens, by mode and case."""


def measure(bench: Bench, mode: str, rounds: int) -> dict[str, list[float]]:
    warm_up = 0 if bench.options.toy else WARM_UP
    (filler,) = bench.kinds[FILLER]
    settings: dict[str, Any] = {} if mode == "cached" else {"device_pool_bytes": filler.num_bytes}
    times: dict[str, list[float]] = {case.name: [] for case in CASES}
    with bench.engine(mode, **settings) as engine:
        preload_host(engine.adapters, [record.adapter_id for record in bench.records])
        for number in range(rounds + warm_up):
            for case in CASES:
                if mode != "cached":
                    bring_to_device(engine, filler.adapter_id)
                (adapter_id,) = bench.ids(case.kind)
                tier = engine.adapters.tier_of(adapter_id)
                assert (tier == "device") == (mode == "cached"), f"the adapter was on {tier}"
                prompt = random_prompt(number, case.num_tokens)
                ms = first_token_ms(engine, AddRequest("it", prompt, greedy(1), adapter_id))
                times[case.name] += [ms] if number >= warm_up else []
    return times


def first_token_ms(engine: Engine, request: AddRequest) -> float:
    started_at = time.perf_counter()
    refusal = engine.add(request)
    assert refusal is None, refusal
    while not (outputs := engine.step()):
        engine.poll()
    ms = (time.perf_counter() - started_at) * 1e3
    if outputs[0].error is not None:
        raise RuntimeError(f"the request failed: {outputs[0].error}")
    assert request.adapter_id is not None
    while engine.adapters.load_of(request.adapter_id) is not None:
        engine.poll()
    return ms


def plans(bench: Bench) -> dict[str, Comparison]:
    """By case; empty where no mode measured a profile."""
    path = profile_path(bench.config, state_dir(bench.config))
    if not path.exists():
        return {}
    profile = CostProfile.from_json(path.read_text())
    registry = open_registry(bench.config)
    try:
        found = {}
        for case in CASES:
            with registry.open_packed(bench.ids(case.kind)[0]) as packed:
                found[case.name] = compare(profile, packed.layout, case.num_tokens)
        return found
    finally:
        registry.close()


def aims_of(ms: dict[str, dict[str, float]]) -> list[Aim]:
    """Those for which the modes were measured."""
    aims = []
    for case in CASES:
        by_mode = {mode: times[case.name] for mode, times in ms.items()}
        if not {"cached", "auto"} <= by_mode.keys():
            continue
        cached, auto = by_mode["cached"], by_mode["auto"]
        if case.limit:
            aims.append(at_most(f"{case.name}: auto over cached", auto / cached, case.limit))
            continue
        for mode, share in (("pipelined", OF_PIPELINED), ("on_demand", OF_ON_DEMAND)):
            if mode in by_mode and by_mode[mode] > cached:
                part = (auto - cached) / (by_mode[mode] - cached)
                aims.append(at_most(f"{case.name}: auto's overhead over that of {mode}", part, share))
    return aims


def medians(samples: Times) -> dict[str, dict[str, float]]:
    return {mode: {name: median(each) for name, each in times.items()} for mode, times in samples.items()}


def predictions(ms: dict[str, dict[str, float]], compared: dict[str, Comparison]) -> dict[str, Any]:
    """By case: what auto does, and per mode the predicted ms (cached as measured, and the predicted
    overhead) over the measured ones, less 1."""
    found: dict[str, Any] = {}
    for name, comparison in compared.items():
        overheads = comparison.overheads_ms()
        errors = {
            mode: (ms["cached"][name] + overheads[mode]) / times[name] - 1
            for mode, times in ms.items()
            if mode in overheads and mode != "cached"
        }
        found[name] = {"auto": comparison.plan.describe(), "overhead_ms": overheads, "errors": errors}
    return found


def winners(ms: dict[str, dict[str, float]]) -> dict[str, str]:
    """By case, the better of the two forms in which the CPU computes, where both were measured."""
    forms = [mode for mode in CPU_FORMS if mode in ms]
    return {case.name: min(forms, key=lambda mode: ms[mode][case.name]) for case in CASES if len(forms) > 1}


def make_adapters(bench: Bench) -> None:
    divisor = TOY_RANK_DIVISOR if bench.options.toy else 1
    for kind, case in {case.kind: case for case in CASES}.items():
        bench.register(kind, 1, ranks=(case.rank // divisor,), targets=case.targets)
    largest = max(case.rank for case in CASES)
    bench.register(FILLER, 1, ranks=(largest // divisor,), targets=ALL_LINEAR)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--modes", default=",".join(MODES), help="cached first")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if options.toy:
        options.modes, options.rounds = "cached,on_demand,pipelined,auto", 1
    return options


def main() -> int:
    options = parse(make_parser(__doc__))
    settings: dict[str, Any] = {"cuda_graphs": "off", "max_num_seqs": 4, "max_num_batched_tokens": 512}
    if options.toy:
        settings |= {"link_gbps": TOY_LINK_GBPS, "assist_workers": 1}
    else:
        settings |= {"max_model_len": 1024}
    samples: Times = {}
    failures: dict[str, str] = {}
    with open_bench(options, **settings) as bench:
        make_adapters(bench)
        modes = options.modes.split(",")
        for mode in modes:
            with noted(failures, mode):
                samples[mode] = measure(bench, mode, options.rounds)
                note("cold_start", options, ttft_ms=medians(samples))
        last = measure(bench, "cached", options.rounds)
        compared = plans(bench)
        num_bytes = {kind: records[0].num_bytes for kind, records in bench.kinds.items()}
    drift = {name: median(last[name]) / median(times) for name, times in samples["cached"].items()}
    samples["cached"] = {name: [*times, *last[name]] for name, times in samples["cached"].items()}
    ms = medians(samples)
    limit = host_copy_gbps(options)
    predicted = predictions(ms, compared)
    misses = [
        f"{name}, {mode}: {error:+.0%}"
        for name, each in predicted.items()
        for mode, error in each["errors"].items()
        if abs(error) > MISS
    ]
    return finish(
        "cold_start",
        options,
        aims_of(ms),
        failures=failures,
        ttft_ms=ms,
        cached_drift=drift,
        better_cpu_form=winners(ms),
        predictions=predicted,
        predictions_missed=misses,
        host_copy_gbps=limit,
        load_floor_ms={kind: size / limit / 1e6 for kind, size in num_bytes.items()},
        adapter_bytes=num_bytes,
        emulated_link_gbps=settings.get("link_gbps"),
    )


if __name__ == "__main__":
    sys.exit(main())
