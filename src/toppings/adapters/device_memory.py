"""The device's memory for adapters, and what brings them there, as the configuration asks for them."""

from typing import TYPE_CHECKING

import torch

from toppings.adapters.cuda_loader import CudaLoader
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.loader import CpuLoader, Loader
from toppings.adapters.modes import LoadingMode
from toppings.adapters.registry import AdapterRegistry
from toppings.config import EngineConfig

if TYPE_CHECKING:
    from toppings.adapters.mirror import Lead

DEFAULT_NUM_SLOTS = 1024


def make_pool(
    registry: AdapterRegistry, config: EngineConfig, mode: LoadingMode, lead: "Lead | None"
) -> DevicePool:
    make = DevicePool if lead is None else lead.make_pool
    return make(
        registry.shapes.num_layers,
        config.device_pool_bytes,
        getattr(torch, registry.dtype),
        config.device,
        num_slots=DEFAULT_NUM_SLOTS + (registry.count() if mode.pins_all else 0),
    )


def make_loader(pool: DevicePool, config: EngineConfig, lead: "Lead | None") -> Loader:
    if lead is not None:
        return lead.make_loader(pool, config.device, config.link_gbps)
    if config.device == "cuda":
        return CudaLoader(pool.arena)
    return CpuLoader(pool.arena, link_gbps=config.link_gbps)
