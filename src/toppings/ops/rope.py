"""Rotary position embedding, fused with the write of keys and values into the cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toppings.ops.dispatch import gpu_kernels, kernels
from toppings.ops.norm import rms_norm, rms_norm_reference


@dataclass(frozen=True)
class Rope:
    """inverse_frequencies: fp32 [R / 2], where the first R of a head's dimensions are turned; `scaling`
    multiplies cosine and sine (YaRN's attention factor)."""

    inverse_frequencies: Tensor
    scaling: float = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [T, R / 2], of int64 positions [T]."""
        angles = positions.to(torch.float32)[:, None] * self.inverse_frequencies
        return angles.cos().mul_(self.scaling), angles.sin().mul_(self.scaling)


@dataclass(frozen=True)
class HeadNorm:
    """Root-mean-square normalisation before rotation, times (base + weight): of each query and key head
    (Qwen3; q, k: [D]), or of all queries and of all keys of a token (OLMo 2; q: [H · D], k: [Hkv · D])."""

    q: Tensor
    k: Tensor
    eps: float
    base: float = 0.0
    is_whole: bool = False


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x[i], x[i + R/2]) turned by their angle: x [T, H, D], cos and sin fp32 [T, R / 2]; what is
    beyond R stays."""
    half = cos.shape[-1]
    low, high, rest = x.float().tensor_split((half, 2 * half), dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1).to(x.dtype)


def _normalise_whole_(qkv: Tensor, kv_size: int, norm: HeadNorm) -> None:
    q, k, _ = qkv.tensor_split((qkv.shape[1] - 2 * kv_size, qkv.shape[1] - kv_size), dim=1)
    for x, weight in ((q, norm.q), (k, norm.k)):
        x.copy_(rms_norm(x.contiguous(), weight, norm.eps, norm.base))


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot_mapping] = k, v. k, v: [T, Hkv, D]; caches: [slots, Hkv, D]; slot_mapping: int64 [T]."""
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


def rotate_and_store_reference_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    head_norm: HeadNorm | None = None,
) -> None:
    _, num_kv_heads, head_dim = k_cache.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if head_norm is not None:
        for x, weight in ((q, head_norm.q), (k, head_norm.k)):
            normed = x.flatten(1) if head_norm.is_whole else x
            x.copy_(rms_norm_reference(normed, weight, head_norm.eps, head_norm.base).view(x.shape))
    q.copy_(rotate_reference(q, cos, sin))
    k.copy_(rotate_reference(k, cos, sin))
    write_kv(k, v, k_cache, v_cache, slot_mapping)


def rotate_and_store_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    head_norm: HeadNorm | None = None,
) -> None:
    """Turns queries and keys in place (after `head_norm`, where given), then writes keys and values to the
    cache.

    qkv: [T, (H + 2 Hkv) · D] contiguous; cos, sin: fp32 [T, R / 2], R at most D; caches: [slots, Hkv, D];
    slot_mapping: int64 [T], the cache row of each token.
    """
    if head_norm is not None and head_norm.is_whole:
        _normalise_whole_(qkv, k_cache[0].numel(), head_norm)
        head_norm = None
    if (gpu := gpu_kernels("elementwise", qkv)) is not None:
        gpu.rotate_and_store(qkv, k_cache, v_cache, cos, sin, slot_mapping, head_norm)
        return
    if (fast := kernels("elementwise", qkv)) is None:
        rotate_and_store_reference_(qkv, cos, sin, k_cache, v_cache, slot_mapping, head_norm)
        return
    assert qkv.is_contiguous()
    assert k_cache.dtype == v_cache.dtype == qkv.dtype
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert slot_mapping.is_contiguous()
    _, num_kv_heads, head_dim = k_cache.shape
    norm: tuple[Tensor | int | float, ...] = (0, 0, 0, 0.0, 0.0)
    if head_norm is not None:
        norm = (1, head_norm.q, head_norm.k, head_norm.eps, head_norm.base)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    fast.rotate_and_store(
        qkv,
        qkv.shape[0],
        qkv.numel(),
        qkv,
        k_cache,
        v_cache,
        cos,
        sin,
        slot_mapping,
        num_heads,
        num_kv_heads,
        head_dim,
        cos.shape[1],
        *norm,
    )
