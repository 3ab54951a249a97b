"""Triton kernels for what touches each activation once; `norm.py`, `rope.py` and `activation.py` say what
they compute.

All are bound by memory: each input is read once, each output written once, sums are fp32, results are rounded
once. `rms_norm` and `add_rms_norm`: a program a row, the row in registers, so that the residual is read and
written once for addition and norm together. `silu_mul`, `gelu_mul`, `clamped_swiglu`: a grid of (row, block
of columns).
`rotate_and_store`: a grid of (token, block of heads); norm, rotation and the write to the cache in one pass
over qkv.

Checked with Triton's interpreter and compiled for compute capability 9.0; not yet run on a GPU.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from toppings.ops.gpu_launch import Kernel, kernel, next_power_of_2, num_warps_for

if TYPE_CHECKING:
    from toppings.ops.rope import HeadNorm

_SILU_COLUMNS = 1024
_ROTATED_ELEMENTS = 2048  # half heads times head_dim / 2 that one program turns


@kernel()
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    out, residual, x, weight, n, eps, ADD: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * n
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    values = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(residual + row + columns, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / n + eps)
    gain = BASE + tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (values * scale * gain).to(x.dtype.element_ty), mask=mask)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, base: float) -> None:
    _launch_norm(out, x, x, weight, eps, base, add=False)


def add_rms_norm(out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, base: float) -> None:
    _launch_norm(out, residual, x, weight, eps, base, add=True)


def _launch_norm(
    out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, base: float, *, add: bool
) -> None:
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert weight.dtype == residual.dtype == x.dtype
    num_rows, n = x.shape
    if not num_rows:
        return
    block = next_power_of_2(n)
    _rms_norm_kernel(
        (num_rows, 1, 1),
        out,
        residual,
        x,
        weight,
        n,
        eps,
        ADD=add,
        BASE=base,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )


@kernel()
def _gate_kernel(out, gate_up, n, GELU: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    gate = tl.load(gate_up + row * 2 * n + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + columns, mask=mask, other=0.0).to(tl.float32)
    inner = gate
    if GELU:  # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)); the factor is 2 sqrt(2 / pi)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    result = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out + row * n + columns, result.to(gate_up.dtype.element_ty), mask=mask)


def silu_mul(out: Tensor, gate_up: Tensor) -> None:
    _launch_by_row(_gate_kernel, out, gate_up, GELU=False)


def gelu_mul(out: Tensor, gate_up: Tensor) -> None:
    _launch_by_row(_gate_kernel, out, gate_up, GELU=True)


@kernel()
def _clamped_kernel(out, gate_up, n, alpha, limit, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)  # side by side, so that loads are wide
    both = tl.load(gate_up + row * 2 * n + pairs, mask=pairs < 2 * n, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    gate = tl.where(gate > limit, limit, gate)  # a minimum would hide what is not a number
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    result = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    tl.store(out + row * n + columns, result.to(gate_up.dtype.element_ty), mask=columns < n)


def clamped_swiglu(out: Tensor, gate_up: Tensor, alpha: float, limit: float) -> None:
    _launch_by_row(_clamped_kernel, out, gate_up, alpha, limit)


def _launch_by_row(
    launched: Kernel, out: Tensor, gate_up: Tensor, *numbers: float, **constants: bool
) -> None:
    assert gate_up.is_contiguous()
    num_rows, n = out.shape
    if not num_rows:
        return
    block = min(next_power_of_2(n), _SILU_COLUMNS)
    grid = (triton.cdiv(n, block), num_rows, 1)
    launched(grid, out, gate_up, n, *numbers, **constants, BLOCK=block, num_warps=num_warps_for(block))


@triton.jit  # type: ignore[untyped-decorator]
def _head_gain(q_norm, k_norm, columns, mask, is_q, is_v, scale, BASE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the columns of heads are multiplied by: those of queries and of keys by their own norm."""
    q_gain = BASE + tl.load(q_norm + columns, mask=mask, other=0.0).to(tl.float32)
    k_gain = BASE + tl.load(k_norm + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_v, 1.0, scale * tl.where(is_q, q_gain, k_gain))


@kernel()
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv,
    k_cache,
    v_cache,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # The columns from 2 HALF on are not turned; BLOCK_REST is 0 where there are none.
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    dtype = qkv.dtype.element_ty
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (column < HALF)
    turned = mask & (head < NUM_HEADS + NUM_KV_HEADS)
    start = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + head * HEAD_DIM
    place = start + column
    low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(slots + token)
    is_q = head < NUM_HEADS
    if BLOCK_REST > 0:
        rest_column = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (rest_column < HEAD_DIM)
        rest = tl.load(start + rest_column, mask=rest_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        if BLOCK_REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        low *= _head_gain(q_norm, k_norm, column, column < HALF, is_q, is_v, scale, BASE)
        high *= _head_gain(q_norm, k_norm, HALF + column, column < HALF, is_q, is_v, scale, BASE)
        if BLOCK_REST > 0:
            in_head = rest_column < HEAD_DIM
            rest *= _head_gain(q_norm, k_norm, rest_column, in_head, is_q, is_v, scale, BASE)
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0)
    new_low = tl.where(is_v, low, low * c - high * s).to(dtype)
    new_high = tl.where(is_v, high, high * c + low * s).to(dtype)
    tl.store(place, new_low, mask=turned)
    tl.store(place + HALF, new_high, mask=turned)
    k_start = k_cache + slot * NUM_KV_HEADS * HEAD_DIM + (head - NUM_HEADS) * HEAD_DIM
    v_start = v_cache + slot * NUM_KV_HEADS * HEAD_DIM + (head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
    tl.store(k_start + column, new_low, mask=mask & is_k)
    tl.store(k_start + HALF + column, new_high, mask=mask & is_k)
    tl.store(v_start + column, new_low, mask=mask & is_v)
    tl.store(v_start + HALF + column, new_high, mask=mask & is_v)
    if BLOCK_REST > 0:
        kept = rest.to(dtype)
        if HAS_NORM:
            tl.store(start + rest_column, kept, mask=rest_mask & (head < NUM_HEADS + NUM_KV_HEADS))
        tl.store(k_start + rest_column, kept, mask=rest_mask & is_k)
        tl.store(v_start + rest_column, kept, mask=rest_mask & is_v)


def rotate_and_store(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    norm: "HeadNorm | None",
) -> None:
    assert k_cache.dtype == v_cache.dtype == qkv.dtype
    assert all(x.is_contiguous() for x in (qkv, k_cache, v_cache, cos, sin, slot_mapping))
    num_tokens = qkv.shape[0]
    if not num_tokens:
        return
    _, num_kv_heads, head_dim = k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    half = cos.shape[1]
    rest = head_dim - 2 * half
    block_half = next_power_of_2(half)
    all_heads = num_heads + 2 * num_kv_heads
    block_heads = min(next_power_of_2(all_heads), max(1, _ROTATED_ELEMENTS // block_half))
    q_norm, k_norm, eps, base = (
        (qkv, qkv, 0.0, 0.0) if norm is None else (norm.q, norm.k, norm.eps, norm.base)
    )
    _rotate_and_store_kernel(
        (triton.cdiv(all_heads, block_heads), num_tokens, 1),
        qkv,
        k_cache,
        v_cache,
        cos,
        sin,
        slot_mapping,
        q_norm,
        k_norm,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HAS_NORM=norm is not None,
        BASE=base,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_REST=next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
