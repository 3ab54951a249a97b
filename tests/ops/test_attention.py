from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close
from toppings.ops.attention import (
    AttentionMetadata,
    KVCache,
    causal_mask,
    paged_attention,
    paged_attention_reference,
)

PAGE_SIZE = 4


def step(num_decodes: int, query_lens: list[int], context_lens: list[int]) -> AttentionMetadata:
    """Sequences whose pages are scattered over the cache."""
    num_pages = [-(-length // PAGE_SIZE) for length in context_lens]
    pages = torch.randperm(sum(num_pages), dtype=torch.int32).split(num_pages)  # type: ignore[no-untyped-call]
    tables = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
    indptr = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    slots = torch.zeros(indptr[-1], dtype=torch.int64)
    return AttentionMetadata(num_decodes, indptr, context_lens, tables, slots, PAGE_SIZE)


def attend(
    meta: AttentionMetadata,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    window: int | None,
    shift: float = 0,
    device: torch.device | str = "cpu",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `paged_attention` on `device` and its reference say for random queries and cache."""
    num_heads, num_kv_heads, head_dim = heads
    num_pages = int(meta.page_tables.max()) + 1
    cache = KVCache.allocate(1, num_pages, PAGE_SIZE, num_kv_heads, head_dim, dtype, "cpu")
    cache.k[0].normal_().add_(shift)
    cache.v[0].normal_()
    width = num_heads + 2 * num_kv_heads
    qkv = torch.randn(meta.query_indptr[-1], width, head_dim).to(dtype)
    for s, length in enumerate(meta.context_lens):  # the step's own keys are in the cache already
        rows = slice(meta.query_indptr[s], meta.query_indptr[s + 1])
        cached = meta.cache_rows(s)[length - (rows.stop - rows.start) :]
        qkv[rows, num_heads : num_heads + num_kv_heads] = cache.k[0][cached]
        qkv[rows, num_heads + num_kv_heads :] = cache.v[0][cached]
    scale = head_dim**-0.5
    there = replace(meta, page_tables=meta.page_tables.to(device))
    k_cache, v_cache = cache.k[0].to(device), cache.v[0].to(device)
    q_there, k_there, v_there = qkv.to(device).tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    actual = paged_attention(
        q_there,
        k_there,
        v_there,
        k_cache,
        v_cache,
        there,
        scale=scale,
        sliding_window=window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(device),
    ).cpu()
    q = qkv[:, :num_heads]
    expected = paged_attention_reference(
        q, cache.k[0], cache.v[0], meta, scale=scale, sliding_window=window, softcap=softcap, sinks=sinks
    )
    return actual, expected


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_mixed_batch_agrees_with_the_reference(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    assert_close(*attend(meta, dtype, heads, window))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_decodes", [1, 2, 7, 33])
def test_decodes_agree_with_the_reference(dtype: torch.dtype, num_decodes: int) -> None:
    meta = step(num_decodes, [1] * num_decodes, [1 + 13 * i % 70 for i in range(num_decodes)])
    assert_close(*attend(meta, dtype, (4, 2, 32), None))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("window", [None, 5])
def test_capped_scores_agree_with_the_reference(dtype: torch.dtype, window: int | None) -> None:
    """A cap below many of the scores, whose keys have a mean that matters then."""
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    actual, expected = attend(meta, dtype, (6, 2, 24), window, shift=1.0, softcap=2.0)
    assert_close(actual, expected, scale=3)
    uncapped, _ = attend(meta, dtype, (6, 2, 24), window, shift=1.0)
    assert (actual - uncapped).abs().max() > 0.1


SINKS = torch.tensor([-3.0, 0.0, 1.0, 2.0, 4.0, 200.0])
"""Of six heads: the last one's leaves nothing for the keys."""


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_take_their_part_of_the_weights(dtype: torch.dtype, window: int | None, softcap: float) -> None:
    """Whatever the keys' mean is: a score counts as it is then."""
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    torch.manual_seed(3)
    actual, expected = attend(meta, dtype, (6, 2, 24), window, 0.5, softcap=softcap, sinks=SINKS)
    assert_close(actual, expected, scale=3)
    torch.manual_seed(3)
    without, _ = attend(meta, dtype, (6, 2, 24), window, 0.5, softcap=softcap)
    change = (actual - without).view(-1, 6, 24).abs().amax((0, 2))
    assert (change[1:] > 0.1).all()
    assert actual.float().view(-1, 6, 24)[:, 5].abs().max() < 1e-30


@pytest.mark.parametrize("window", [None, 100, 300])
def test_prompts_longer_than_a_query_block_agree_with_the_reference(
    dtype: torch.dtype, window: int | None
) -> None:
    assert_close(*attend(step(0, [300, 200], [300, 350]), dtype, (4, 2, 16), window))


def test_keys_with_a_common_offset_lose_no_precision(dtype: torch.dtype) -> None:
    actual, expected = attend(step(0, [64], [64]), dtype, (2, 2, 16), None, shift=12.0)
    assert_close(actual, expected, scale=2)


def test_mask_lets_the_last_query_see_the_last_key_and_no_more_than_the_window() -> None:
    assert causal_mask(2, 4, 2, torch.device("cpu")).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
