"""The gated activation of the feed-forward layer."""

from torch import Tensor
from torch.nn import functional

from toppings.ops.dispatch import gpu_kernels, kernels


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up in fp32, rounded once. gate_up: [T, 2N] contiguous, gate first; returns [T, N]."""
    if (gpu := gpu_kernels("elementwise", gate_up)) is not None:
        gpu.silu_mul(out := gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), gate_up)
        return out
    if (fast := kernels("elementwise", gate_up)) is None:
        return silu_mul_reference(gate_up)
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], size)
    assert gate_up.is_contiguous()
    fast.silu_mul(gate_up, gate_up.shape[0], 4 * out.numel(), out, gate_up, size)
    return out
