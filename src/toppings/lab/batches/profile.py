"""`toppings profile batches`: times the steps of an engine in this process and fits performance models."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fitting import fit_perf_model
from toppings.cluster.measured import BASE, describe_base, perf_model_path
from toppings.config import EngineConfig
from toppings.engine.base import state_dir
from toppings.lab.batches.driver import BatchDriver
from toppings.lab.batches.engine import AdapterEngine, engine_with_adapters
from toppings.lab.batches.plan import decode_batches, prefill_batches
from toppings.lab.batches.steps import BatchProfile, BatchSpec, OnProgress, StepTimes, take_rounds
from toppings.lab.machine import describe_machine

NUM_DECODE, NUM_PREFILL = 56, 40
PREFILL_SHARE, MIN_ROUNDS = 0.4, 6
"""Prefills are so long that this share of the time suffices for so many rounds of them."""
PROBE_TOKENS = 64


def profile_batches(
    config: EngineConfig, spec: BatchSpec, *, command: str = "", on_progress: OnProgress = lambda *_: None
) -> tuple[BatchProfile, str]:
    """Measures, and keeps the model where a server with the same settings reads it; also that file's path.

    To be called by the main thread, as an engine's process calls its own: OpenMP is slower in others. Raises
    what `build_engine` raises, and ValueError where too few steps could be timed.
    """
    with engine_with_adapters(config, spec.adapters, on_progress) as own:
        rng = np.random.default_rng(config.seed)
        kinds = _plan(own, spec, rng)
        num_rounds = take_rounds(kinds, spec.seconds, rng, on_progress)
        decode, prefill = (kind.observations() for kind in kinds)
        model = replace(
            fit_perf_model(decode, prefill, origin=_origin(config), seed=config.seed),
            link_gbps=config.link_gbps or own.link_gbps(),
            disk_gbps=own.disk_gbps(),
            details={
                BASE: describe_base(own.registry),
                "model": own.registry.base_model,
                "adapters": f"{len(own.records)} of ranks {_list(spec.ranks)} on {_list(spec.targets)}",
                "rounds": f"{num_rounds}, in random order, seed {config.seed}; each batch's median",
                "link_gbps": "emulated" if config.link_gbps else "copies of 1 MiB",
                "disk_gbps": "packed adapters, not in the page cache",
                "command": command,
            },
        )
    path = perf_model_path(config, state_dir(config))
    path.write_text(model.to_json())
    return BatchProfile(model, decode, prefill, config.seed), str(path)


def _plan(own: AdapterEngine, spec: BatchSpec, rng: Generator) -> tuple[StepTimes, StepTimes]:
    """Decode and prefill batches; these as long as the machine has the time for."""
    driver = BatchDriver(own.engine, {record.name: record.adapter_id for record in own.records})
    ranks = {record.name: record.rank for record in own.records}
    limits = driver.limits(own.config.max_num_batched_tokens)
    num_tokens = min(PROBE_TOKENS, limits.max_num_batched_tokens, limits.max_context(1))
    probe = (BatchRow(0, num_tokens=num_tokens),)
    ms_per_token = min(driver.prefill_ms(probe)[0] for _ in range(3)) / num_tokens
    mean_tokens = PREFILL_SHARE * spec.seconds * 1e3 / (MIN_ROUNDS * NUM_PREFILL * ms_per_token)
    max_tokens = max(num_tokens, int(4 * mean_tokens))  # lengths are drawn log-uniformly
    return (
        StepTimes(decode_batches(ranks, limits, NUM_DECODE, rng), driver.decode_ms),
        StepTimes(prefill_batches(ranks, limits, NUM_PREFILL, max_tokens, rng), driver.prefill_ms),
    )


def _origin(config: EngineConfig) -> str:
    machine = describe_machine()
    threads = config.num_threads or machine["num_cores"]
    return f"measured on {', '.join(machine['gpus']) or machine['cpu']}, {threads} threads"


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
