"""The Triton LoRA kernels against the fp32 reference; without a GPU in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.ops.lora_world import POPULARITIES, Pool, adapter_of_rows, offsets_of, segments_of
from tests.tolerances import assert_close
from toppings.core import GROUPS
from toppings.ops import dispatch
from toppings.ops.lora import MAX_RANK, LoraForm, LoraSegments, add_lora_, add_lora_reference_

if dispatch.HAS_TRITON:
    from toppings.ops.gpu_launch import check_aligned
    from toppings.ops.gpu_plan import LoraBatch

pytestmark = [needs_triton, pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

HIDDEN, KV, INTER = 48, 24, 56
SIZES = [
    (HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN),
    (HIDDEN, INTER), (HIDDEN, INTER), (INTER, HIDDEN),
]  # fmt: skip
EVERY = range(7)
RANKS = [
    dict.fromkeys(EVERY, 8),
    dict.fromkeys((0, 2, 3), 1),
    {module: 3 + 5 * module for module in EVERY},
    dict.fromkeys((4, 6), 512),
    dict.fromkeys(EVERY, 64),
]
FORMS: tuple[LoraForm, ...] = ("sgmv", "mbgmv", "bgmv")


def apply(
    pool: Pool, segments: LoraSegments, group: str, x: Tensor, sizes: list[tuple[int, int]] = SIZES
) -> tuple[Tensor, Tensor]:
    """The sum by `add_lora_` on the device and by the reference."""
    offsets, width = offsets_of(group, sizes)
    y = torch.randn(x.shape[0], width).to(x.dtype)
    expected, actual = y.clone(), y.to(DEVICE)
    options: dict[str, Any] = {
        "layer": 1,
        "group": GROUPS[group],
        "out_offsets": offsets,
        "segments": segments,
    }
    add_lora_reference_(expected, x, arena=pool.arena, table=pool.table, **options)
    arena, table = pool.arena.to(DEVICE), pool.table.to(DEVICE)
    add_lora_(actual, x.to(DEVICE), arena=arena, table=table, **options)
    return actual.cpu(), expected


def rows(num_rows: int, group: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(num_rows, SIZES[GROUPS[group][0]][0]).to(dtype)


def with_form(segments: LoraSegments, form: LoraForm, max_rank: int = MAX_RANK) -> LoraSegments:
    """`segments`, with a batch of the form however long they are."""
    segments = LoraSegments(segments.indptr, segments.slots, max_rank=max_rank)
    segments.batches[DEVICE] = LoraBatch.build(segments, DEVICE, form)
    return segments


SMALL_BATCHES = [(1, "identical"), (2, "distinct"), (3, "uniform"), (7, "zipf"), (7, "skewed")]
LARGE_BATCHES = [*((33, popularity) for popularity in POPULARITIES), (133, "zipf")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", ["qkv", "gate_up"])
@pytest.mark.parametrize(("num_rows", "popularity"), SMALL_BATCHES)
def test_mixed_adapters_agree_with_the_reference(
    num_rows: int, popularity: str, group: str, form: LoraForm
) -> None:
    torch.manual_seed(0)
    pool = Pool.random(RANKS, SIZES, torch.float32)
    segments = with_form(segments_of(adapter_of_rows(popularity, num_rows, len(RANKS))), form)
    assert_close(*apply(pool, segments, group, rows(num_rows, group, torch.float32)), scale=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "popularity"), LARGE_BATCHES)
def test_large_batches_agree_with_the_reference(num_rows: int, popularity: str, form: LoraForm) -> None:
    torch.manual_seed(0)
    pool = Pool.random([{6: 8}, {6: 1}, {3: 8}, {6: 33}, {6: 16}], SIZES, torch.float32)
    segments = with_form(segments_of(adapter_of_rows(popularity, num_rows, 5)), form, max_rank=33)
    assert_close(*apply(pool, segments, "down", rows(num_rows, "down", torch.float32)), scale=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2, 3, 15, 16, 17, 63, 128, 512])
def test_every_rank_agrees_with_the_reference(rank: int, form: LoraForm) -> None:
    torch.manual_seed(rank)
    pool = Pool.random([dict.fromkeys(EVERY, rank)], SIZES, torch.float32)
    segments = with_form(LoraSegments([0, 3], [0]), form, max_rank=rank)
    assert_close(*apply(pool, segments, "qkv", rows(3, "qkv", torch.float32)), scale=4)


@pytest.mark.parametrize("form", FORMS)
def test_every_dtype_and_group_agrees_with_the_reference(dtype: torch.dtype, form: LoraForm) -> None:
    pool = Pool.random(RANKS, SIZES, dtype)
    indptr = [0, 1, 3, 4, 5] if form == "bgmv" else [0, 1, 20, 22, 24]
    segments = with_form(LoraSegments(indptr, [2, 4, -1, 1]), form, max_rank=64)
    for group in GROUPS:
        assert_close(*apply(pool, segments, group, rows(indptr[-1], group, dtype)), scale=4)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_longer_than_a_tile_are_split_and_added_up(dtype: torch.dtype, form: LoraForm) -> None:
    num_in = 2504
    sizes = [(num_in, 264), *[(num_in, 40)] * 2, *SIZES[3:]]
    pool = Pool.random([{0: 5, 2: 20}, {1: 33}], sizes, dtype)
    segments = with_form(LoraSegments([0, 2, 3], [0, 1]), form, max_rank=33)
    x = torch.randn(3, num_in).to(dtype)
    assert_close(*apply(pool, segments, "qkv", x, sizes), scale=8)


def test_form_follows_the_rows_per_adapter() -> None:
    assert LoraSegments([0, 16, 40], [0, -1]).form == "mbgmv"
    assert LoraSegments([0, 16, 40], [0, -1], decode_form="bgmv").form == "bgmv"
    assert LoraSegments([0, 17], [0]).form == "sgmv"


def test_base_rows_and_empty_segments_change_nothing() -> None:
    pool = Pool.random(RANKS, SIZES, torch.float32)
    y = torch.randn(20, HIDDEN, device=DEVICE)
    before = y.clone()
    options: dict[str, Any] = {"layer": 0, "group": GROUPS["o"], "out_offsets": [0]}
    x, arena, table = (t.to(DEVICE) for t in (rows(20, "o", torch.float32), pool.arena, pool.table))
    for segments in (LoraSegments([0, 2, 2, 20], [-1, 0, -1]), LoraSegments([0, 20], [-1])):
        add_lora_(y, x, arena=arena, table=table, segments=segments, **options)
    assert torch.equal(y, before)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_left_empty_by_a_smaller_batch_do_nothing(form: LoraForm) -> None:
    pool = Pool.random(RANKS, SIZES, torch.float32)
    segments = with_form(LoraSegments([0, 1, 2], [0, 4]), form, max_rank=64)
    batch = segments.batches[DEVICE]
    empty = torch.tensor([[0, 0, -1]] * 3, dtype=torch.int32, device=DEVICE)
    segments.batches[DEVICE] = replace(batch, chunks=torch.cat((batch.chunks[:1], empty, batch.chunks[1:])))
    assert_close(*apply(pool, segments, "qkv", rows(2, "qkv", torch.float32)), scale=4)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_that_changes_under_the_same_chunks_is_followed(form: LoraForm) -> None:
    """What keeps a CUDA graph valid: the launch reads adapters' places and ranks when it runs."""
    pool = Pool.random(RANKS, SIZES, torch.float32)
    segments = with_form(LoraSegments([0, 2], [0]), form, max_rank=64)
    x = rows(2, "qkv", torch.float32)
    apply(pool, segments, "qkv", x)
    pool.table[0] = pool.table[4]  # rank 8 leaves, rank 64 comes
    assert_close(*apply(pool, segments, "qkv", x), scale=4)


