"""Which form serves the base model's products on this CPU: measured at the first start, kept beside the
cold-start profile, and measured again where CPU, threads, torch or the model's widths are others."""

import logging
import time
from pathlib import Path

import torch

from toppings.config import EngineConfig
from toppings.model.config import ModelConfig
from toppings.ops import product_profile
from toppings.ops.product_profile import ProductProfile
from toppings.ops.products import quantized_forms, rule_for, use_measured

logger = logging.getLogger(__name__)

MIN_MEASURED_PARAMETERS = 2**26
"""A smaller model is served by the rule: what could be gained is less than what measuring takes."""


def choose_products(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, state_dir: Path
) -> ProductProfile | None:
    """Has weights that are loaded from now on served as was measured, and logs the table. None where the rule
    serves: on a GPU, for a small or quantised model, and for a split one, whose parts must agree."""
    use_measured(dtype, {})
    if config.device != "cpu" or config.tensor_parallel_size > 1:
        return None
    if config.quantization != "none":
        logger.info("products with weights in %s: %s", config.quantization, quantized_forms())
        return None
    _tell_of_slow_dtype(config, model, dtype)
    if _num_parameters(model) < MIN_MEASURED_PARAMETERS:
        logger.info("products in %s, by what this CPU has: %s", dtype, rule_for(dtype))
        return None
    widths, path = _widths(model), products_path(state_dir, dtype)
    profile = ProductProfile.read(path)
    if profile is None or not profile.holds_here(dtype, widths):
        started_at = time.monotonic()
        profile = product_profile.measure(dtype, widths)
        logger.info("measured products with the model's weights in %.1f s", time.monotonic() - started_at)
        if profile.is_disturbed:
            logger.warning("%s: %s", disturbed(profile), rule_for(dtype))
            return None
        _keep(profile, path)
    use_measured(dtype, profile.forms())
    for line in profile.table():
        logger.info(line)
    return profile


def products_path(state_dir: Path, dtype: torch.dtype) -> Path:
    name = str(dtype).removeprefix("torch.")
    return state_dir / f"products-{name}-threads{torch.get_num_threads()}.json"


def disturbed(profile: ProductProfile) -> str:
    return (
        f"other work had the core for {profile.waited:.0%} of the time while products were measured: what"
        " serves is what this CPU's instructions suggest, and the next start measures again"
    )


def measure_anew(
    model: ModelConfig, dtype: torch.dtype, state_dir: Path
) -> tuple[ProductProfile, Path | None]:
    """For a model of any size; also where it is kept for a server with as many threads, None where other work
    disturbed it. Raises OSError."""
    path = products_path(state_dir, dtype)
    profile = product_profile.measure(dtype, _widths(model))
    if profile.is_disturbed:
        return profile, None
    state_dir.mkdir(parents=True, exist_ok=True)
    profile.write(path)
    return profile, path


def _keep(profile: ProductProfile, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.write(path)
    except OSError as error:
        logger.warning("the products' times are not kept, and will be measured again: %s", error)


def _widths(model: ModelConfig) -> dict[int, int]:
    """By each input width of the model's weights, its widest output."""
    widths: dict[int, int] = {}
    for num_in, num_out in _shapes(model):
        widths[num_in] = max(num_out, widths.get(num_in, 0))
    return widths


def _shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of one layer's fused weights and of the output layer."""
    _, sizes = model.base_shapes()
    groups = [sizes[:3], sizes[3:4], sizes[4:6], sizes[6:]]
    shapes = [(group[0][0], sum(num_out for _, num_out in group)) for group in groups]
    return [*shapes, (model.hidden_size, model.vocab_size)]


def _num_parameters(model: ModelConfig) -> int:
    *layer, head = (num_in * num_out for num_in, num_out in _shapes(model))
    return model.num_layers * sum(layer) + head


def _tell_of_slow_dtype(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    stored: torch.dtype = getattr(torch, model.dtype)
    if config.dtype != "auto" and dtype.itemsize > stored.itemsize:
        logger.warning(
            "--dtype %s reads %d bytes a parameter where the checkpoint has %d, so a token takes up to %g"
            " times as long; the CPU's sums are in float32 with --dtype auto, too",
            config.dtype,
            dtype.itemsize,
            stored.itemsize,
            dtype.itemsize / stored.itemsize,
        )
