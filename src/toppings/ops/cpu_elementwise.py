"""numba kernels for what touches each activation once, a row a task; `norm.py`, `rope.py` and `activation.py`
say what they compute."""

from typing import Any

import numpy as np

from toppings.ops.cpu_bits import Pointer, copy, elements, exp, floats, helper, int64s, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer, real

_GELU = (2 / np.pi) ** 0.5


@helper
def _normalise(
    out: Pointer,
    to: int,
    x: Pointer,
    start: int,
    weight: Pointer,
    n: int,
    eps: np.float32,
    base: np.float32,
) -> None:
    total = np.float32(0)
    for i in range(n):
        total += load(x, start + i) * load(x, start + i)
    scale = np.float32(1) / np.sqrt(total / np.float32(n) + eps)
    for i in range(n):
        store(out, to + i, load(x, start + i) * scale * (base + load(weight, i)))


@Kernel
def rms_norm(block: Any) -> None:
    out, x, weight = elements(block, 0), elements(block, 1), elements(block, 2)
    n, eps, base = integer(block, 3), real(block, 4), real(block, 5)
    t = claim(block)
    while t >= 0:
        _normalise(out, t * n, x, t * n, weight, n, eps, base)
        t = claim(block)


@Kernel
def add_rms_norm(block: Any) -> None:
    out, residual, x, weight = elements(block, 0), elements(block, 1), elements(block, 2), elements(block, 3)
    n, eps, base = integer(block, 4), real(block, 5), real(block, 6)
    t = claim(block)
    while t >= 0:
        for i in range(n):
            store(residual, t * n + i, load(residual, t * n + i) + load(x, t * n + i))
        _normalise(out, t * n, residual, t * n, weight, n, eps, base)
        t = claim(block)


@Kernel
def silu_mul(block: Any) -> None:
    out, gate_up, n = elements(block, 0), elements(block, 1), integer(block, 2)
    t = claim(block)
    while t >= 0:
        for i in range(n):
            gate, up = load(gate_up, 2 * t * n + i), load(gate_up, 2 * t * n + n + i)
            store(out, t * n + i, gate / (np.float32(1) + exp(-gate)) * up)
        t = claim(block)


@Kernel
def gelu_mul(block: Any) -> None:
    out, gate_up, n = elements(block, 0), elements(block, 1), integer(block, 2)
    t = claim(block)
    while t >= 0:
        for i in range(n):
            gate, up = load(gate_up, 2 * t * n + i), load(gate_up, 2 * t * n + n + i)
            inner = np.float32(_GELU) * (gate + np.float32(0.044715) * gate * gate * gate)
            # (1 + tanh(inner)) / 2, without the cancellation
            store(out, t * n + i, gate / (np.float32(1) + exp(np.float32(-2) * inner)) * up)
        t = claim(block)


@Kernel
def clamped_swiglu(block: Any) -> None:
    out, gate_up, n = elements(block, 0), elements(block, 1), integer(block, 2)
    alpha, limit = real(block, 3), real(block, 4)
    t = claim(block)
    while t >= 0:
        for i in range(n):
            gate, up = load(gate_up, 2 * (t * n + i)), load(gate_up, 2 * (t * n + i) + 1)
            gate = limit if gate > limit else gate  # `min` would hide what is not a number
            up = limit if up > limit else -limit if up < -limit else up
            store(out, t * n + i, gate / (np.float32(1) + exp(-alpha * gate)) * (up + np.float32(1)))
        t = claim(block)


@helper
def _rotate(x: Pointer, start: int, cos: Pointer, sin: Pointer, angle: int, half: int) -> None:
    for i in range(half):
        low, high = load(x, start + i), load(x, start + half + i)
        c, s = load(cos, angle + i), load(sin, angle + i)
        store(x, start + i, low * c - high * s)
        store(x, start + half + i, high * c + low * s)


@Kernel
def rotate_and_store(block: Any) -> None:
    qkv, k_cache, v_cache = elements(block, 0), elements(block, 1), elements(block, 2)
    cos, sin, slots = floats(block, 3), floats(block, 4), int64s(block, 5)
    num_heads, num_kv_heads, head_dim = integer(block, 6), integer(block, 7), integer(block, 8)
    half, has_norm = integer(block, 9), integer(block, 10)
    q_norm, k_norm, eps, base = elements(block, 11), elements(block, 12), real(block, 13), real(block, 14)
    kv_size = num_kv_heads * head_dim
    t = claim(block)
    while t >= 0:
        row = t * (num_heads * head_dim + 2 * kv_size)
        for h in range(num_heads + num_kv_heads):
            start = row + h * head_dim
            if has_norm and h < num_heads:
                _normalise(qkv, start, qkv, start, q_norm, head_dim, eps, base)
            elif has_norm:
                _normalise(qkv, start, qkv, start, k_norm, head_dim, eps, base)
            _rotate(qkv, start, cos, sin, t * half, half)
        to, k_start = load(slots, t) * kv_size, row + num_heads * head_dim
        for i in range(kv_size):
            copy(k_cache, to + i, qkv, k_start + i)
            copy(v_cache, to + i, qkv, k_start + kv_size + i)
        t = claim(block)
