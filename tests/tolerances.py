"""How far apart two computations of the same thing may be, by dtype."""

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the larger of 1 and the expected value: a few units in the last place."""


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, *, scale: float = 1.0
) -> None:
    """`actual` computed in `dtype` (default: its own) against `expected`; `scale` widens for long sums."""
    tolerance = TOLERANCES[dtype or actual.dtype] * scale
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
