"""Weights of 8 or 4 bits with scales, made from a checkpoint's as it is loaded.

int8: a code from -127 to 127 for each element and a scale for each output channel (row), so that its largest
element is 127. int4: for each group of GROUP elements along the input a code from 0 to 15, a scale and an
offset. Arithmetic stays in float32: what is stored stands for the float32 values that `widen` gives.

A checkpoint that is quantised already may have larger groups, scales that bfloat16 does not hold, and inputs
in an order of its own (`model/prequantized.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = {"none": None, "int8": 8, "int4": 4}
"""Bits of an element, by what the setting `quantization` is."""

GROUP = 32
"""Elements along the input that share an int4 scale and offset; the last group is filled up."""
GROUPS = (GROUP, 2 * GROUP, 4 * GROUP)
"""Those that a checkpoint's own may be, which divide the input width."""

_INT8_MAX, _INT4_MAX = 127, 15
_SHRINKAGES = (1.0, 0.92, 0.84, 0.76)
"""Shares of a group's range that int4's 16 codes are laid over at first."""
_ROWS_ELEMENTS = 2**21
"""Of a weight, that are quantised at a time, which bounds the memory that it takes."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] that served as `dtype` before. `bits` 8: codes int8 [out, in], scales fp32 [out, 1].
    `bits` 4: codes uint8 [out, n / 2], n being `row_elements`, where byte b of GROUP elements has element b
    in the lower four bits and element b + GROUP / 2 in the upper ones; scales and offsets [out, n / group],
    both bf16 or both fp32. `order`: int32 [in], the input that each element of a row is for; None: its own.

    A code stands for code · scale + offset (int8: no offset)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    group: int = GROUP
    order: Tensor | None = None

    def chunk(self, count: int) -> list["QuantizedWeight"]:
        """As many weights of equally many rows, one below the other."""
        shape = (self.shape[0] // count, self.shape[1])
        offsets = [None] * count if self.offsets is None else self.offsets.chunk(count)
        parts = zip(self.codes.chunk(count), self.scales.chunk(count), offsets, strict=True)
        return [
            replace(self, shape=shape, codes=codes, scales=scales, offsets=each)
            for codes, scales, each in parts
        ]

    @classmethod
    def stacked(cls, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight | None":
        """One below the other, scales and offsets in bf16 where that holds them; None where bits, groups or
        orders differ."""
        first = parts[0]
        if any(not first.is_like(each) for each in parts):
            return None
        codes, scales = (torch.cat([getattr(each, name) for each in parts]) for name in ("codes", "scales"))
        shape, offsets = (len(codes), first.shape[1]), None
        if first.offsets is not None:
            offsets = torch.cat([each.offsets for each in parts if each.offsets is not None])
            if all(torch.equal(each.bfloat16().float(), each.float()) for each in (scales, offsets)):
                scales, offsets = scales.bfloat16(), offsets.bfloat16()
        return replace(first, shape=shape, codes=codes, scales=scales, offsets=offsets)

    def is_like(self, other: "QuantizedWeight") -> bool:
        """The same bits, groups and order of inputs."""
        if (self.bits, self.group, self.shape[1]) != (other.bits, other.group, other.shape[1]):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    @property
    def row_elements(self) -> int:
        """Elements of a widened row, with those that fill up its last group."""
        return self.codes.shape[1] * 8 // self.bits

    def widen(self, start: int, out: Tensor) -> Tensor:
        """Rows from `start` on into `out`, fp32 [rows, row_elements]; returns its part [rows, in], in
        `order`."""
        rows = slice(start, start + out.shape[0])
        codes, scales = self.codes[rows], self.scales[rows]
        if self.offsets is None:
            return out.copy_(codes).mul_(scales)
        half = GROUP // 2
        groups, packed = out.view(len(codes), -1, 2, half), codes.view(len(codes), -1, half)
        groups[:, :, 0].copy_(packed & 15)
        groups[:, :, 1].copy_(packed >> 4)
        shared = out.view(len(codes), -1, self.group)
        offsets = self.offsets[rows].float()[:, :, None]
        torch.addcmul(offsets, shared, scales.float()[:, :, None], out=shared)
        return out[:, : self.shape[1]]

    def dequantized(self) -> Tensor:
        """fp32 [out, in], what the codes stand for."""
        found = self.widen(0, torch.empty(self.shape[0], self.row_elements, device=self.codes.device))
        return (
            found if self.order is None else torch.empty_like(found).index_copy_(1, self.order.long(), found)
        )


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [rows, n / 2] of codes from 0 to 15 [rows, n], n a multiple of GROUP, as `QuantizedWeight` has
    them."""
    groups = codes.to(torch.uint8).view(len(codes), -1, GROUP)
    return (groups[:, :, : GROUP // 2] | groups[:, :, GROUP // 2 :] << 4).flatten(1)


def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """`weight`: [out, in] of any float type, which is only read; `bits`: 8 or 4.

    Raises ValueError for a weight that is not finite: no scale fits it.
    """
    num_out, num_in = weight.shape
    step = max(1, _ROWS_ELEMENTS // num_in)
    parts = []
    for start in range(0, num_out, step):
        rows = weight[start : start + step].float()
        if not torch.isfinite(rows).all():
            raise ValueError("a weight of the base model is not finite, so it cannot be quantized")
        parts.append(_int8(rows) if bits == 8 else _int4(rows))
    codes, scales, *offsets = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = (num_out, num_in)
    return QuantizedWeight(shape, weight.dtype, bits, codes, scales, offsets[0] if offsets else None)


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = _divisor(rows.abs().amax(1, keepdim=True) / _INT8_MAX)
    return (rows / scales).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales


def _int4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lays the codes over several shares of each group's range, fits scale and offset to each by least
    squares, and keeps the best of each group."""
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best: Tensor | None = None
    for share in _SHRINKAGES:
        middle, half = (low + high) / 2, (high - low) / 2 * share
        codes = _nearest(groups, 2 * half / _INT4_MAX, middle - half)
        found = _fit(groups, codes)
        error = (_value(_nearest(groups, *found), *found) - groups).square_().sum(2, keepdim=True)
        if best is None:
            best, (scales, offsets) = error, found
            continue
        is_better = error < best
        best = torch.where(is_better, error, best)
        scales, offsets = (
            torch.where(is_better, new, old) for new, old in zip(found, (scales, offsets), strict=True)
        )
    codes = pack_nibbles(_nearest(groups, scales, offsets).flatten(1))
    return codes, scales.squeeze(2).bfloat16(), offsets.squeeze(2).bfloat16()


def _fit(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The line code · scale + offset that is nearest to each group's values, both as bf16 holds them: codes
    are chosen for the rounded ones."""
    mean_code, mean = codes.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    spread = codes - mean_code
    variance = spread.square().sum(2, keepdim=True)
    scale = (spread * (groups - mean)).sum(2, keepdim=True) / torch.where(variance > 0, variance, 1.0)
    scale = scale.bfloat16().float()
    return scale, (mean - scale * mean_code).bfloat16().float()


def _nearest(groups: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return ((groups - offset) / _divisor(scale)).round_().clamp_(0, _INT4_MAX)


def _value(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return codes * scale + offset


def _divisor(scale: Tensor) -> Tensor:
    """1 where all elements are alike, and every code is as good."""
    return torch.where(scale == 0, 1.0, scale)
