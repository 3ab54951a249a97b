"""Draws without sorting are those from the sorted row; without a GPU in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_world import DEVICE, needs_triton
from toppings.ops import device_sampling, dispatch
from toppings.ops.sampling import SamplingRow, sample
from toppings.ops.truncation import cut
from toppings.sampling_params import SamplingParams

if dispatch.HAS_TRITON:
    from toppings.ops import gpu_sampling

pytestmark = [needs_triton, pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

VOCAB_SIZE = 600
LIMITS = [(0, 0.9, 0.0), (0, 1.0, 0.1), (300, 0.7, 0.0), (5, 1.0, 0.0), (300, 1.0, 0.4)]
"""(top-k, top-p, min-p)"""


def random_probs(num_rows: int) -> Tensor:
    """Some are flat, some peaked, with ties in all of them."""
    generator = torch.Generator().manual_seed(num_rows)
    scale = torch.tensor([0.0, 0.1, 1.0, 4.0]).repeat(num_rows)[:num_rows, None]
    logits = (torch.randn(num_rows, VOCAB_SIZE, generator=generator) * scale * 4).round() / 4
    return logits.softmax(-1)


def assert_is_draw(probs: Tensor, limits: tuple[int, float, float], uniform: float, token_id: int) -> None:
    """The token's part of the kept probabilities, in their order, is where `uniform` points, but for
    rounding."""
    values, ids = probs.sort(descending=True, stable=True)
    top_k, top_p, min_p = (torch.tensor([limit]) for limit in limits)
    weights = cut(values[None], torch.ones(1), top_k, top_p, min_p)[0].double()
    place = int((ids == token_id).nonzero())
    after, total = float(weights[: place + 1].sum()), float(weights.sum())
    assert weights[place] > 0 or float(values[place] - values[max(0, place - 1)]) == 0
    assert after - float(weights[place]) - 1e-5 <= uniform * total <= after + 1e-5


@pytest.mark.parametrize(("limits", "block"), [*((limits, 1024) for limits in LIMITS), (LIMITS[2], 256)])
def test_a_draw_is_that_of_the_sorted_row(
    limits: tuple[int, float, float], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sampling, "_SMALL_BLOCK", block)
    probs = random_probs(4)
    uniform = torch.tensor([1 - 2**-53, 0.3, 0.8, 0.5], dtype=torch.float64)
    top_k, top_p, min_p = (
        torch.full((4,), limit, dtype=torch.float32 if i else torch.int64) for i, limit in enumerate(limits)
    )
    drawn = torch.full((4,), -1)
    is_certain = torch.arange(4) == 2
    on_device = [x.to(DEVICE) for x in (drawn, probs, is_certain, top_k, top_p, min_p, uniform)]
    gpu_sampling.draw_uncertain_(*on_device)
    drawn = on_device[0].cpu()
    assert drawn[2] == -1
    for row in (0, 1, 3):
        assert_is_draw(probs[row], limits, float(uniform[row]), int(drawn[row]))


def test_the_samplers_draws_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the likeliest tokens decide, and rows that they do not."""
    monkeypatch.setattr(device_sampling, "_NUM_LIKELY", 64)
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    logits *= torch.tensor([0.3, 1.0, 5.0]).repeat(2)[:, None]

    def rows() -> list[SamplingRow]:
        kinds: list[dict[str, Any]] = [
            {"top_p": 0.9},
            {"top_k": 400},
            {"min_p": 0.05},
            {"top_k": 300, "top_p": 0.8},
        ]
        return [
            SamplingRow(SamplingParams(**kinds[i % 4]), [], [], torch.Generator().manual_seed(i))
            for i in range(6)
        ]

    plan = device_sampling.SamplingPlan.of(rows(), VOCAB_SIZE)
    assert len(plan.many) == 6
    arrays = [torch.from_numpy(array.copy()).to(DEVICE) for array in plan.arrays]
    drawn = device_sampling.draw(logits.to(DEVICE), plan, arrays)[0].cpu()
    assert drawn.tolist() == sample(logits, rows()).token_ids
