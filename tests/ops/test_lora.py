import pytest
import torch
from torch import Tensor

from tests.ops.lora_world import POPULARITIES, Pool, adapter_of_rows, offsets_of, segments_of
from tests.tolerances import assert_close
from toppings.core import GROUPS
from toppings.ops.lora import (
    MAX_KERNEL_ROWS,
    LoraSegments,
    add_lora_,
    add_lora_reference_,
    lora_expand,
    lora_expand_add_,
    lora_shrink,
)

HIDDEN, KV, INTER = 40, 24, 56
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


def apply(pool: Pool, segments: LoraSegments, group: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum by `add_lora_` and by its reference."""
    offsets, width = offsets_of(group, SIZES)
    y = torch.randn(x.shape[0], width).to(x.dtype)
    expected = y.clone()
    for add, target in ((add_lora_, y), (add_lora_reference_, expected)):
        add(
            target,
            x,
            arena=pool.arena,
            table=pool.table,
            layer=1,
            group=GROUPS[group],
            out_offsets=offsets,
            segments=segments,
        )
    return y, expected


def rows(num_rows: int, group: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, SIZES[GROUPS[group][0]][0]).to(dtype)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 33, 133])
def test_mixed_adapters_agree_with_the_reference(dtype: torch.dtype, popularity: str, num_rows: int) -> None:
    pool = Pool.random(RANKS, SIZES, dtype)
    segments = segments_of(adapter_of_rows(popularity, num_rows, len(RANKS)))
    for group in GROUPS:
        assert_close(*apply(pool, segments, group, rows(num_rows, group, dtype)), scale=4)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 16, 63, 128, 512])
@pytest.mark.parametrize("num_rows", [1, MAX_KERNEL_ROWS, MAX_KERNEL_ROWS + 1])
def test_every_rank_agrees_with_the_reference(dtype: torch.dtype, rank: int, num_rows: int) -> None:
    pool = Pool.random([dict.fromkeys(EVERY, rank)], SIZES, dtype)
    y, expected = apply(pool, LoraSegments([0, num_rows], [0]), "qkv", rows(num_rows, "qkv", dtype))
    assert_close(y, expected, scale=4)


@pytest.mark.usefixtures("form")
def test_base_rows_and_empty_segments_change_nothing(dtype: torch.dtype) -> None:
    pool = Pool.random(RANKS, SIZES, dtype)
    x, y = rows(20, "o", dtype), torch.randn(20, HIDDEN).to(dtype)
    before = y.clone()
    segments = LoraSegments([0, 2, 2, 20], [-1, 0, -1])
    add_lora_(
        y,
        x,
        arena=pool.arena,
        table=pool.table,
        layer=0,
        group=GROUPS["o"],
        out_offsets=[0],
        segments=segments,
    )
    assert torch.equal(y, before)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", [2, 40])
def test_rows_may_be_strided(dtype: torch.dtype, num_rows: int) -> None:
    pool = Pool.random(RANKS, SIZES, dtype)
    wide_x, wide_y = torch.randn(num_rows, 3 * HIDDEN).to(dtype), torch.randn(num_rows, 2 * HIDDEN).to(dtype)
    x, y = wide_x[:, HIDDEN : 2 * HIDDEN], wide_y[:, HIDDEN:]
    untouched, expected = wide_y[:, :HIDDEN].clone(), y.clone()
    for add, target, source in ((add_lora_, y, x), (add_lora_reference_, expected, x.contiguous())):
        add(
            target,
            source,
            arena=pool.arena,
            table=pool.table,
            layer=0,
            group=GROUPS["o"],
            out_offsets=[0],
            segments=LoraSegments([0, num_rows], [4]),
        )
    assert_close(y, expected, scale=4)
    assert torch.equal(wide_y[:, :HIDDEN], untouched)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", [2, 33])
def test_a_row_alone_gives_what_it_gives_in_a_mixed_batch(num_rows: int) -> None:
    torch.manual_seed(1)
    pool = Pool.random(RANKS, SIZES, torch.float32)
    adapters = adapter_of_rows("uniform", num_rows, len(RANKS))
    x, y = rows(num_rows, "qkv", torch.float32), torch.zeros(num_rows, HIDDEN + 2 * KV)

    def run(low: int, high: int) -> Tensor:
        result = y[low:high].clone()
        add_lora_(
            result,
            x[low:high],
            arena=pool.arena,
            table=pool.table,
            layer=0,
            group=GROUPS["qkv"],
            out_offsets=offsets_of("qkv", SIZES)[0],
            segments=segments_of(adapters[low:high]),
        )
        return result

    together = run(0, num_rows)
    for row in range(num_rows):
        assert_close(run(row, row + 1)[0], together[row])


def test_shrink_then_expand_is_the_whole_product(dtype: torch.dtype) -> None:
    x, a, b = torch.randn(5, 32).to(dtype), torch.randn(6, 32).to(dtype) / 6, torch.randn(6, 20).to(dtype)
    expected = x.float() @ a.float().t() @ b.float()
    y = torch.zeros(5, 20, dtype=dtype)
    lora_expand_add_(y, lora_shrink(x, a), b)
    assert_close(lora_expand(lora_shrink(x, a), b), expected, dtype, scale=4)
    assert_close(y, expected, dtype, scale=4)
