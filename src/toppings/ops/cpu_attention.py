"""numba kernels: one-token queries against a paged cache, the softmax of a prompt's scores; `attention.py`
says what they compute."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.ops.cpu_bits import Pointer, dot, elements, exp, floats, helper, int32s, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer, real

Floats = NDArray[np.float32]


@helper
def _softmax(scores: Floats, start: int, n: int, sink: np.float32) -> None:
    """With e^sink in the denominator; a sink of -inf is none."""
    largest = scores[start]
    for i in range(n):
        largest = max(largest, load(scores, start + i))
    largest = max(largest, sink)
    total = exp(sink - largest) if sink > -np.inf else np.float32(0)
    for i in range(n):
        weight = exp(load(scores, start + i) - largest)
        store(scores, start + i, weight)
        total += weight
    for i in range(n):
        store(scores, start + i, load(scores, start + i) / total)


@helper
def _cap(score: np.float32, softcap: np.float32) -> np.float32:
    """softcap · tanh(score / softcap)."""
    power = exp(np.float32(2) * score / softcap)
    return softcap * (np.float32(1) - np.float32(2) / (np.float32(1) + power))


@helper
def _add_values(
    acc: Floats, weights: Floats, n: int, v: Pointer, places: NDArray[np.int64], i: int, group: int, d: int
) -> None:
    """acc[h] += Σ weights[h, j] · v[j, h / group] over the four keys j from i on: acc is read and written
    less."""
    p0, p1, p2, p3 = load(places, i), load(places, i + 1), load(places, i + 2), load(places, i + 3)
    for h in range(acc.size // d):
        to, offset, w = h * d, h // group * d, h * n + i
        w0, w1, w2, w3 = load(weights, w), load(weights, w + 1), load(weights, w + 2), load(weights, w + 3)
        for j in range(offset, offset + d):
            total = w0 * load(v, p0 + j) + w1 * load(v, p1 + j) + w2 * load(v, p2 + j) + w3 * load(v, p3 + j)
            store(acc, to + j - offset, load(acc, to + j - offset) + total)


@Kernel
def decode_attention(block: Any) -> None:
    """Task: one sequence's heads of one range of key heads; the query sees the last `window` keys.

    A key's heads lie side by side in the cache: they are read in that order, once for the scores of all heads
    and once for the values. Keys are padded to a multiple of four by repeating the first with weight 0.
    """
    out, q, k_cache, v_cache = elements(block, 0), elements(block, 1), elements(block, 2), elements(block, 3)
    page_tables, context_lens = int32s(block, 4), int32s(block, 5)
    max_pages, page_size, q_stride = integer(block, 6), integer(block, 7), integer(block, 8)
    num_heads, num_kv_heads, d = integer(block, 9), integer(block, 10), integer(block, 11)
    num_parts, window = integer(block, 12), integer(block, 13)
    scale, softcap = real(block, 14), real(block, 15)
    has_sinks, sinks = integer(block, 16) != 0, floats(block, 16)
    group = num_heads // num_kv_heads
    task = claim(block)
    while task >= 0:
        s, part = task // num_parts, task % num_parts
        first_head = part * num_kv_heads // num_parts
        heads = ((part + 1) * num_kv_heads // num_parts - first_head) * group
        first_key = max(0, load(context_lens, s) - window)
        num_keys = load(context_lens, s) - first_key
        n = (num_keys + 3) // 4 * 4
        places = np.empty(n, np.int64)
        for i in range(n):
            key = first_key + (i if i < num_keys else 0)
            page = np.int64(load(page_tables, s * max_pages + key // page_size))
            places[i] = ((page * page_size + key % page_size) * num_kv_heads + first_head) * d
        query, acc = np.empty(heads * d, np.float32), np.zeros(heads * d, np.float32)
        start = first_head * group * d
        for j in range(heads * d):
            store(query, j, load(q, s * q_stride + start + j) * scale)
        weights = np.zeros(heads * n, np.float32)
        for i in range(num_keys):
            for h in range(heads):
                weights[h * n + i] = dot(query, h * d, k_cache, places[i] + h // group * d, d)
        if softcap > 0:
            for i in range(heads * n):
                store(weights, i, _cap(load(weights, i), softcap))
        for h in range(heads):
            sink = load(sinks, first_head * group + h) if has_sinks else np.float32(-np.inf)
            _softmax(weights, h * n, num_keys, sink)
        for i in range(0, n, 4):
            _add_values(acc, weights, n, v_cache, places, i, group, d)
        for j in range(heads * d):
            store(out, s * num_heads * d + start + j, acc[j])
        task = claim(block)


_LANES = 16


@helper
def _largest(x: Pointer | Floats, start: int, stop: int, lanes: Floats) -> np.float32:
    """Of the elements from start to stop; one maximum a lane, for a single one would not vectorise."""
    largest: np.float32 = load(x, start)
    whole = start + (stop - start) // _LANES * _LANES
    for lane in range(_LANES):
        store(lanes, lane, largest)
    for i in range(start, whole, _LANES):
        for lane in range(_LANES):
            store(lanes, lane, max(load(lanes, lane), load(x, i + lane)))
    for lane in range(_LANES):
        largest = max(largest, load(lanes, lane))
    for i in range(whole, stop):
        largest = max(largest, load(x, i))
    return largest


@helper
def _with_sink(
    largest: np.float32, sinks: Pointer, head: int, has_sinks: bool, scale: np.float32
) -> np.float32:
    """The largest of scores that are still to be scaled, the head's sink among them."""
    return max(largest, load(sinks, head) / scale) if has_sinks else largest


@Kernel
def causal_softmax(block: Any) -> None:
    """Task: the queries of one head, [n, m] scores that their weights replace."""
    scores, num_queries, num_keys = elements(block, 0), integer(block, 1), integer(block, 2)
    window, scale, softcap = integer(block, 3), real(block, 4), real(block, 5)
    has_sinks, sinks = integer(block, 6) != 0, floats(block, 6)
    lanes, weights = np.empty(_LANES, np.float32), np.empty(num_keys, np.float32)
    task = claim(block)
    while task >= 0:
        for query in range(num_queries):
            row = (task * num_queries + query) * num_keys
            stop = num_keys - num_queries + query + 1
            start = max(0, stop - window)
            total = np.float32(0)
            if softcap > 0:
                for i in range(start, stop):
                    store(weights, i, _cap(load(scores, row + i) * scale, softcap))
                largest = _largest(weights, start, stop, lanes)
                largest = _with_sink(largest, sinks, task, has_sinks, np.float32(1))
                for i in range(start, stop):
                    weight = exp(load(weights, i) - largest)
                    store(weights, i, weight)
                    total += weight
            else:
                largest = _largest(scores, row + start, row + stop, lanes)
                largest = _with_sink(largest, sinks, task, has_sinks, scale)
                for i in range(start, stop):
                    weight = exp((load(scores, row + i) - largest) * scale)
                    store(weights, i, weight)
                    total += weight
                largest *= scale
            if has_sinks:
                total += exp(load(sinks, task) - largest)
            share = np.float32(1) / total
            for i in range(start):
                store(scores, row + i, np.float32(0))
            for i in range(start, stop):
                store(scores, row + i, load(weights, i) * share)
            for i in range(stop, num_keys):
                store(scores, row + i, np.float32(0))
        task = claim(block)
