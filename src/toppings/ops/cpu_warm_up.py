"""Runs every numba kernel once on a tiny input, so that no request waits for a compiler."""

from collections.abc import Sequence

import torch

from toppings.ops.activation import ACTIVATIONS, clamped_swiglu
from toppings.ops.attention import NO_WINDOW, AttentionMetadata, KVCache, paged_attention, prefill_attention_
from toppings.ops.columns import adjust_columns_
from toppings.ops.cpu_experts import cut_rows
from toppings.ops.experts import ExpertLinears, GroupedRows
from toppings.ops.linear import MAX_FEW_ROWS, Linear, QuantizedLinear
from toppings.ops.lora import LoraSegments, add_lora_
from toppings.ops.norm import add_rms_norm_, rms_norm
from toppings.ops.rope import rotate_and_store_


def warm_up(dtype: torch.dtype, quantized: Sequence[QuantizedLinear]) -> None:
    x, weight = torch.ones(1, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    rms_norm(x, weight, 1e-6)
    add_rms_norm_(x, x.clone(), weight, 1e-6)
    for activation in ACTIVATIONS.values():
        activation(x)
    clamped_swiglu(x, alpha=1.0, limit=1.0)
    for width in (8, 32):  # a general kernel, and perhaps one for even widths
        _add_lora(width, dtype)
    _adjust_columns(dtype)
    Linear(torch.ones(64, 64, dtype=dtype))(torch.ones(1, 64, dtype=dtype))
    for product in quantized:
        for num_rows in (1, 2, MAX_FEW_ROWS + 1):  # one and several may be different kernels', and many, too
            product(torch.ones(num_rows, product.num_in, dtype=dtype))
    _attend(dtype)
    rows = GroupedRows.of(torch.zeros(1, 1, dtype=torch.int64), 1)
    ExpertLinears(torch.ones(64, 64, dtype=dtype), 1)(torch.ones(1, 64, dtype=dtype), rows)
    cut_rows(torch.empty(0), 0, 0, *[0] * 11)  # no task


def _add_lora(width: int, dtype: torch.dtype) -> None:
    x = torch.ones(1, width, dtype=dtype)
    add_lora_(
        x,
        x.clone(),
        arena=torch.zeros(2 * width, dtype=dtype),
        table=torch.tensor([0, width, 1]).expand(1, 1, 7, 3).clone(),
        layer=0,
        group=(0,),
        out_offsets=(0,),
        segments=LoraSegments([0, 1], [0]),
    )


def _adjust_columns(dtype: torch.dtype) -> None:
    y = torch.ones(1, 8, dtype=dtype)
    places, segments = torch.ones(1, 1, 2, dtype=torch.int64), LoraSegments([0, 1], [0])
    adjust_columns_(y, arena=torch.zeros(9, dtype=dtype), places=places, out_offsets=(0,), segments=segments)


def _attend(dtype: torch.dtype) -> None:
    cache = KVCache.allocate(1, 1, 1, 1, 4, dtype, "cpu")
    slots = torch.zeros(1, dtype=torch.int64)
    meta = AttentionMetadata(1, [0, 1], [1], torch.zeros(1, 1, dtype=torch.int32), slots, 1)
    qkv, angles = torch.ones(1, 12, dtype=dtype), torch.ones(1, 2)
    rotate_and_store_(qkv, angles, angles, cache.k[0], cache.v[0], slots)
    heads = qkv.view(1, 3, 4)
    paged_attention(heads[:, :1], heads[:, 1:2], heads[:, 2:], cache.k[0], cache.v[0], meta, scale=1.0)
    prompt = heads[:, :1]
    prefill_attention_(torch.empty_like(prompt), prompt, prompt, prompt, scale=1.0, window=NO_WINDOW)


if __name__ == "__main__":
    warm_up(torch.bfloat16, [])
