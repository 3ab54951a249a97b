"""Causal attention over a paged key-value cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toppings.ops.dispatch import gpu_kernels, kernels
from toppings.ops.gpu_plan import AttentionTiles
from toppings.ops.products import is_widened

NO_WINDOW = 2**62
_QUERY_BLOCK = 128


@dataclass(frozen=True)
class KVCache:
    """Per layer keys and values, [num_pages * page_size, num_kv_heads, head_dim]; page p is rows p·size
    on."""

    k: list[Tensor]
    v: list[Tensor]
    page_size: int

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KVCache":
        shape = (num_pages * page_size, num_kv_heads, head_dim)
        k, v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)] for _ in range(2))
        return cls(k, v, page_size)

    def copy(self, places: Sequence[tuple[int, int, int]]) -> None:
        """The first rows of pages to others: (from, to, rows) each. All is read before anything is written,
        so a page may be both."""
        rows = [range(num_rows) for *_, num_rows in places]
        sources, targets = (
            torch.tensor(
                [page * self.page_size + row for page, each in zip(pages, rows, strict=True) for row in each],
                device=self.k[0].device,
            )
            for pages in ([place[0] for place in places], [place[1] for place in places])
        )
        for layer in (*self.k, *self.v):
            layer.index_copy_(0, targets, layer.index_select(0, sources))


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the sequences of one step are; built once, used by every layer.

    The first `num_decodes` sequences have one query each. `query_indptr` [S + 1] delimits each sequence's
    rows; `context_lens` [S] counts its keys, this step's included; `page_tables` int32 [S, max_pages] lists
    its pages; `slot_mapping` int64 [T] is the cache row of each token of the step.

    `brought`: what the kernels read, where it came with the step's other inputs; in a graph it changes from
    replay to replay, and `context_lens` says nothing.
    """

    num_decodes: int
    query_indptr: list[int]
    context_lens: list[int]
    page_tables: Tensor
    slot_mapping: Tensor
    page_size: int
    brought: AttentionTiles | None = None

    @cached_property
    def decode_context_lens(self) -> Tensor:
        """int32 [num_decodes], for the CPU's kernel."""
        if self.brought is not None:
            return self.brought.context_lens
        return torch.tensor(self.context_lens[: self.num_decodes], dtype=torch.int32)

    @cached_property
    def num_decode_keys(self) -> int:
        """In a graph, as many as there may be."""
        if self.brought is not None:
            return self.num_decodes * self.brought.max_decode_context
        return sum(self.context_lens[: self.num_decodes])

    @cached_property
    def tiles(self) -> AttentionTiles:
        """What the GPU's kernels read, built once per step."""
        return self.brought or AttentionTiles.build(self)

    def cache_rows(self, sequence: int) -> Tensor:
        """int64 [context_len]: where in the cache the sequence's keys are, in order."""
        length = self.context_lens[sequence]
        num_pages = -(-length // self.page_size)
        pages = self.page_tables[sequence, :num_pages].long()[:, None] * self.page_size
        return (pages + torch.arange(self.page_size, device=pages.device)).flatten()[:length]


def causal_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """bool [num_queries, num_keys]: the last query sees the last key, and `window` keys at most."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    return (key <= query) & (key > query - window)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the keys of scores [H, n, m]; a head's sink is one more, whose weight nobody gets."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`paged_attention` sequence by sequence in fp32, everything read from the cache."""
    out = []
    group = q.shape[1] // k_cache.shape[1]
    for s, length in enumerate(meta.context_lens):
        queries = q[meta.query_indptr[s] : meta.query_indptr[s + 1]].float()
        rows = meta.cache_rows(s)
        keys, values = (c[rows].float().repeat_interleave(group, dim=1) for c in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        mask = causal_mask(queries.shape[0], length, sliding_window or NO_WINDOW, q.device)
        weights = _softmax(scores.masked_fill(~mask, -torch.inf), sinks)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out).to(q.dtype).flatten(1)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q Kᵀ) V per head; each query sees its sequence up to itself, `sliding_window` keys at
    most. With a `softcap` c, scores s become c · tanh(s / c) before the softmax; with `sinks`, a logit for
    each head, each softmax's denominator has e^sink in it, too.

    q: [T, H, D]; k, v: [T, Hkv, D], this step's own, already in the cache; H a multiple of Hkv (grouped
    queries); rows may be strided; sinks: fp32 [H]. Returns [T, H · D] of q's dtype.
    """
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    window = sliding_window or NO_WINDOW
    if (gpu := gpu_kernels("attention", q)) is not None:
        gpu.paged_attention(
            out, q, k, v, k_cache, v_cache, meta, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        return out
    if meta.num_decodes:
        _decode(out, q, k_cache, v_cache, meta, scale, window, softcap, sinks)
    for s in range(meta.num_decodes, len(meta.context_lens)):
        rows = slice(meta.query_indptr[s], meta.query_indptr[s + 1])
        keys, values = k[rows], v[rows]
        if meta.context_lens[s] > keys.shape[0]:
            cached = meta.cache_rows(s)
            keys, values = k_cache[cached], v_cache[cached]
        heads = out[rows].view(q[rows].shape)
        prefill_attention_(
            heads, q[rows], keys, values, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    return out


def _decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    num = meta.num_decodes
    if (fast := kernels("attention", q)) is None:
        for s in range(num):
            cached, row = meta.cache_rows(s), slice(s, s + 1)
            heads = out[row].view(q[row].shape)
            keys, values = k_cache[cached], v_cache[cached]
            prefill_attention_(
                heads, q[row], keys, values, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        return
    assert q.stride()[1:] == (q.shape[2], 1)
    assert k_cache.dtype == v_cache.dtype == q.dtype
    assert meta.page_tables.is_contiguous()
    assert meta.page_tables.dtype == torch.int32
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    num_parts = min(num_kv_heads, -(-torch.get_num_threads() // num))  # few: a key's heads lie side by side
    fast.decode_attention(
        q,
        num * num_parts,
        meta.num_decode_keys * num_kv_heads * q.shape[2],
        out,
        q,
        k_cache,
        v_cache,
        meta.page_tables,
        meta.decode_context_lens,
        meta.page_tables.shape[1],
        meta.page_size,
        q.stride(0),
        num_heads,
        num_kv_heads,
        q.shape[2],
        num_parts,
        window,
        scale,
        softcap,
        0 if sinks is None else sinks,
    )


def prefill_attention_(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Attention of one sequence's last rows q [n, H, D] to its keys k, v [m, Hkv, D] into out [n, H, D].

    Queries go in blocks, each with only the keys that one of its queries may see. Scores are rounded to q's
    dtype, unless the CPU is slow in that; so that this costs least, the keys' mean is taken off first, which
    shifts all scores of a query alike (not with a softcap or sinks, which are for scores as they are).
    """
    if is_widened(q):
        q, k, v = q.float(), k.float(), v.float()
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[:2]
    past = num_keys - num_queries
    heads = (num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    queries, result = q.view(heads).permute(1, 2, 0, 3), out.view(heads).permute(1, 2, 0, 3)
    if not softcap and sinks is None:
        k = k - k.sum(0) / num_keys  # faster than `mean`
    keys = k.transpose(0, 1).contiguous().transpose(1, 2)  # [Hkv, D, m]
    values = v.transpose(0, 1)
    for start in range(0, num_queries, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, num_queries))
        seen = slice(max(0, past + start + 1 - window), past + rows.stop)
        block = queries[:, :, rows].reshape(num_kv_heads, -1, head_dim)
        scores = torch.bmm(block, keys[:, :, seen])
        weights = _causal_softmax(scores, rows.stop - start, scale, window, softcap, sinks)
        attended = torch.bmm(weights, values[:, seen])
        result[:, :, rows] = attended.view(num_kv_heads, heads[2], -1, head_dim).to(out.dtype)


def _causal_softmax(
    scores: Tensor, num_queries: int, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """softmax(scale · scores) over the keys that a query may see, 0 for the others; may overwrite `scores`.

    scores: [Hkv, H / Hkv · n, m], the n queries of a head side by side; the last query sees the last key.
    """
    num_keys = scores.shape[2]
    if (fast := kernels("attention", scores)) is None:
        mask = causal_mask(num_queries, num_keys, window, scores.device)
        by_head = scores.view(-1, num_queries, num_keys) * scale
        if softcap:
            by_head = softcap * (by_head / softcap).tanh()
        return _softmax(by_head.masked_fill_(~mask, -torch.inf), sinks).view(scores.shape)
    assert scores.is_contiguous()
    num_heads = scores.shape[0] * scores.shape[1] // num_queries
    places = 0 if sinks is None else sinks
    fast.causal_softmax(
        scores, num_heads, scores.numel(), scores, num_queries, num_keys, window, scale, softcap, places
    )
    return scores
