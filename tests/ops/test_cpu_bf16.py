"""The bfloat16 kernels of CPUs that multiply bfloat16."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.gate import NO_BF16_PRODUCTS, OTHER_PACKING
from tests.ops.lora_world import POPULARITIES, Pool, adapter_of_rows, offsets_of, segments_of
from tests.tolerances import assert_close
from toppings.core import GROUPS
from toppings.ops import dispatch, linear
from toppings.ops.experts import ExpertLinears, GroupedRows
from toppings.ops.linear import MAX_FEW_ROWS, Linear
from toppings.ops.lora import LoraSegments, add_lora_, add_lora_reference_

pytestmark = pytest.mark.skipif(not dispatch.has_bf16(), reason=NO_BF16_PRODUCTS)

BF16 = torch.bfloat16
HIDDEN, KV, INTER = 224, 32, 96
SIZES = [
    (HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN),
    (HIDDEN, INTER), (HIDDEN, INTER), (INTER, HIDDEN),
]  # fmt: skip
EVERY = range(7)
RANKS = [dict.fromkeys(EVERY, 8), dict.fromkeys((0, 2), 1), {m: 3 + 5 * m for m in EVERY}]


def apply(pool: Pool, segments: LoraSegments, group: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum by the kernel and by its reference."""
    offsets, width = offsets_of(group, SIZES)
    y = torch.linspace(-2, 2, x.shape[0] * width).view(x.shape[0], width).to(BF16)
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


def rows(num_rows: int, group: str) -> Tensor:
    return torch.randn(num_rows, SIZES[GROUPS[group][0]][0]).to(BF16)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33, 133])
def test_mixed_adapters_agree_with_the_reference(popularity: str, num_rows: int) -> None:
    pool = Pool.random(RANKS, SIZES, BF16)
    segments = segments_of(adapter_of_rows(popularity, num_rows, len(RANKS)))
    for group in GROUPS:
        assert_close(*apply(pool, segments, group, rows(num_rows, group)), scale=4)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 16, 63, 128, 512])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 17])
def test_every_rank_agrees_with_the_reference(rank: int, num_rows: int) -> None:
    pool = Pool.random([dict.fromkeys(EVERY, rank)], SIZES, BF16)
    y, expected = apply(pool, LoraSegments([0, num_rows], [0]), "qkv", rows(num_rows, "qkv"))
    assert_close(y, expected, scale=4)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    pool = Pool.random([dict.fromkeys(EVERY, 21)], SIZES, BF16)
    offsets, width = offsets_of("qkv", SIZES)
    x, y = rows(37, "qkv"), torch.randn(37, width).to(BF16)

    def added(start: int, stop: int) -> Tensor:
        part = y[start:stop].clone()
        add_lora_(
            part,
            x[start:stop],
            arena=pool.arena,
            table=pool.table,
            layer=0,
            group=GROUPS["qkv"],
            out_offsets=offsets,
            segments=LoraSegments([0, stop - start], [0]),
        )
        return part

    whole = added(0, 37)
    assert all(torch.equal(added(i, i + 1)[0], whole[i]) for i in range(37))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", range(1, MAX_FEW_ROWS + 1))
@pytest.mark.parametrize(("num_out", "num_in"), [(64, 32), (100, 50), (130, 1024), (192, 2816)])
def test_few_rows_agree_with_fp32(num_out: int, num_in: int, num_rows: int, has_bias: bool) -> None:
    weight, x = (torch.randn(n, num_in).to(BF16) for n in (num_out, num_rows))
    bias = torch.randn(num_out).to(BF16) if has_bias else None
    product = Linear(weight / 8, bias)
    if product.blocks is None:
        pytest.skip(OTHER_PACKING)
    expected = functional.linear(x.float(), weight.float() / 8, None if bias is None else bias.float())
    assert_close(product(x), expected, scale=4)
    many = x.repeat(MAX_FEW_ROWS + 1, 1)
    assert_close(product(many)[:num_rows], expected, scale=4)


@pytest.mark.parametrize(("num_out", "num_in"), [(100, 50), (192, 1024)])
def test_experts_rows_get_what_each_expert_gives_alone(num_out: int, num_in: int) -> None:
    counts = [1, 0, MAX_FEW_ROWS, 5, MAX_FEW_ROWS + 1, 4, 3]
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
    rows = GroupedRows.of(chosen, len(counts))
    assert rows.counts == counts
    x, weight = torch.randn(len(chosen), num_in).to(BF16), torch.randn(len(counts) * num_out, num_in).to(BF16)
    products = ExpertLinears(weight, len(counts))
    parts = zip(weight.chunk(len(counts)), torch.split(x, counts), strict=True)
    alone = [Linear(each)(part) for each, part in parts]
    assert torch.equal(products(x, rows), torch.cat(alone))


def test_another_layout_leaves_the_product_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = linear._pack
    monkeypatch.setattr(linear, "_pack", lambda weight: pack(weight.roll(1, 0)))
    monkeypatch.setattr(linear, "packed_reason", lambda dtype: (True, ""))
    weight = torch.randn(64, 64).to(BF16)
    assert Linear(weight).blocks is None
