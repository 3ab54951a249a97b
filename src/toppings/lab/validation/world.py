"""What a validation runs on: a model, random adapters for it, and engines with settings of their own."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toppings.adapters.registry import AdapterRecord
from toppings.cluster.perf_model import PerfModel
from toppings.config import EngineConfig
from toppings.engine.base import open_registry
from toppings.engine.engine import Engine
from toppings.lab.engines import running_engine
from toppings.lab.players.engine import preload_host
from toppings.lab.random_adapters import register_random
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.sim.settings import SimConfig
from toppings.sim.trace import IntArray
from toppings.synth import PRESETS, AdapterShape, write_model

MAX_MODEL_LEN = 512
WARM_UP_TOKENS = 16
NO_DRAIN_S = 3600.0
"""An engine's own clock goes on while a load's stands still, so that none of its deadlines may pass."""


@dataclass(frozen=True)
class World:
    """Adapter i of every trace has the id `adapter_ids[i]` and the rank `ranks[i]`, int32 [A]."""

    config: EngineConfig
    adapter_ids: Sequence[int]
    ranks: IntArray
    bytes_per_rank: int

    @property
    def adapter_names(self) -> list[str]:
        """As in every trace."""
        return [f"adapter-{i}" for i in range(len(self.ranks))]

    @property
    def adapter_bytes(self) -> int:
        """Of all adapters."""
        return int(self.ranks.sum()) * self.bytes_per_rank

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[Engine]:
        """One that has run, with all adapters in host memory; on the device only in mode `cached`."""
        with running_engine(replace(self.config, **settings)) as engine:
            preload_host(engine.adapters, self.adapter_ids)
            warm_up(engine)
            yield engine

    def sim_config(self, engine: Engine, model: PerfModel, **settings: Any) -> SimConfig:
        """The simulated server that is like `engine`, which was built with `settings`."""
        limits, config = engine.scheduler.limits, replace(self.config, **settings)
        return SimConfig(
            perf_model=model,
            policy="round_robin",
            mode=config.mode,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            max_adapter_wait_s=limits.max_adapter_wait_s,
            scheduling_policy=limits.scheduling_policy,
            page_size=engine.info.page_size,
            kv_cache_tokens=engine.info.num_pages * engine.info.page_size,
            device_pool_bytes=engine.adapters.pool.capacity_bytes,
            eviction=config.eviction,
            bytes_per_rank=self.bytes_per_rank,
            num_layers=engine.adapters.pool.num_layers,
        )


@contextmanager
def make_world(
    model: str, preset: str, adapters: AdapterShape, num_adapters: int, **settings: Any
) -> Iterator[World]:
    """`model`: a checkpoint's directory, or empty: random weights of the shape `preset`. All that is made is
    gone afterwards. `settings` are of every engine. Raises ValueError where the model cannot be served.
    """
    with tempfile.TemporaryDirectory(prefix="toppings-validation-") as directory:
        work = Path(directory)
        if not model:
            write_model(work / "model", PRESETS[preset])
        path = Path(model) if model else work / "model"
        config = EngineConfig(model=str(path), state_dir=str(work / "state"), **settings)
        registry = open_registry(config)
        try:
            yield _world(config, register_random(registry, adapters, num_adapters))
        finally:
            registry.close()


def _world(config: EngineConfig, records: Sequence[AdapterRecord]) -> World:
    sizes = {record.num_bytes / record.rank for record in records}
    assert len(sizes) == 1, f"bytes per rank differ: {sizes}"
    needed = sum(record.num_bytes for record in records)
    return World(
        replace(
            config,
            max_model_len=MAX_MODEL_LEN,
            device_pool_bytes=needed,
            host_store_bytes=2 * needed,
            max_adapter_wait_s=NO_DRAIN_S,
        ),
        [record.adapter_id for record in records],
        np.array([record.rank for record in records], dtype=np.int32),
        int(sizes.pop()),
    )


def warm_up(engine: Engine) -> None:
    """Steps of the base model alone: the adapters stay where they are."""
    for i in range(2):
        sampling = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest(f"warm-up-{i}", [1] * WARM_UP_TOKENS, sampling))
        engine.step()
    while engine.has_requests:
        engine.step()