@pytest.mark.parametrize("form", FORMS)
def test_rows_may_be_strided(form: LoraForm) -> None:
    pool = Pool.random(RANKS, SIZES, torch.float32)
    wide_x, wide_y = torch.randn(5, 3 * HIDDEN), torch.randn(5, 2 * HIDDEN)
    expected = wide_y.clone()
    options: dict[str, Any] = {
        "layer": 0,
        "group": GROUPS["o"],
        "out_offsets": [0],
        "segments": with_form(LoraSegments([0, 5], [4]), form, max_rank=64),
    }
    x, y = wide_x[:, HIDDEN : 2 * HIDDEN], wide_y.to(DEVICE)
    add_lora_reference_(expected[:, HIDDEN:], x, arena=pool.arena, table=pool.table, **options)
    arena, table = pool.arena.to(DEVICE), pool.table.to(DEVICE)
    wide_on_device = wide_x.to(DEVICE)[:, HIDDEN : 2 * HIDDEN]
    add_lora_(y[:, HIDDEN:], wide_on_device, arena=arena, table=table, **options)
    assert_close(y.cpu(), expected, scale=4)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_gives_exactly_what_it_gives_in_a_mixed_batch(form: LoraForm) -> None:
    torch.manual_seed(1)
    pool = Pool.random(RANKS, SIZES, torch.float32)
    adapters = adapter_of_rows("uniform", 7, len(RANKS))
    x, y = rows(7, "qkv", torch.float32).to(DEVICE), torch.zeros(7, HIDDEN + 2 * KV, device=DEVICE)
    arena, table = pool.arena.to(DEVICE), pool.table.to(DEVICE)

    def run(low: int, high: int) -> Tensor:
        result = y[low:high].clone()
        options: dict[str, Any] = {
            "layer": 0,
            "group": GROUPS["qkv"],
            "out_offsets": offsets_of("qkv", SIZES)[0],
        }
        segments = with_form(segments_of(adapters[low:high]), form, max_rank=64)
        add_lora_(result, x[low:high], arena=arena, table=table, segments=segments, **options)
        return result

    together = run(0, 7)
    for row in range(7):
        assert torch.equal(run(row, row + 1)[0], together[row])


def test_sizes_that_would_break_alignment_are_refused() -> None:
    with pytest.raises(ValueError, match="has 20 inputs or outputs; on a GPU they must be a multiple of 8"):
        check_aligned(torch.bfloat16, 16, 20)
