"""An engine in this process with random adapters of its own on the device, of which nothing stays."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.assist.profile import LinkProbe
from toppings.config import EngineConfig
from toppings.core import MODULES
from toppings.engine.base import model_path, open_registry, state_dir
from toppings.engine.engine import Engine
from toppings.lab.batches.steps import OnProgress
from toppings.lab.engines import running_engine
from toppings.lab.machine import drop_page_cache
from toppings.synth import AdapterShape, write_adapters

MAX_ADAPTERS, MAX_ADAPTER_BYTES = 64, 2**30
COPY_BYTES = 2**20


@dataclass(frozen=True)
class AdapterEngine:
    """`records` are the adapters, all of which are on the device; `config` is what the engine runs with."""

    engine: Engine
    registry: AdapterRegistry
    config: EngineConfig
    records: list[AdapterRecord]

    def link_gbps(self) -> float:
        """Speed of a layer's copy to the device, 10^9 bytes per second."""
        adapters = self.engine.adapters
        probe = LinkProbe(adapters.loader, adapters.pool, adapters.shapes, adapters.host.arena.view)
        return COPY_BYTES / probe(COPY_BYTES) / 1e9

    def disk_gbps(self) -> float:
        """Speed at which the adapters were read from the disk, 10^9 bytes per second."""
        times = [self.engine.adapters.load_times(record.adapter_id) for record in self.records]
        return sum(record.num_bytes for record in self.records) / sum(t.read_ms for t in times) / 1e6


@contextmanager
def engine_with_adapters(
    config: EngineConfig, shape: AdapterShape, on_progress: OnProgress
) -> Iterator[AdapterEngine]:
    """An engine as `config` says, but for its state, its pools and its mode.

    Raises what `build_engine` raises.
    """
    home = state_dir(config)
    home.mkdir(parents=True, exist_ok=True)  # the disk on which adapters will be, too
    with tempfile.TemporaryDirectory(prefix="profile-", dir=home) as work:
        registry = open_registry(replace(config, state_dir=f"{work}/state"))
        try:
            _make_adapters(config, shape, registry, Path(work), on_progress)
            on_progress("building the engine", 0.0)
            own = _all_on_device(config, registry)
            with running_engine(own) as engine:
                yield AdapterEngine(engine, registry, own, registry.list())
        finally:
            registry.close()


def _make_adapters(
    config: EngineConfig, shape: AdapterShape, registry: AdapterRegistry, work: Path, on_progress: OnProgress
) -> None:
    """As many as `MAX_ADAPTER_BYTES` hold, at least one of each rank; none is left in the page cache."""
    num_written, num = count(1), _num_adapters(shape, registry)
    write_adapters(
        work / "adapters",
        model_path(config),
        shape,
        count=num,
        seed=config.seed,
        modules=registry.shapes.stored_modules,
        on_written=lambda _: on_progress("making adapters", next(num_written) / num),
    )
    report = registry.register_directory(work / "adapters")
    for error in report.failures.values():
        raise error
    drop_page_cache(registry.state_dir)


def _num_adapters(shape: AdapterShape, registry: AdapterRegistry) -> int:
    sizes = [size for name, size in zip(MODULES, registry.shapes.sizes, strict=True) if name in shape.targets]
    item_bytes = 4 if registry.dtype == "float32" else 2
    mean_rank = sum(shape.ranks) / len(shape.ranks)
    mean_bytes = item_bytes * registry.shapes.num_layers * mean_rank * sum(map(sum, sizes))
    return max(len(shape.ranks), min(MAX_ADAPTERS, int(MAX_ADAPTER_BYTES / mean_bytes)))


def _all_on_device(config: EngineConfig, registry: AdapterRegistry) -> EngineConfig:
    """Room for all adapters and for a probe of the link, which is not emulated. A step that is timed is over
    before the next begins."""
    num_bytes = sum(record.num_bytes for record in registry.list())
    num_bytes += 2 * COPY_BYTES * registry.shapes.num_layers
    return replace(
        config,
        state_dir=str(registry.state_dir),
        mode="cached",
        async_scheduling="off",
        link_gbps=0.0,
        step_log="",
        device_pool_bytes=num_bytes,
        host_store_bytes=num_bytes,
    )
