"""The Triton attention kernels against the fp32 reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.ops.test_attention import PAGE_SIZE, SINKS, attend, step
from tests.tolerances import assert_close
from toppings.ops import gpu_plan
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention
from toppings.ops.gpu_plan import decode_splits, most_splits

pytestmark = [needs_triton, pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_mixed_batch_agrees_with_the_reference(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    assert_close(*attend(meta, dtype, heads, window, device=DEVICE), scale=2)


@pytest.mark.parametrize("num_decodes", [1, 2, 7, 33])
def test_decodes_agree_with_the_reference(num_decodes: int) -> None:
    meta = step(num_decodes, [1] * num_decodes, [1 + 13 * i % 70 for i in range(num_decodes)])
    assert_close(*attend(meta, torch.float32, (4, 2, 32), None, device=DEVICE))


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that contexts of hundreds of tokens have many splits, and some as many as there may be."""
    monkeypatch.setattr(gpu_plan, "SPLIT_KEYS", 16)
    monkeypatch.setattr(gpu_plan, "MAX_SPLITS", 12)


EVEN, SKEWED = [70] * 3, [1, 16, 340, 17, 5, 150]


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    ("contexts", "heads", "window", "softcap"),
    [
        (EVEN, (4, 4, 16), None, 0.0),
        (SKEWED, (6, 2, 24), None, 0.0),
        (SKEWED, (6, 2, 24), 100, 0.0),
        (SKEWED, (6, 2, 24), 100, 2.0),
        (EVEN, (2, 1, 16), 10, 2.0),
    ],
)
def test_contexts_read_in_splits_agree_with_the_reference(
    dtype: torch.dtype, contexts: list[int], heads: tuple[int, int, int], window: int | None, softcap: float
) -> None:
    meta = step(len(contexts), [1] * len(contexts), contexts)
    assert_close(*attend(meta, dtype, heads, window, 0.5, DEVICE, softcap=softcap), scale=2)


def test_a_context_of_more_than_one_split_agrees_with_the_reference() -> None:
    """With splits as they are."""
    meta = step(2, [1, 1], [gpu_plan.SPLIT_KEYS, 2 * gpu_plan.SPLIT_KEYS + 1])
    assert_close(*attend(meta, torch.float32, (4, 2, 16), None, device=DEVICE))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 100])
def test_a_row_has_the_same_bits_in_any_batch(window: int | None) -> None:
    """Alone, among others, and in a graph's batch, whose list has room for more."""
    contexts, heads, head_dim = [150, 1, 200, 17], 4, 16
    meta = step(len(contexts), [1] * len(contexts), contexts)
    num_pages = int(meta.page_tables.max()) + 1
    cache = KVCache.allocate(1, num_pages, PAGE_SIZE, 2, head_dim, torch.float32, DEVICE)
    cache.k[0].normal_()
    cache.v[0].normal_()
    q, kv = torch.randn(len(contexts), heads, head_dim, device=DEVICE), torch.zeros(1, 2, head_dim)

    def out(rows: list[int], padding: int = 0) -> torch.Tensor:
        lens = [contexts[row] for row in rows]
        tables = meta.page_tables[rows].contiguous().to(DEVICE)
        its = replace(meta, num_decodes=len(rows), context_lens=lens, page_tables=tables)
        room = torch.zeros(padding, 4, dtype=torch.int32, device=DEVICE)
        its = replace(its, brought=replace(its.tiles, splits=torch.cat((its.tiles.splits, room))))
        return paged_attention(
            q[rows], kv, kv, cache.k[0], cache.v[0], its, scale=0.25, sliding_window=window
        )

    together = out([0, 1, 2, 3], padding=30)
    assert torch.equal(together[[3, 0]], out([3, 0]))
    assert torch.equal(together[[2]], out([2]))


@pytest.mark.parametrize("window", [None, 5])
def test_capped_scores_agree_with_the_reference(dtype: torch.dtype, window: int | None) -> None:
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    assert_close(*attend(meta, dtype, (6, 2, 24), window, 1.0, DEVICE, softcap=2.0), scale=2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("split_keys", [256, 16])
def test_sinks_take_their_part_of_the_weights(
    dtype: torch.dtype, window: int | None, split_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "SPLIT_KEYS", split_keys)
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    assert_close(*attend(meta, dtype, (6, 2, 24), window, 0.5, DEVICE, sinks=SINKS), scale=2)


@pytest.mark.parametrize("window", [None, 100])
def test_prompts_longer_than_a_tile_agree_with_the_reference(window: int | None) -> None:
    meta = step(0, [130, 70], [130, 190])
    assert_close(*attend(meta, torch.float32, (2, 1, 16), window, device=DEVICE))


def test_sequences_without_keys_give_zeros() -> None:
    """Rows that pad a graph's batch."""
    meta = replace(step(2, [1, 1], [5, 5]), context_lens=[5, 0])
    meta = replace(meta, page_tables=meta.page_tables.to(DEVICE))
    cache = KVCache.allocate(1, 8, PAGE_SIZE, 2, 16, torch.float32, DEVICE)
    cache.v[0].fill_(3.0)
    q, kv = torch.randn(2, 4, 16, device=DEVICE), torch.zeros(2, 2, 16, device=DEVICE)
    out = paged_attention(q, kv, kv, cache.k[0], cache.v[0], meta, scale=0.25)
    assert out.tolist() == [[3.0] * 64, [0.0] * 64]
    out = paged_attention(
        q, kv, kv, cache.k[0], cache.v[0], meta, scale=0.25, sinks=torch.zeros(4, device=DEVICE)
    )
    assert_close(out[0].cpu(), torch.full((64,), 3 * 5 / 6))  # all five keys score 0, as the sink does
    assert not out[1].any()


def test_contexts_are_read_in_splits_the_longest_first() -> None:
    splits, indptr = decode_splits(np.array([300, 0, 256, 40_000], np.int32))
    assert indptr.tolist() == [0, 2, 2, 3, 43]
    assert splits[:2].tolist() == [[3, 0, 1024, 3], [3, 1024, 2048, 4]]
    assert splits[39:].tolist() == [
        [0, 0, 256, 0],
        [2, 0, 256, -1],
        [3, 39_936, 40_000, 42],
        [0, 256, 300, 1],
    ]
    assert decode_splits(np.array([], np.int32))[1].tolist() == [0]


def test_no_contexts_have_more_splits_than_there_is_room_for() -> None:
    for most in (1, 256, 257, 16_384, 16_385, 131_072):
        lens = np.unique(np.linspace(1, most, 999).astype(np.int32))
        splits, indptr = decode_splits(lens)
        assert np.diff(indptr).max() == most_splits(1, most)
        assert (splits[:, 2] - splits[:, 1]).sum() == lens.sum()


def test_prompts_are_known_to_be_whole() -> None:
    def is_whole(meta: AttentionMetadata) -> bool:
        return replace(meta, page_tables=meta.page_tables.to(DEVICE)).tiles.are_prefills_whole

    assert is_whole(step(1, [1, 9, 3], [7, 9, 3]))
    assert not is_whole(step(1, [1, 9, 3], [7, 9, 4]))
