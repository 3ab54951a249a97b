"""Performance models that were measured here: where they are kept, and which base model one is of."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.config import EngineConfig
from toppings.core import MODULES

if TYPE_CHECKING:
    from toppings.adapters.registry import AdapterRegistry

logger = logging.getLogger(__name__)

BASE = "base"
"""The detail of a measured model that says which base model it is of."""


def perf_model_path(config: EngineConfig, state_dir: Path) -> Path:
    """One file for each set of settings that the times depend on."""
    stored = "" if config.quantization == "none" else f"-{config.quantization}"
    return state_dir / f"batches-{config.device}-{config.dtype}{stored}-threads{config.num_threads}.json"


def describe_base(registry: "AdapterRegistry") -> str:
    """Shapes and arithmetic of the base model that a registry's adapters are for."""
    shapes = registry.shapes
    sizes = ", ".join(f"{name} {i}x{o}" for name, (i, o) in zip(MODULES, shapes.sizes, strict=True))
    mixture = shapes.mixture
    experts = f", {mixture.num_experts} experts, {mixture.num_per_token} a token" if mixture else ""
    return f"{shapes.num_layers} layers, {sizes}{experts}, {registry.dtype}"


def read_perf_model(spec: str, config: EngineConfig, registry: "AdapterRegistry") -> PerfModel | None:
    """The model that `spec` names, or where it is empty the one that was measured for an engine of `config`.

    None where none was, or for another base model. Raises ValueError for a file that holds no model.
    """
    if spec:
        return load_perf_model(spec)
    path = perf_model_path(config, registry.state_dir)
    if not path.exists():
        return None
    try:
        model = load_perf_model(str(path))
    except ValueError as error:
        raise ValueError(f"{error}; run `toppings profile batches` again, or delete the file") from error
    if is_of_base(model, registry):
        return model
    logger.warning("%s was measured for another base model: it is not used", path)
    return None


def is_of_base(model: PerfModel, registry: "AdapterRegistry") -> bool:
    return model.details.get(BASE) == describe_base(registry)
