"""Products with a fixed weight; on the CPU it is packed once for oneDNN where that multiplies its type fast.

A packed weight reads at memory speed for few rows, where the plain product repacks as it goes. The operators
are the ones that torch's own compiler emits; they are private, so they are tried out first and the plain
product stays. A decode step's few rows leave most of the time to reading weights: where the CPU multiplies
bfloat16, a kernel of ours reads the packed weight itself, once its layout has been found to be the known one.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toppings.ops.dispatch import bf16_kernels, has_byte_tables, kernels
from toppings.ops.huge_pages import Span
from toppings.ops.products import Forms, add_product_, forms_for, is_widened, mm_widened, quantized_forms
from toppings.ops.quantized import GROUP, QuantizedWeight, quantize

USE_PACKED = True
"""Pack weights where the operators work (`packed_reason` says whether and why)."""

_ROWS_HINT = 8
"""Batch size that the packing is laid out for."""


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


MAX_FEW_ROWS = 8
"""Products of at most this many rows go to the kernel."""

_BLOCK = 64
"""Output columns that lie side by side in a packed bfloat16 weight, in pairs along the input."""


@dataclass(frozen=True)
class PackedBlocks:
    """A packed weight as the kernel sees it: [blocks, pairs, 64, 2] at `address`, padded with zeros."""

    kernels: Any
    address: int
    num_blocks: int
    num_pairs: int

    def linear(self, x: Tensor, num_out: int, bias: Tensor | None) -> Tensor:
        """x: [T, in], dense, T at most MAX_FEW_ROWS."""
        num_rows, num_in = x.shape
        y = x.new_empty(num_rows, num_out)
        place = 0 if bias is None else bias.data_ptr()
        shape = (num_rows, num_out, num_in, self.num_pairs)
        self.kernels.few_rows_linear(x, self.num_blocks, num_out * num_in, y, x, self.address, place, *shape)
        return y

    def linear_groups(self, y: Tensor, x: Tensor, groups: Sequence[tuple[int, int, int]]) -> None:
        """Writes into y [T, out] the product of x [T, in], both dense, with weights packed like this one:
        of each of `groups`, (first row, how many, the weight's address), at most MAX_FEW_ROWS rows."""
        num_in, num_out, num_tasks = x.shape[1], y.shape[1], len(groups) * self.num_blocks
        shape = (self.num_blocks, num_out, num_in, self.num_pairs, MAX_FEW_ROWS)
        size = len(groups) * num_out * num_in
        self.kernels.grouped_linear(x, num_tasks, size, y, x, torch.tensor(groups), *shape)


def _span(tensor: Tensor) -> Span:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _find_blocks(weight: Tensor, packed: Tensor) -> PackedBlocks | None:
    """None where no kernel serves or the packed bytes are laid out in another way."""
    kernels, (num_out, num_in) = bf16_kernels(weight), weight.shape
    if kernels is None or num_in % 2:
        return None
    if (packed_bytes := _find_bytes(packed)) is None:
        return None
    num_blocks = -(-num_out // _BLOCK)
    num_pairs, rest = divmod(packed_bytes.nbytes, num_blocks * _BLOCK * 2 * weight.itemsize)
    if rest or num_pairs < num_in // 2:
        return None
    blocks = packed_bytes.view(weight.dtype).view(num_blocks, num_pairs, _BLOCK, 2)
    for i in {0, num_blocks // 2, num_blocks - 1}:
        rows = weight[i * _BLOCK : (i + 1) * _BLOCK]
        columns = blocks[i].transpose(0, 1).reshape(_BLOCK, -1)[: len(rows), :num_in]
        if not torch.equal(columns.contiguous().view(torch.int16), rows.contiguous().view(torch.int16)):
            return None
    return PackedBlocks(kernels, packed_bytes.data_ptr(), num_blocks, num_pairs)


def _find_bytes(packed: Tensor) -> Tensor | None:
    """The memory of a packed weight, uint8, as long as `packed` is there; None where torch does not tell."""
    try:
        address, num_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    except (RuntimeError, AttributeError):
        return None
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


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
    """x Wᵀ + b. weight: [out, in]; bias: [out] or None; called with x [T, in], returns [T, out] of x's dtype.

    What multiplies is chosen by `products.forms_for`, or given; a weight that is not packed stays where it
    is. `is_wide` asks for fp32: sums that are fp32 anyway are then not rounded to x's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, forms: Forms | None = None) -> None:
        self.num_out, self.num_in = weight.shape
        self.bias = bias
        is_on_host = weight.device.type == "cpu"
        self.forms = forms or forms_for(weight.dtype, self.num_in)
        self.is_packed = is_on_host and USE_PACKED and self.forms.is_packed and packed_reason(weight.dtype)[0]
        self._weight: Any = _pack(weight) if self.is_packed else weight
        self.blocks = _find_blocks(weight, self._weight) if self.is_packed else None
        self._stream = None if self.is_packed else kernels("stream", weight)
        self._is_widened = is_widened(weight) and not self.is_packed

    def spans(self) -> Iterator[Span]:
        """Where the weight lies in memory."""
        if (stored := self.stored) is not None:
            yield _span(stored)

    @property
    def stored(self) -> Tensor | None:
        """The memory of the weight, which stays where it is; None where it cannot be told."""
        return _find_bytes(self._weight) if self.is_packed else self._weight

    def with_products(self, parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
        """What `stored` would hold with Bᵀ A added to the weight's rows from `start` on, for each (start, A
        [r, in], B [r, n]); summed in fp32 and rounded once. Raises ValueError where a value is not finite."""
        weight: Tensor = self._weight.to_dense() if self.is_packed else self._weight.clone()
        for start, a, b in parts:
            add_product_(weight[start : start + b.shape[1]], a, b)
        if not self.is_packed:
            return weight
        packed = _pack(weight)
        found = _find_bytes(packed)
        assert found is not None
        return found.clone()  # `packed` takes its memory along

    def has_kernel(self, num_rows: int) -> bool:
        """Products of so many rows, and of fewer, are a kernel's."""
        if self.blocks is not None:
            return num_rows <= MAX_FEW_ROWS
        return self._stream is not None and num_rows <= self.forms.max_stream_rows

    def __call__(self, x: Tensor, *, is_wide: bool = False) -> Tensor:
        dtype = torch.float32 if is_wide else x.dtype
        num_rows = x.shape[0]
        if not num_rows:  # nobody draws: kernels take the first row for granted
            return x.new_empty(0, self.num_out, dtype=dtype)
        if self.blocks is not None and num_rows <= MAX_FEW_ROWS:
            return self.blocks.linear(x.contiguous(), self.num_out, self.bias).to(dtype)
        if self.is_packed:
            return _packed_linear(x, self._weight, self.bias).to(dtype)
        if self._stream is not None and num_rows <= self.forms.max_stream_rows:
            return self._streamed(self._stream, x.contiguous(), dtype)
        if self._is_widened:
            return mm_widened(x, self._weight, self.bias, dtype)
        return functional.linear(x, self._weight, self.bias).to(dtype)

    def _streamed(self, kernel: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        num_rows, num_out, num_in = x.shape[0], self.num_out, self.num_in
        y = x.new_empty(num_rows, num_out, dtype=dtype)
        place = 0 if self.bias is None else self.bias.data_ptr()
        num_tasks = -(-num_out // kernel.TASK_COLUMNS)
        kernel.few_rows_linear(
            x, num_tasks, num_out * num_in,
            y, x, self._weight, place, num_rows, num_out, num_in, int(dtype != x.dtype),
        )  # fmt: skip
        return y


class QuantizedLinear:
    """As `Linear`, of a weight with 8 or 4 bits, for x of the type that the weight had."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, *, forms: Forms | None = None
    ) -> None:
        self.num_out, self.num_in = weight.shape
        self.bias, self.weight = bias, weight
        self.forms = forms or quantized_forms()
        is_wide = weight.bits == 4 and weight.scales.dtype == torch.float32
        sample, name = (
            weight.codes.new_empty(0, dtype=weight.dtype),
            f"int{weight.bits}{'_wide' * is_wide}_linear",
        )
        module, bf16 = kernels("quantized", sample), bf16_kernels(sample, "bf16_quantized")
        if weight.bits == 8 and bf16 is not None and not has_byte_tables():
            bf16 = None
        self._columns = 0 if module is None else module.TASK_COLUMNS
        self._kernel: Any = module and getattr(module, name)
        self._bf16: Any = bf16 and getattr(bf16, name)
        self._groups = (weight.row_elements // GROUP, (weight.group // GROUP).bit_length() - 1)

    def spans(self) -> Iterator[Span]:
        """Where the weight lies in memory."""
        weight = self.weight
        yield from (_span(each) for each in (weight.codes, weight.scales, weight.offsets) if each is not None)

    def has_kernel(self, num_rows: int) -> bool:
        return self._kernel is not None and num_rows <= self.forms.max_stream_rows

    def __call__(self, x: Tensor, *, is_wide: bool = False) -> Tensor:
        num_rows, dtype = x.shape[0], torch.float32 if is_wide else x.dtype
        if not num_rows or not self.has_kernel(num_rows):
            return mm_widened(x, self.weight, self.bias, dtype)
        x, weight, y = x.contiguous(), self.weight, x.new_empty(num_rows, self.num_out, dtype=dtype)
        bias, offsets, order = (
            0 if each is None else each for each in (self.bias, weight.offsets, weight.order)
        )
        num_groups, shift = self._groups
        shape = (num_rows, self.num_out, self.num_in, num_groups, int(dtype != x.dtype), order, shift)
        num_tasks = -(-self.num_out // self._columns)
        is_bf16 = self._bf16 is not None and num_rows <= MAX_FEW_ROWS
        kernel = self._bf16 if is_bf16 else self._kernel
        kernel(
            x, num_tasks, self.num_out * self.num_in, y, x, weight.codes, weight.scales, offsets, bias, *shape
        )
        return y


def linear(
    weight: Tensor | QuantizedWeight, bias: Tensor | None, bits: int | None
) -> Linear | QuantizedLinear:
    """With the weight as it is where `bits` is None. Raises ValueError as `quantize`."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedLinear(weight, bias)
    return Linear(weight, bias) if bits is None else QuantizedLinear(quantize(weight, bits), bias)
