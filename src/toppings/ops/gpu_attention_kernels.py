"""The Triton kernels of paged attention; `gpu_attention.py` says what they are for and launches them.

Softmax is computed online in fp32; weights are rounded to the values' dtype for the product, as tensor cores
want it. A head's sink joins the sum of weights at the end. Sequences without keys (a graph's padding) give
zeros.
"""

import triton
import triton.language as tl

from toppings.ops.gpu_launch import kernel


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
    softcap_log2,
    KV_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
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
        if HAS_CAP:  # the scale is that of 2 s / cap: cap tanh(s / cap) is cap (1 - 2 / (1 + 2^(2 s / cap)))
            scores = softcap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
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


@triton.jit
def _sink_weight(sink, largest):  # type: ignore[no-untyped-def]
    """Relative to 2^largest, as the sums of weights are. Infinite for a sink far above: what is divided by it
    is 0 then."""
    return tl.exp2(sink * 1.4426950408889634 - largest)


@kernel(do_not_specialize=["max_pages"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    out,
    q,
    k_cache,
    v_cache,
    page_tables,
    context_lens,
    sinks,
    tiles,
    max_pages,
    q_stride,
    window,
    scale_log2,
    softcap_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
    total, largest, weight_sum = _attend(
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
        softcap_log2,
        KV_STRIDE=NUM_KV_HEADS * HEAD_DIM,
        PAGE_SIZE=PAGE_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        KEYS=KEYS,
        HAS_CAP=HAS_CAP,
        PRECISION=PRECISION,
        OPERAND=OPERAND,
    )
    if HAS_SINKS:
        weight_sum += _sink_weight(tl.load(sinks + head), largest)
    result = (total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]).to(out.dtype.element_ty)
    place = rows.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + column[None, :]
    tl.store(out + place, result, mask=mask)


@kernel(do_not_specialize=["num_sequences", "max_pages"])
def decode_kernel(  # type: ignore[no-untyped-def]
    out,
    sums,
    marks,
    q,
    k_cache,
    v_cache,
    page_tables,
    context_lens,
    sinks,
    splits,
    split_indptr,
    num_sequences,
    max_pages,
    q_stride,
    window,
    scale_log2,
    softcap_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    member = tl.arange(0, BLOCK_GROUP)
    head = kv_head * GROUP + member
    column = tl.arange(0, BLOCK_D)
    mask = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    num_splits = tl.load(split_indptr + num_sequences)
    for i in range(tl.program_id(1), num_splits, tl.num_programs(1)):
        split = splits + i * 4
        sequence = tl.load(split).to(tl.int64)
        context = tl.load(context_lens + sequence)
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
            tl.maximum(tl.load(split + 1), context - window),
            tl.load(split + 2),
            window,
            scale_log2,
            softcap_log2,
            KV_STRIDE=NUM_KV_HEADS * HEAD_DIM,
            PAGE_SIZE=PAGE_SIZE,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            KEYS=KEYS,
            HAS_CAP=HAS_CAP,
            PRECISION=PRECISION,
            OPERAND=OPERAND,
        )
        place = tl.load(split + 3)
        if place < 0:
            row = sequence * NUM_HEADS + head
            if HAS_SINKS:
                weight_sum += _sink_weight(tl.load(sinks + head, mask=member < GROUP, other=0.0), largest)
            result = (total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]).to(out.dtype.element_ty)
            tl.store(out + row[:, None] * HEAD_DIM + column[None, :], result, mask=mask)
        else:
            row = place.to(tl.int64) * NUM_HEADS + head
            tl.store(sums + row[:, None] * HEAD_DIM + column[None, :], total, mask=mask)
            tl.store(marks + row * 2, largest, mask=member < GROUP)
            tl.store(marks + row * 2 + 1, weight_sum, mask=member < GROUP)


@kernel()
def combine_kernel(  # type: ignore[no-untyped-def]
    out,
    sums,
    marks,
    split_indptr,
    sinks,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """Adds up the splits of one sequence's head, `SPLITS` at a time; one alone is in place."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, stop = tl.load(split_indptr + sequence), tl.load(split_indptr + sequence + 1)
    if stop - first == 1:
        return
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    largest = tl.full([], float("-inf"), tl.float32)
    weight_sum = tl.zeros([], tl.float32)
    for start in range(first, stop, SPLITS):
        split = start + tl.arange(0, SPLITS)
        row = split.to(tl.int64) * NUM_HEADS + head
        part_largest = tl.load(marks + row * 2, mask=split < stop, other=float("-inf"))
        part_weights = tl.load(marks + row * 2 + 1, mask=split < stop, other=0.0)
        mask = (split < stop)[:, None] & (column < HEAD_DIM)[None, :]
        parts = tl.load(sums + row[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(part_largest, axis=0))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        decay, part_decay = tl.exp2(largest - base), tl.exp2(part_largest - base)
        total = total * decay + tl.sum(parts * part_decay[:, None], axis=0)
        weight_sum = weight_sum * decay + tl.sum(part_weights * part_decay, axis=0)
        largest = new_largest
    if HAS_SINKS:
        weight_sum += _sink_weight(tl.load(sinks + head), largest)
    result = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    place = (sequence * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(out + place, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)
