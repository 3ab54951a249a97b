"""Triton kernels for causal attention over a paged cache; `attention.py` says what they compute.

* **Decode**: contexts are read in splits, which stand in a list that the host writes for each step, longest
  first. A program is of one key head and takes every n-th split. It holds the queries of all heads that share
  the key head, padded to 16 rows for the tensor cores, and reads each key and value of the split once. A
  second launch adds up the splits of contexts that have several. So a long context among short ones is read
  by as many programs as it needs, and a CUDA graph, whose launches are of one size, stays valid as contexts
  grow. How a context is split depends on its length alone: a row has the same bits in any batch.
* **Prefill**: a program is (64 queries of a sequence, in fp32 32, head); it goes over the keys that its
  queries may see, this step's own included, in the cache. Programs of one tile's heads are neighbours: they
  find keys in the L2 cache.

Loads of keys and values go ahead of the products by as many stages as shared memory has room for: the look-up
of pages takes two of them.

Checked with Triton's interpreter and compiled for compute capability 8.0 to 12.0; not yet run on a GPU.
"""

import math
from typing import Any

import torch
from torch import Tensor

from toppings.ops.attention import AttentionMetadata
from toppings.ops.gpu_attention_kernels import combine_kernel, decode_kernel, prefill_kernel
from toppings.ops.gpu_launch import (
    capability,
    dot_options,
    early_options,
    next_power_of_2,
    num_multiprocessors,
)
from toppings.ops.gpu_plan import QUERIES, AttentionTiles
from toppings.ops.gpu_varlen import attend_varlen, varlen_reason

_LOG2_E = math.log2(math.e)
_KEYS = 64  # of one step through the keys
_MIN_GROUP = 16  # rows of a tensor core's tile
_WIDE_HEAD = 128
_COMBINED_SPLITS = 16  # at a time
_PROGRAMS_PER_MULTIPROCESSOR = 8
_LONGEST_WINDOW = 2**30
_LARGE_SHARED_MEMORY = (80, 90, 100, 103)
"""Compute capabilities with 160 KiB and more a multiprocessor."""


def decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    tiles: AttentionTiles,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Attention of the first `meta.num_decodes` rows into out [T, H · D]."""
    _check(q, k_cache, v_cache, meta)
    num, (_, num_kv_heads, head_dim) = meta.num_decodes, k_cache.shape
    shape = (len(tiles.splits), q.shape[1])
    sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    marks = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    filling = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(q.device) // num_kv_heads
    early = early_options(q.device)
    block_d = max(16, next_power_of_2(head_dim))
    keys, stages = (32, 2) if q.dtype == torch.float32 else (_KEYS, _num_stages(q.device))
    warps = 4
    if block_d > _WIDE_HEAD:
        keys, warps = keys // 2, 8
    decode_kernel(
        (num_kv_heads, max(1, min(filling, len(tiles.splits))), 1),
        out,
        sums,
        marks,
        q,
        k_cache,
        v_cache,
        meta.page_tables,
        tiles.context_lens,
        out if sinks is None else sinks,
        tiles.splits,
        tiles.split_indptr,
        num,
        meta.page_tables.shape[1],
        q.stride(0),
        min(window, _LONGEST_WINDOW),
        *_scales(scale, softcap),
        NUM_HEADS=q.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=meta.page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_GROUP=max(_MIN_GROUP, next_power_of_2(q.shape[1] // num_kv_heads)),
        KEYS=keys,
        HAS_CAP=softcap > 0,
        HAS_SINKS=sinks is not None,
        IS_EARLY=bool(early),
        **dot_options(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    combine_kernel(
        (num, q.shape[1], 1),
        out,
        sums,
        marks,
        tiles.split_indptr,
        out if sinks is None else sinks,
        NUM_HEADS=q.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        SPLITS=_COMBINED_SPLITS,
        HAS_SINKS=sinks is not None,
        IS_EARLY=bool(early),
        **early,
        num_warps=4,
    )


def prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    tiles: AttentionTiles,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Attention of the rows after the decodes' into out [T, H · D]."""
    _check(q, k_cache, v_cache, meta)
    _, num_kv_heads, head_dim = k_cache.shape
    warps = 8 if capability(q.device) >= 120 else 4  # with 4 there, registers spill
    queries, keys, stages = QUERIES, _KEYS, _num_stages(q.device)
    if q.dtype == torch.float32:
        queries, keys, warps, stages = 32, 32, 8, 1
    if head_dim > _WIDE_HEAD:  # as many registers and as much memory with fewer keys at a time
        queries, keys, warps = queries // 2, keys // 2, 8
    parts = QUERIES // queries
    prefill_kernel(
        (q.shape[1], len(tiles.prefill_tiles) * parts, 1),
        out,
        q,
        k_cache,
        v_cache,
        meta.page_tables,
        tiles.context_lens,
        out if sinks is None else sinks,
        tiles.prefill_tiles,
        meta.page_tables.shape[1],
        q.stride(0),
        min(window, _LONGEST_WINDOW),
        *_scales(scale, softcap),
        NUM_HEADS=q.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=meta.page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        QUERIES=queries,
        PARTS=parts,
        KEYS=keys,
        HAS_CAP=softcap > 0,
        HAS_SINKS=sinks is not None,
        **dot_options(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )


def _scales(scale: float, softcap: float) -> tuple[float, float]:
    """What scores, and what is capped of them, are multiplied by, for powers of two."""
    return (2 * scale / softcap * _LOG2_E, softcap * _LOG2_E) if softcap else (scale * _LOG2_E, 0.0)


def _num_stages(device: torch.device) -> int:
    return 5 if capability(device) in _LARGE_SHARED_MEMORY else 3


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata) -> None:
    assert q.stride()[1:] == (q.shape[2], 1)
    assert k_cache.dtype == v_cache.dtype == q.dtype
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert meta.page_tables.is_contiguous()
    assert meta.page_tables.dtype == torch.int32


def paged_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """`attention.paged_attention` into out [T, H · D]: decodes by our kernel, prompts by torch's where it
    can, else by ours."""
    tiles = meta.tiles
    form: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if meta.num_decodes:
        decode(out, q, k_cache, v_cache, meta, tiles, **form)
    if not len(tiles.prefill_tiles):
        return
    heads = (q.shape[1], k.shape[1], q.shape[2])
    is_plain = not softcap and sinks is None
    if is_plain and tiles.are_prefills_whole and varlen_reason(q.dtype, *heads, q.device)[0]:
        first, longest = meta.query_indptr[meta.num_decodes], tiles.longest_prefill
        result = attend_varlen(q[first:], k[first:], v[first:], tiles.prefill_indptr, longest, scale, window)
        out[first:] = result.flatten(1)
    else:
        prefill(out, q, k_cache, v_cache, meta, tiles, **form)
