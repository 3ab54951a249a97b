"""The decoder's products, of weights as they were read: as they are, or quantised."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from toppings.model.config import ModelConfig
from toppings.ops.activation import ACTIVATIONS, Activation, clamped_swiglu
from toppings.ops.experts import ExpertLinears, Experts
from toppings.ops.linear import Linear
from toppings.ops.quantized import QuantizedWeight

HEAD_BITS = 8
"""Of the output layer of a quantised model: logits come straight from it (4 bits there were not measured)."""


def activation(config: ModelConfig) -> Activation:
    if config.swiglu is None:
        return ACTIVATIONS[config.activation]
    alpha, limit = config.swiglu
    return partial(clamped_swiglu, alpha=alpha, limit=limit)


def experts(
    take: Callable[[str], Tensor | QuantizedWeight], prefix: str, config: ModelConfig, bits: int | None
) -> Experts:
    def bias(name: str) -> Tensor | None:
        return plain(f"{name}.bias") if config.has_expert_bias else None

    def plain(name: str) -> Tensor:
        tensor = take(prefix + name)
        assert isinstance(tensor, Tensor)
        return tensor

    gate_up, down = (
        ExpertLinears(take(f"{prefix}{name}.weight"), config.num_experts, bits, bias(name))
        for name in ("experts.gate_up", "experts.down")
    )
    router = Linear(plain("router.weight"), bias("router"))
    top_k, is_normalised = config.num_experts_per_token, config.are_routes_normalised
    return Experts(router, gate_up, down, activation(config), top_k, is_normalised)
