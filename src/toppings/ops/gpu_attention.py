"""Triton kernels for causal attention over a paged cache; `attention.py` says what they compute.

* **Decode**: a program is (key head, sequence, split of the keys). It holds the queries of all heads that
  share the key head, padded to 16 rows for the tensor cores, and reads each key and value of its split once.
  Splits, where sequences and key heads alone would not fill the device, are added up by a second launch. How
  many there are depends on the number of sequences and on the longest context that may come, never on the
  contexts themselves, so that a CUDA graph stays valid as contexts grow.
* **Prefill**: a program is (64 queries of a sequence, in fp32 32, head); it goes over the keys that its
  queries may see, this step's own included, in the cache. Programs of one tile's heads are neighbours: they
  find keys in the L2 cache.

Softmax is computed online in fp32; weights are rounded to the values' dtype for the product, as tensor cores
want it. Sequences without keys (a graph's padding) give zeros.

Checked with Triton's interpreter and compiled for compute capability 8.0 to 9.0; not yet run on a GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.attention import AttentionMetadata
from toppings.ops.gpu_launch import dot_options, next_power_of_2, num_multiprocessors
from toppings.ops.gpu_plan import QUERIES, AttentionTiles
from toppings.ops.gpu_varlen import attend_varlen, varlen_reason

_LOG2_E = math.log2(math.e)
_KEYS = 64  # of one step through the keys
_MIN_GROUP = 16  # rows of a tensor core's tile
_MIN_SPLIT_KEYS = 128
_PROGRAMS_PER_MULTIPROCESSOR = 8
_LONGEST_WINDOW = 2**30


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q,
    positions,
    k_cache,
    v_cache,
    page_table,
    kv_head,
    low,
    high,
    window,
    scale_log2,
    KV_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Online softmax of queries q [M, BLOCK_D] at `positions` [M] over the keys [low, high) of one key head:
    (sum [M, BLOCK_D], largest score [M], sum of weights [M])."""
    column = tl.arange(0, BLOCK_D)
    ROWS: tl.constexpr = q.shape[0]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    for start in range(low, high, KEYS):
        keys = start + tl.arange(0, KEYS)
        pages = tl.load(page_table + keys // PAGE_SIZE, mask=keys < high, other=0)
        rows = pages.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
        place = rows[:, None] * KV_STRIDE + kv_head * HEAD_DIM + column[None, :]
        mask = (keys < high)[:, None] & (column < HEAD_DIM)[None, :]
        k = tl.load(k_cache + place, mask=mask, other=0.0)
        scores = tl.dot(q.to(OPERAND), tl.trans(k).to(OPERAND), input_precision=PRECISION) * scale_log2
        seen = (keys[None, :] <= positions[:, None]) & (keys[None, :] > positions[:, None] - window)
        scores = tl.where(seen & (keys < high)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(largest - base)
        v = tl.load(v_cache + place, mask=mask, other=0.0)
        total = tl.dot(
            weights.to(v.dtype).to(OPERAND), v.to(OPERAND), total * decay[:, None], input_precision=PRECISION
        )
        weight_sum = weight_sum * decay + tl.sum(weights, axis=1)
        largest = new_largest
    return total, largest, weight_sum


@triton.jit(do_not_specialize=["max_pages"])  # type: ignore[untyped-decorator]
def _prefill_kernel(  # type: ignore[no-untyped-def]
    out,
    q,
    k_cache,
    v_cache,
    page_tables,
    context_lens,
    tiles,
    max_pages,
    q_stride,
    window,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) // PARTS * 4
    skipped = tl.program_id(1) % PARTS * QUERIES
    start = tl.load(tile) + skipped
    stop = tl.minimum(tl.load(tile + 1), start + QUERIES)
    if start >= stop:
        return
    sequence, position = tl.load(tile + 2).to(tl.int64), tl.load(tile + 3) + skipped
    rows = start + tl.arange(0, QUERIES)
    column = tl.arange(0, BLOCK_D)
    mask = (rows < stop)[:, None] & (column < HEAD_DIM)[None, :]
    q_tile = tl.load(
        q + rows.to(tl.int64)[:, None] * q_stride + head * HEAD_DIM + column[None, :], mask=mask, other=0.0
    )
    total, _, weight_sum = _attend(
        q_tile,
        position + tl.arange(0, QUERIES),
        k_cache,
        v_cache,
        page_tables + sequence * max_pages,
        head // (NUM_HEADS // NUM_KV_HEADS),
        tl.maximum(position - window + 1, 0) // KEYS * KEYS,
        position + stop - start,
        window,
        scale_log2,
        KV_STRIDE=NUM_KV_HEADS * HEAD_DIM,
        PAGE_SIZE=PAGE_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        KEYS=KEYS,
        PRECISION=PRECISION,
        OPERAND=OPERAND,
    )
    result = (total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]).to(out.dtype.element_ty)
    place = rows.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + column[None, :]
    tl.store(out + place, result, mask=mask)


@triton.jit(do_not_specialize=["max_pages"])  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]
    out,
    sums,
    marks,
    q,
    k_cache,
    v_cache,
    page_tables,
    context_lens,
    max_pages,
    q_stride,
    window,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head, split = tl.program_id(0), tl.program_id(2)
    sequence = tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + sequence)
    first = tl.maximum(context - window, 0)
    part = ((context - first) + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS
    low = first + split * part
    member = tl.arange(0, BLOCK_GROUP)
    head = kv_head * GROUP + member
    column = tl.arange(0, BLOCK_D)
    mask = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    q_tile = tl.load(
        q + sequence * q_stride + head[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0
    )
    total, largest, weight_sum = _attend(
        q_tile,
        tl.zeros([BLOCK_GROUP], tl.int32) + context - 1,
        k_cache,
        v_cache,
        page_tables + sequence * max_pages,
        kv_head,
        low,
        tl.minimum(low + part, context),
        window,
        scale_log2,
        KV_STRIDE=NUM_KV_HEADS * HEAD_DIM,
        PAGE_SIZE=PAGE_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        KEYS=KEYS,
        PRECISION=PRECISION,
        OPERAND=OPERAND,
    )
    row = sequence * NUM_HEADS + head
    if SPLITS == 1:
        result = (total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * HEAD_DIM + column[None, :], result, mask=mask)
    else:
        place = row * SPLITS + split
        tl.store(sums + place[:, None] * HEAD_DIM + column[None, :], total, mask=mask)
        tl.store(marks + place * 2, largest, mask=member < GROUP)
        tl.store(marks + place * 2 + 1, weight_sum, mask=member < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    out,
    sums,
    marks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Adds up the splits of one sequence's head."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    place = row * SPLITS + split
    largest = tl.load(marks + place * 2, mask=split < SPLITS, other=float("-inf"))
    base = tl.max(largest, axis=0)
    decay = tl.exp2(largest - tl.where(base == float("-inf"), 0.0, base))
    weight_sum = tl.sum(tl.load(marks + place * 2 + 1, mask=split < SPLITS, other=0.0) * decay, axis=0)
    mask = (split < SPLITS)[:, None] & (column < HEAD_DIM)[None, :]
    total = tl.load(sums + place[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total * decay[:, None], axis=0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(out + row * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def num_splits(num_sequences: int, num_kv_heads: int, max_context: int, num_processors: int) -> int:
    """Splits of the keys with which a decode fills the device; a power of two, so that few kernels are
    compiled. The same for all numbers of sequences up to the next power of two, so that a batch gives the
    same bits with padding (engine/graphs.py) and without."""
    sequences = next_power_of_2(num_sequences)
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * num_processors // (sequences * num_kv_heads)
    possible = max(1, max_context // _MIN_SPLIT_KEYS)
    return int(2 ** int(math.log2(max(1, min(wanted, possible)))))


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
) -> None:
    """Attention of the first `meta.num_decodes` rows into out [T, H · D]."""
    _check(q, k_cache, v_cache, meta)
    num, (_, num_kv_heads, head_dim) = meta.num_decodes, k_cache.shape
    splits = num_splits(num, num_kv_heads, tiles.max_decode_context, num_multiprocessors(q.device))
    sums, marks = out, out
    if splits > 1:
        shape = (num, q.shape[1], splits)
        sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        marks = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(head_dim))
    keys, stages = (32, 2) if q.dtype == torch.float32 else (_KEYS, 3)
    _decode_kernel[(num_kv_heads, num, splits)](
        out,
        sums,
        marks,
        q,
        k_cache,
        v_cache,
        meta.page_tables,
        tiles.context_lens,
        meta.page_tables.shape[1],
        q.stride(0),
        min(window, _LONGEST_WINDOW),
        scale * _LOG2_E,
        NUM_HEADS=q.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=meta.page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_GROUP=max(_MIN_GROUP, next_power_of_2(q.shape[1] // num_kv_heads)),
        KEYS=keys,
        SPLITS=splits,
        **dot_options(q.dtype),
        num_warps=4,
        num_stages=stages,
    )
    if splits > 1:
        _combine_kernel[(num * q.shape[1],)](
            out,
            sums,
            marks,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            SPLITS=splits,
            BLOCK_SPLITS=next_power_of_2(splits),
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
) -> None:
    """Attention of the rows after the decodes' into out [T, H · D]."""
    _check(q, k_cache, v_cache, meta)
    _, num_kv_heads, head_dim = k_cache.shape
    queries, keys, warps, stages = (32, 32, 8, 1) if q.dtype == torch.float32 else (QUERIES, _KEYS, 4, 3)
    parts = QUERIES // queries
    _prefill_kernel[(q.shape[1], len(tiles.prefill_tiles) * parts)](
        out,
        q,
        k_cache,
        v_cache,
        meta.page_tables,
        tiles.context_lens,
        tiles.prefill_tiles,
        meta.page_tables.shape[1],
        q.stride(0),
        min(window, _LONGEST_WINDOW),
        scale * _LOG2_E,
        NUM_HEADS=q.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=meta.page_size,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        QUERIES=queries,
        PARTS=parts,
        KEYS=keys,
        **dot_options(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )


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
) -> None:
    """`attention.paged_attention` into out [T, H · D]: decodes by our kernel, prompts by torch's where it
    can, else by ours."""
    tiles = meta.tiles
    if meta.num_decodes:
        decode(out, q, k_cache, v_cache, meta, tiles, scale=scale, window=window)
    if not len(tiles.prefill_tiles):
        return
    heads = (q.shape[1], k.shape[1], q.shape[2])
    if tiles.are_prefills_whole and varlen_reason(q.dtype, *heads, q.device)[0]:
        first, longest = meta.query_indptr[meta.num_decodes], tiles.longest_prefill
        result = attend_varlen(q[first:], k[first:], v[first:], tiles.prefill_indptr, longest, scale, window)
        out[first:] = result.flatten(1)
    else:
        prefill(out, q, k_cache, v_cache, meta, tiles, scale=scale, window=window)
