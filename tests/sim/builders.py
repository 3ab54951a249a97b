"""Small traces and configurations for tests of the simulator."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from toppings.cluster.perf_model import LinearModel, PerfModel, load_perf_model
from toppings.sim.records import SimResult
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace

PUBLISHED = load_perf_model("published:mbgmv")
EXTENDED = PerfModel(
    origin="made up: every feature costs something",
    decode_forms={
        "extended": LinearModel(
            {
                "steps": 20.0,
                "tokens": 0.01,
                "padded_ranks": 0.002,
                "rank_sum": 0.001,
                "distinct_rank_sum": 0.003,
                "context_tokens": 0.0007,
                "sequences": 0.005,
            }
        )
    },
    prefill_forms={
        "extended": LinearModel(
            {
                "steps": 10.0,
                "tokens": 0.05,
                "padded_ranks": 1e-4,
                "rank_sum": 2e-4,
                "distinct_rank_sum": 0.01,
                "context_tokens": 1e-5,
                "sequences": 0.2,
                "gathered_tokens": 0.001,
            }
        )
    },
    decode_form="extended",
    prefill_form="extended",
    link_gbps=24.0,
    disk_gbps=1.0,
)
STEP_MS = 10.0
FLAT = PerfModel(
    origin="made up: every step takes 10 ms",
    decode_forms={"bgmv": LinearModel({"steps": STEP_MS})},
    prefill_forms={"tokens": LinearModel({"steps": STEP_MS})},
    decode_form="bgmv",
    prefill_form="tokens",
    link_gbps=1.0,
)


def make_trace(
    arrivals_s: Sequence[float],
    *,
    prompt: Sequence[int] | int = 8,
    response: Sequence[int] | int = 4,
    adapters: Sequence[int] | None = None,
    ranks: Sequence[int] = (8,),
) -> Trace:
    num = len(arrivals_s)
    return Trace(
        np.array(arrivals_s, dtype=np.float64),
        np.array(adapters if adapters is not None else [0] * num, dtype=np.int32),
        np.resize(np.array(prompt, dtype=np.int32), num),
        np.resize(np.array(response, dtype=np.int32), num),
        np.array(ranks, dtype=np.int32),
        duration_s=max(arrivals_s[-1], 1.0),
        origin="test",
    )


def make_config(model: PerfModel = FLAT, **settings: Any) -> SimConfig:
    defaults = {"policy": "round_robin", "mode": "cached", "max_model_len": 1024, "kv_cache_tokens": 8192}
    return SimConfig(perf_model=model, **{**defaults, **settings})


def simulate(config: SimConfig, trace: Trace, **options: Any) -> SimResult:
    return Simulator(config, trace).run(**options)


def stepwise(config: SimConfig) -> SimConfig:
    return replace(config, is_stepwise=True)
