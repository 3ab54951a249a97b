"""The verbs `profile cold-start`, `profile products` and `plan`: what cold starts and products cost here, and
what `auto` makes of it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.adapters.peft_kinds import MAX_RANK
from toppings.assist.cost import CostProfile
from toppings.assist.plan import compare
from toppings.config import ConfigError, EngineConfig
from toppings.core import MODULES, parse_targets

if TYPE_CHECKING:
    from toppings.ops.product_profile import ProductProfile


def measure_profile(config: EngineConfig) -> tuple[CostProfile, str]:
    """Measures anew, and keeps the profile where a server with the same settings reads it; also its path.

    Raises what `build_engine` raises.
    """
    from toppings.engine.assist import profile_path
    from toppings.engine.base import state_dir
    from toppings.engine.build import build_engine, set_threads

    set_threads(config)
    path = profile_path(config, state_dir(config))
    path.unlink(missing_ok=True)
    build_engine(replace(config, mode="cpu_assisted")).close()
    return CostProfile.read(path), str(path)


def measure_products(config: EngineConfig) -> tuple["ProductProfile", str]:
    """Measures anew how the CPU multiplies the model's weights; also what became of the result.

    Raises ConfigError for a GPU; ValueError, OSError.
    """
    import torch

    from toppings.engine.base import dtype_name, model_config, state_dir
    from toppings.engine.build import set_threads
    from toppings.engine.products import disturbed, measure_anew

    if config.device != "cpu":
        raise ConfigError(f"device is {config.device}; products are measured on the CPU")
    set_threads(config)
    model = model_config(config)
    profile, path = measure_anew(model, getattr(torch, dtype_name(config, model)), state_dir(config))
    return profile, disturbed(profile) if path is None else f"wrote {path}"


def read_or_measure_profile(config: EngineConfig) -> CostProfile:
    from toppings.engine.assist import profile_path
    from toppings.engine.base import state_dir
    from toppings.engine.build import set_threads

    set_threads(config)
    path = profile_path(config, state_dir(config))
    return CostProfile.read(path) if path.exists() else measure_profile(config)[0]


def print_plan(config: EngineConfig, *, rank: int, targets: str, num_tokens: int) -> None:
    """Raises ConfigError or ValueError for a rank or target that is none."""
    from toppings.engine.base import open_registry

    registry = open_registry(config)
    layout = uniform_layout(registry.shapes, registry.dtype, rank, targets)
    registry.close()
    comparison = compare(read_or_measure_profile(config), layout, num_tokens)
    where = f", emulated link of {config.link_gbps:g} GB/s" if config.link_gbps else ""
    table = Table("mode", "prefill ms", "over cached", title=f"rank {rank}, {num_tokens} tokens{where}")
    for mode, overhead_ms in comparison.overheads_ms().items():
        total_ms = comparison.cached_ms + overhead_ms
        table.add_row(mode, f"{total_ms:.2f}", f"{total_ms / comparison.cached_ms:.2f}x")
    Console().print(table)
    Console().print(f"auto: {comparison.plan.describe()}")


def uniform_layout(shapes: BaseShapes, dtype: str, rank: int, targets: str) -> AdapterLayout:
    """An adapter of one rank on `targets` (comma-separated names, or "all") of every layer."""
    names = parse_targets(targets)
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"rank is {rank}; it must be from 1 to {MAX_RANK}")
    ranks = [rank if name in names else 0 for name in MODULES]
    return AdapterLayout.build([ranks] * shapes.num_layers, shapes, dtype)
