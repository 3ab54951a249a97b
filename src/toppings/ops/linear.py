"""Products with a fixed weight; on the CPU the weight is packed once for oneDNN.

A packed weight reads at memory speed for few rows, where the plain product repacks as it goes. The operators
are the ones that torch's own compiler emits; they are private, so they are tried out first and the plain
product stays.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

USE_PACKED = True
"""Pack weights where the operators work (`packed_reason` says whether and why)."""

_ROWS_HINT = 8
"""Batch size that the packing is laid out for."""


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


@cache
def packed_reason(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether packed products of `dtype` work on this CPU, and why not where they do not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 64), (32, 64)))
    try:
        y = _packed_linear(x, _pack(weight), None)
    except (RuntimeError, AttributeError) as error:
        return False, f"torch's packed products fail for {dtype}: {error}"
    if not torch.allclose(y.float(), functional.linear(x.float(), weight.float()), rtol=0.05, atol=0.1):
        return False, f"torch's packed products are wrong for {dtype}"
    return True, f"torch's packed products work for {dtype}"


class Linear:
    """x Wᵀ + b. weight: [out, in]; bias: [out] or None; called with x [T, in], returns [T, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_out, self.num_in = weight.shape
        self.bias = bias
        self.is_packed = USE_PACKED and weight.device.type == "cpu" and packed_reason(weight.dtype)[0]
        self._weight: Any = _pack(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return _packed_linear(x, self._weight, self.bias)
        return functional.linear(x, self._weight, self.bias)
