"""The gated activation of the feed-forward layer."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from toppings.ops.dispatch import gpu_kernels, kernels

Activation = Callable[[Tensor], Tensor]


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def gelu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def clamped_swiglu_reference(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    gate, up = gate_up.float()[:, ::2].clamp(max=limit), gate_up.float()[:, 1::2].clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up in fp32, rounded once. gate_up: [T, 2N] contiguous, gate first; returns [T, N]."""
    return _gate(gate_up, "silu_mul", silu_mul_reference)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up likewise, GELU by its approximation with tanh."""
    return _gate(gate_up, "gelu_mul", gelu_mul_reference)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1) likewise, of a gate of at most `limit` and an up from -limit to
    limit. In gate_up they take turns: gate, up, gate, up, ..."""
    reference = partial(clamped_swiglu_reference, alpha=alpha, limit=limit)
    return _gate(gate_up, "clamped_swiglu", reference, float(alpha), float(limit))


def _gate(gate_up: Tensor, name: str, reference: Activation, *numbers: float) -> Tensor:
    if (gpu := gpu_kernels("elementwise", gate_up)) is not None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        getattr(gpu, name)(out, gate_up, *numbers)
        return out
    if (fast := kernels("elementwise", gate_up)) is None:
        return reference(gate_up)
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], size)
    assert gate_up.is_contiguous()
    getattr(fast, name)(gate_up, gate_up.shape[0], 4 * out.numel(), out, gate_up, size, *numbers)
    return out


ACTIVATIONS: dict[str, Activation] = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}
"""By the names that checkpoints call them."""
