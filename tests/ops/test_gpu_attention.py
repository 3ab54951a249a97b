"""The Triton attention kernels against the fp32 reference."""

from dataclasses import replace

import pytest
import torch

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.ops.test_attention import PAGE_SIZE, SINKS, attend, step
from tests.tolerances import assert_close
from toppings.ops import dispatch
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention

if dispatch.HAS_TRITON:
    from toppings.ops import gpu_attention
    from toppings.ops.gpu_attention import num_splits

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


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("splits", [2, 8])
def test_contexts_split_over_programs_add_up(
    dtype: torch.dtype, splits: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "num_splits", lambda *_: splits)
    meta = step(3, [1, 1, 1], [1, 200, 330])
    assert_close(*attend(meta, dtype, (4, 2, 16), window, device=DEVICE), scale=2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("splits", [1, 2])
def test_capped_scores_agree_with_the_reference(
    dtype: torch.dtype, window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "num_splits", lambda *_: splits)
    meta = step(3, [1, 1, 1, 9, 6, 1], [1, 17, 40, 9, 21, 1])
    assert_close(*attend(meta, dtype, (6, 2, 24), window, 1.0, DEVICE, softcap=2.0), scale=2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("splits", [1, 2])
def test_sinks_take_their_part_of_the_weights(
    dtype: torch.dtype, window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "num_splits", lambda *_: splits)
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


def test_splits_fill_the_device_and_no_more() -> None:
    assert num_splits(32, 32, 4096, 132) == 1
    assert num_splits(1, 32, 512, 132) == 4
    assert num_splits(1, 8, 8192, 132) == 64
    assert num_splits(1, 8, 100, 132) == 1


def test_prompts_are_known_to_be_whole() -> None:
    def is_whole(meta: AttentionMetadata) -> bool:
        return replace(meta, page_tables=meta.page_tables.to(DEVICE)).tiles.are_prefills_whole

    assert is_whole(step(1, [1, 9, 3], [7, 9, 3]))
    assert not is_whole(step(1, [1, 9, 3], [7, 9, 4]))
