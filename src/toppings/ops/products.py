"""How the CPU multiplies: the type that a weight is stored in and the arithmetic of a product are two things.

A CPU that multiplies bfloat16 or float16 does so with torch's own products of the type (`is_native`). On
another one torch falls into a form without vectors; there a weight stays as it is stored, and is widened to
float32 on its way: in registers where rows are few (`cpu_stream.py`: what counts is the bytes that are read),
panel by panel into memory that stays in the cache where they are many (`mm_widened`: then the library's
float32 product counts). Sums are in float32 either way and rounded once to the type.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from toppings.ops import dispatch
from toppings.ops.quantized import QuantizedWeight

PANEL_ELEMENTS = 3 * 2**18
"""Of a weight, that are widened at a time: 3 MiB in float32."""
_PANEL_STEP = 64
"""A panel's rows are a multiple of this: the library computes so many columns at a time."""

MAX_STREAM_ROWS = 32
"""Rows up to which a weight is widened in registers, where nothing was measured."""

MANY_ROWS = 128
"""Rows with which a product costs its arithmetic anywhere."""


@dataclass(frozen=True)
class Forms:
    """What serves products with one weight. `is_packed`: torch's products of the stored type, with the weight
    packed for them, whatever the number of rows. Else up to `max_stream_rows` rows the kernel that widens in
    registers, beyond them widened panels (of float32: the library's product as it is)."""

    is_packed: bool
    max_stream_rows: int = 0

    def __str__(self) -> str:
        few = f"stream up to {self.max_stream_rows} rows, then " if self.max_stream_rows else ""
        return "packed" if self.is_packed else f"{few}panels"

    def name(self, num_rows: int) -> str:
        """Of the form for so many rows."""
        if self.is_packed:
            return "packed"
        return "stream" if num_rows <= self.max_stream_rows else "panels"


_measured: dict[tuple[torch.dtype, int], Forms] = {}


def use_measured(dtype: torch.dtype, forms: Mapping[int, Forms]) -> None:
    """From now on weights of `dtype` are served so, by their input width; {} goes back to the rule."""
    for key in [key for key in _measured if key[0] == dtype]:
        del _measured[key]
    _measured.update({(dtype, num_in): each for num_in, each in forms.items()})


def forms_for(dtype: torch.dtype, num_in: int) -> Forms:
    """What was measured for the nearest input width, or the rule."""
    widths = [width for kind, width in _measured if kind == dtype]
    if not widths:
        return rule_for(dtype)
    return _measured[dtype, min(widths, key=lambda width: abs(width - num_in))]


def rule_for(dtype: torch.dtype) -> Forms:
    """What is expected to be fastest, by what the CPU has."""
    return Forms(is_packed=is_native(dtype), max_stream_rows=MAX_STREAM_ROWS if dispatch.USE_NUMBA else 0)


def quantized_forms() -> Forms:
    """What serves weights of 8 and 4 bits, whatever the type of x: no CPU's own products are for them."""
    return Forms(is_packed=False, max_stream_rows=MAX_STREAM_ROWS if dispatch.USE_NUMBA else 0)


@cache
def is_native(dtype: torch.dtype) -> bool:
    """torch multiplies `dtype` with instructions that this CPU has for it, as it says itself (AVX-512 or AMX
    for bfloat16, their float16 forms for float16, Arm's likewise)."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    check = getattr(torch.ops.mkldnn, checks[dtype], None) if dtype in checks else None
    return True if check is None else bool(check())


def is_widened(sample: Tensor) -> bool:
    """Products of many rows like `sample` are computed in float32, because the CPU is slow in their type."""
    return sample.device.type == "cpu" and sample.dtype != torch.float32 and not is_native(sample.dtype)


_memory = threading.local()


def _panel(num_rows: int, num_columns: int) -> Tensor:
    """Memory of this thread, fp32 [rows, columns], that the next call gives again."""
    size = num_rows * num_columns
    kept: Tensor | None = getattr(_memory, "panel", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # it is written to in and out of that mode
            kept = _memory.panel = torch.empty(max(size, PANEL_ELEMENTS))
    return kept[:size].view(num_rows, num_columns)


def mm_widened(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + b in float32, rounded once to `dtype` (x's where it is None): x [T, in], weight [out, in], bias
    [out]; [T, out]."""
    (num_out, num_in), wide = weight.shape, x.float()
    width = num_in if isinstance(weight, Tensor) else weight.row_elements
    if isinstance(weight, QuantizedWeight) and weight.order is not None:
        wide = wide.index_select(1, weight.order)
    y = x.new_empty(x.shape[0], num_out, dtype=dtype or x.dtype)
    step = max(1, PANEL_ELEMENTS // width // _PANEL_STEP) * _PANEL_STEP
    for start in range(0, num_out, step):
        num_rows = min(step, num_out - start)
        panel = _panel(num_rows, width)
        if isinstance(weight, Tensor):
            panel.copy_(weight[start : start + num_rows])
        else:
            panel = weight.widen(start, panel)
        part = torch.mm(wide, panel.t())
        if bias is not None:
            part += bias[start : start + num_rows]
        y[:, start : start + num_rows] = part
    return y


def add_product_(weight: Tensor, a: Tensor, b: Tensor) -> None:
    """W += Bᵀ A in place, in float32 and rounded once: weight [out, in], a [r, in], b [r, out], of one type.
    Raises ValueError where a sum is beyond the type."""
    step, wide_a = max(1, PANEL_ELEMENTS // weight.shape[1]), a.float()
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        rows.copy_(torch.addmm(rows.float(), b[:, start : start + step].float().t(), wide_a))
    if weight.dtype == torch.float16 and not bool(weight.isfinite().all()):
        raise ValueError("the sum of the base model's weight and an adapter's is beyond float16")
