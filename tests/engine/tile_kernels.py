"""What the Triton kernels of attention and LoRA compute, by torch in host memory, from what they read:
tiles, chunks and lengths in tensors, never the host's lists. Graphs can follow these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toppings.ops.attention import AttentionMetadata, prefill_attention_
from toppings.ops.gpu_plan import AttentionTiles, LoraBatch
from toppings.ops.lora import LoraSegments, _add_long

HERE = torch.device("cpu")


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
    tiles = meta.tiles
    contexts = tiles.context_lens[: meta.num_decodes].tolist()
    assert contexts == split_lengths(tiles)
    decodes = [(s, s + 1, s, context - 1) for s, context in enumerate(contexts)]
    for start, stop, sequence, position in [*decodes, *tiles.prefill_tiles.tolist()]:
        if position < 0:
            out[start:stop] = 0
        elif stop > start:
            seen = torch.arange(position + stop - start)
            pages = meta.page_tables[sequence, seen // meta.page_size].long()
            rows = pages * meta.page_size + seen % meta.page_size
            heads = out[start:stop].view(q[start:stop].shape)
            queries, keys, values = q[start:stop], k_cache[rows], v_cache[rows]
            prefill_attention_(
                heads, queries, keys, values, scale=scale, window=window, softcap=softcap, sinks=sinks
            )


def split_lengths(tiles: AttentionTiles) -> list[int]:
    """How many keys each decode's splits have: all, each once."""
    indptr = tiles.split_indptr.tolist()
    lengths = [0] * (len(indptr) - 1)
    for sequence, low, high, _ in sorted(tiles.splits[: indptr[-1]].tolist()):
        assert low == lengths[sequence]
        lengths[sequence] = high
    return lengths


def add_lora(
    y: Tensor, x: Tensor, arena: Tensor, places: Tensor, out_offsets: Sequence[int], segments: LoraSegments
) -> None:
    batch = segments.batches.get(HERE) or LoraBatch.build(segments, HERE)
    for start, stop, slot in batch.chunks.tolist():
        if slot >= 0:
            triples = places[slot, : len(out_offsets)].tolist()
            _add_long(y[start:stop], x[start:stop], arena, triples, out_offsets)
