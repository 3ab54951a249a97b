"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from toppings.ops.dispatch import gpu_kernels, kernels


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, base: float = 0.0) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (base + weight.float())).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, base: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (base + weight) over the last dimension, in fp32 and rounded once.

    x: [T, N] contiguous; weight: [N]; returns [T, N] of x's dtype.
    """
    if (gpu := gpu_kernels("elementwise", x)) is not None:
        gpu.rms_norm(out := torch.empty_like(x), x, weight, eps, base)
        return out
    if (fast := kernels("elementwise", x)) is None:
        return rms_norm_reference(x, weight, eps, base)
    out = torch.empty_like(x)
    assert x.is_contiguous()
    assert weight.dtype == x.dtype
    fast.rms_norm(x, x.shape[0], x.numel(), out, x, weight, x.shape[1], eps, base)
    return out


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float, base: float = 0.0) -> Tensor:
    """residual += x in place, then `rms_norm` of it. All [T, N] contiguous."""
    if (gpu := gpu_kernels("elementwise", x)) is not None:
        gpu.add_rms_norm(out := torch.empty_like(x), residual, x, weight, eps, base)
        return out
    if (fast := kernels("elementwise", x)) is None:
        return rms_norm_reference(residual.add_(x), weight, eps, base)
    out = torch.empty_like(x)
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert weight.dtype == residual.dtype == x.dtype
    fast.add_rms_norm(x, x.shape[0], x.numel(), out, residual, x, weight, x.shape[1], eps, base)
    return out
