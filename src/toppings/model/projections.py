"""The decoder's products, of weights as they were read: as they are, or quantised."""

from collections.abc import Callable

from torch import Tensor

from toppings.model.config import ModelConfig
from toppings.ops.activation import ACTIVATIONS
from toppings.ops.experts import ExpertLinears, Experts
from toppings.ops.linear import Linear
from toppings.ops.quantized import QuantizedWeight

HEAD_BITS = 8
"""Of the output layer of a quantised model: logits come straight from it (4 bits there were not measured)."""


def experts(
    take: Callable[[str], Tensor | QuantizedWeight], prefix: str, config: ModelConfig, bits: int | None
) -> Experts:
    gate_up, down = (
        ExpertLinears(take(f"{prefix}experts.{group}.weight"), config.num_experts, bits)
        for group in ("gate_up", "down")
    )
    router = take(prefix + "router.weight")
    assert isinstance(router, Tensor)
    activation = ACTIVATIONS[config.activation]
    top_k, is_normalised = config.num_experts_per_token, config.are_routes_normalised
    return Experts(Linear(router), gate_up, down, activation, top_k, is_normalised)
