"""torch's own variable-length attention for prompts, where the installed torch and the device have it.

torch 2.13 documents a `block_table` for `torch.nn.attention.varlen.varlen_attn`, but only FlashAttention 3, a
package of its own that must be installed and activated, is said to serve it. What comes with torch itself
takes keys that lie side by side: right for prompts whose keys are all of this step, which is what prefills
without a chunk before them are. Later chunks and decodes read the pages, with the kernels of
`gpu_attention.py`.

Like all that depends on the installed torch, it is tried out once, on a small input, against our reference.
Not yet run on a GPU.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toppings.ops.attention import NO_WINDOW, causal_mask

_MAX_HEAD_DIM = 256
_TOLERANCE = 0.03
_TRIED_LENGTHS = (5, 70)


def _varlen_attn() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """Causal attention of each sequence to itself. q: [T, H, D]; k, v: [T, Hkv, D]; indptr: int32 [S + 1]."""
    varlen_attn = _varlen_attn()
    options: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    left = -1 if window >= longest else window - 1
    result: Tensor = varlen_attn(
        q, k, v, indptr, indptr, longest, longest, scale=scale, window_size=(left, 0), **options
    )
    return result


@cache
def varlen_reason(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> tuple[bool, str]:
    """Whether torch's variable-length attention works for heads like these, and why not where it does not."""
    if device.type != "cuda":
        return False, f"torch's variable-length attention needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16) or head_dim > _MAX_HEAD_DIM:
        return False, f"torch's variable-length attention does not serve {dtype} with heads of {head_dim}"
    try:
        is_right = all(_try(dtype, num_heads, num_kv_heads, head_dim, device, w) for w in (NO_WINDOW, 9))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return False, f"torch's variable-length attention fails: {error}"
    if not is_right:
        return False, "torch's variable-length attention differs from the reference"
    return True, "torch's variable-length attention works"


def _try(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, window: int
) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(_TRIED_LENGTHS), num_heads + 2 * num_kv_heads, head_dim)
    qkv = torch.randn(shape, generator=generator).to(device, dtype)
    q, k, v = qkv.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    indptr = torch.tensor([0, _TRIED_LENGTHS[0], sum(_TRIED_LENGTHS)], dtype=torch.int32, device=device)
    scale = head_dim**-0.5
    actual = attend_varlen(q, k, v, indptr, max(_TRIED_LENGTHS), scale, window)
    expected = []
    for rows in torch.arange(shape[0], device=device).split(_TRIED_LENGTHS):  # type: ignore[no-untyped-call]
        keys, values = (x[rows].float().repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        mask = causal_mask(len(rows), len(rows), window, device)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, values))
    return bool((actual.float() - torch.cat(expected)).abs().max() <= _TOLERANCE)
