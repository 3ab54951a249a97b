"""numba kernel for LoRA on few rows per adapter; `lora.py` says what it computes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import Pointer, dot, elements, helper, int32s, int64s, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer

Floats = NDArray[np.float32]


@helper
def _expand(acc: Floats, h: Floats, h_start: int, b: Pointer, b_start: int, rank: int, n: int) -> None:
    """acc = h · B, four rows of B at once: acc is read and written less."""
    for i in range(n):
        acc[i] = 0
    whole = rank // 4 * 4
    for r in range(0, whole, 4):
        h0, h1 = load(h, h_start + r), load(h, h_start + r + 1)
        h2, h3 = load(h, h_start + r + 2), load(h, h_start + r + 3)
        p = b_start + r * n
        for i in range(n):
            total = h0 * load(b, p + i) + h1 * load(b, p + n + i)
            total += h2 * load(b, p + 2 * n + i) + h3 * load(b, p + 3 * n + i)
            store(acc, i, load(acc, i) + total)
    for r in range(whole, rank):
        h0, p = load(h, h_start + r), b_start + r * n
        for i in range(n):
            store(acc, i, load(acc, i) + h0 * load(b, p + i))


@Kernel
def add_lora(block: Any) -> None:
    """Task: one module for the rows of one segment, none where its slot is -1. Each row of A is read once for
    all of them and stays in the first-level cache between them; B, at most a second-level cache full, is gone
    through per row."""
    y, x, arena = elements(block, 0), elements(block, 1), elements(block, 2)
    places, slot_stride = (
        int64s(block, 3),
        integer(block, 4),
    )  # (A, B, rank) of each module, from slot to slot
    segments, offsets = int32s(block, 5), int64s(block, 6)  # (start, stop, slot) each; columns of each module
    num_modules, num_in = integer(block, 7), integer(block, 8)
    y_stride, x_stride = integer(block, 9), integer(block, 10)
    task = claim(block)
    while task >= 0:
        segment, module = task // num_modules * 3, task % num_modules
        start, slot = load(segments, segment), load(segments, segment + 2)
        num_rows = load(segments, segment + 1) - start if slot >= 0 else 0
        place = max(slot, 0) * slot_stride + module * 3
        a_start, b_start, rank = load(places, place), load(places, place + 1), load(places, place + 2)
        column = load(offsets, module)
        num_out = load(offsets, module + 1) - column
        xs = np.empty(num_rows * num_in, np.float32)
        h = np.empty(num_rows * rank, np.float32)
        acc = np.empty(num_out, np.float32)
        for t in range(num_rows if rank else 0):
            for i in range(num_in):
                store(xs, t * num_in + i, load(x, (start + t) * x_stride + i))
        for r in range(rank):
            for t in range(num_rows):
                h[t * rank + r] = dot(xs, t * num_in, arena, a_start + r * num_in, num_in)
        for t in range(num_rows if rank else 0):
            _expand(acc, h, t * rank, arena, b_start, rank, num_out)
            to = (start + t) * y_stride + column
            for i in range(num_out):
                store(y, to + i, load(y, to + i) + load(acc, i))
        task = claim(block)
