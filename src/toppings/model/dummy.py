"""Weights of a model without a checkpoint, drawn at random.

For measuring speed: such a model says nothing sensible. Weights are drawn with a spread that keeps
activations near one, so that no product meets overflow or zeros, on which some hardware is faster."""

import torch
from torch import Tensor

from toppings.model.config import ModelConfig
from toppings.model.weights import weight_shapes


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0
) -> dict[str, Tensor]:
    """The decoder's tensors by name, as `read_weights` gives them, drawn on the device itself.

    Norms multiply by 1, biases and sinks are 0, matrices normal with variance 1 / inputs, embeddings with
    variance 1. The same seed gives the same weights on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm"):
            weight.fill_(1.0 - config.norm_base)
        elif name.endswith((".bias", ".sinks")):
            weight.zero_()
        else:
            weight.normal_(std=1.0 if name == "embed" else shape[1] ** -0.5, generator=generator)
        weights[name] = weight
    return weights
