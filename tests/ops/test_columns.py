"""Gains and offsets of columns: the kernels against the sums that torch makes in fp32."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.ops.lora_world import POPULARITIES, adapter_of_rows, segments_of
from tests.tolerances import assert_close
from toppings.ops import dispatch
from toppings.ops.columns import adjust_columns_
from toppings.ops.lora import LoraSegments

WIDTHS = (48, 24, 200)
KINDS = (("gain", "offset"), ("gain",), ("offset",), ())  # of each adapter; the last has none


def world(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An arena, and places int64 [4, 3, 2]; the second module of the first adapter has none, either."""
    places, pieces = torch.zeros(len(KINDS), len(WIDTHS), 2, dtype=torch.int64), [torch.zeros(32)]
    for slot, kind in enumerate(KINDS):
        for module, width in enumerate(WIDTHS):
            for i, name in enumerate(("gain", "offset")):
                if name in kind and (slot, module) != (0, 1):
                    places[slot, module, i] = sum(map(len, pieces))
                    pieces += [torch.randn(width), torch.zeros(-width % 32)]  # as blocks are aligned
    return torch.cat(pieces).to(dtype), places


def expected_of(y: Tensor, arena: Tensor, places: Tensor, adapters: list[int]) -> Tensor:
    """Row by row in fp32, rounded once."""
    wide, edges = y.float(), [0, 48, 72, 272]
    for row, slot in enumerate(adapters):
        if slot < 0:
            continue
        for module, (low, high) in enumerate(pairwise(edges)):
            gain, offset = places[slot, module].tolist()
            part = wide[row, low:high].clone()
            if gain:
                wide[row, low:high] += part * arena[gain : gain + high - low].float()
            if offset:
                wide[row, low:high] += arena[offset : offset + high - low].float()
    return wide.to(y.dtype)


@pytest.mark.parametrize(
    ("num_rows", "popularity"), [(1, "identical"), (7, "zipf"), *((133, each) for each in POPULARITIES)]
)
def test_every_row_gets_its_own_adapters_columns(
    num_rows: int, popularity: str, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    arena, places = world(dtype)
    adapters = adapter_of_rows(popularity, num_rows, len(KINDS))
    y = torch.randn(num_rows, sum(WIDTHS)).to(dtype)
    expected = expected_of(y, arena, places, adapters)
    adjust_columns_(y, arena=arena, places=places, out_offsets=[0, 48, 72], segments=segments_of(adapters))
    assert_close(y, expected)


def test_rows_of_no_adapter_keep_their_bits() -> None:
    arena, places = world(torch.float32)
    y = torch.randn(9, sum(WIDTHS))
    before = y.clone()
    segments = LoraSegments([0, 3, 6, 9], [-1, 0, 3])
    adjust_columns_(y, arena=arena, places=places, out_offsets=[0, 48, 72], segments=segments)
    assert torch.equal(y[:3], before[:3])
    assert torch.equal(y[6:], before[6:])
    assert torch.equal(y[3:6, 48:72], before[3:6, 48:72])
    assert not torch.equal(y[3:6], before[3:6])


@needs_triton
@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(("num_rows", "popularity"), [(1, "identical"), (7, "distinct"), (133, "zipf")])
def test_the_triton_kernel_agrees(num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arena, places = world(dtype)
    adapters = adapter_of_rows(popularity, num_rows, len(KINDS))
    y = torch.randn(num_rows, sum(WIDTHS)).to(dtype)
    expected, actual = expected_of(y, arena, places, adapters), y.to(DEVICE)
    assert dispatch.gpu_kernels("columns", actual) is not None
    adjust_columns_(
        actual,
        arena=arena.to(DEVICE),
        places=places.to(DEVICE),
        out_offsets=[0, 48, 72],
        segments=segments_of(adapters),
    )
    assert_close(actual.cpu(), expected)
