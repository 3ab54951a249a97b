"""Weights of 8 and 4 bits: what they stand for, and that every form multiplies by just that."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from toppings.ops import dispatch, products
from toppings.ops.linear import QuantizedLinear
from toppings.ops.products import Forms
from toppings.ops.quantized import GROUP, GROUPS, QuantizedWeight, pack_nibbles, quantize

STREAM, PANELS = Forms(is_packed=False, max_stream_rows=64), Forms(is_packed=False)


def weight_of(num_out: int, num_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_out + num_in)
    return torch.randn(num_out, num_in, generator=generator).to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("forms", [STREAM, PANELS], ids=["stream", "panels"])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 8), (47, 50), (50, 131), (193, 1024)])
def test_a_product_is_that_with_what_the_codes_stand_for(
    dtype: torch.dtype, num_out: int, num_in: int, forms: Forms, bits: int
) -> None:
    weight = quantize(weight_of(num_out, num_in, dtype), bits)
    exact, bias = weight.dequantized().double(), torch.randn(num_out).to(dtype)
    for num_rows in (*range(1, 10), 16, 33, 40):
        x = torch.randn(num_rows, num_in).to(dtype)
        for added in (bias, None):
            y = QuantizedLinear(weight, added, forms=forms)(x)
            expected = x.double() @ exact.t() + (0 if added is None else added.double())
            assert (y.shape, y.dtype) == (expected.shape, dtype)
            wide = QuantizedLinear(weight, added, forms=forms)(x, is_wide=True)
            assert wide.dtype == torch.float32
            assert torch.equal(wide.to(dtype), y)
            rounding = torch.finfo(dtype).eps / 2 * expected.abs()  # of the result, once
            # int4's codes and offsets are summed apart, each up to some times the weight
            terms = x.double().abs() @ (exact.abs() + exact.abs().amax(1, keepdim=True)).t() + 4
            assert ((y.double() - expected).abs() <= rounding + 1e-6 * num_in**0.5 * terms).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_in", [128, 640])
def test_a_checkpoint_may_have_wider_groups_and_an_order_of_inputs(
    dtype: torch.dtype, num_in: int, kind: torch.dtype, group: int
) -> None:
    torch.manual_seed(group)
    scales, offsets = (torch.randn(50, num_in // group).to(kind) for _ in range(2))
    codes, order = pack_nibbles(torch.randint(0, 16, (50, num_in))), torch.randperm(num_in).int()
    plain = QuantizedWeight((50, num_in), dtype, 4, codes, scales, offsets, group)
    weight = replace(plain, order=order)
    assert torch.equal(weight.dequantized()[:, order], plain.dequantized())
    exact = weight.dequantized().double()
    upper, lower = weight.chunk(2)
    for num_rows in (1, 2, 3, 4, 7, 9, 40):
        x = torch.randn(num_rows, num_in).to(dtype)
        expected = x.double() @ exact.t()
        bound = torch.finfo(dtype).eps / 2 * expected.abs()
        terms = x.double().abs() @ (exact.abs() + exact.abs().amax(1, keepdim=True)).t() + 4
        y = QuantizedLinear(weight)(x)
        assert ((y.double() - expected).abs() <= bound + 1e-6 * num_in**0.5 * terms).all(), num_rows
        halves = torch.cat([QuantizedLinear(half)(x) for half in (upper, lower)], dim=1)
        torch.testing.assert_close(halves, y)


def test_every_code_of_8_bits_is_multiplied_by_its_value(dtype: torch.dtype) -> None:
    """A checkpoint's may be -128, too."""
    codes = torch.arange(-128, 128, dtype=torch.int8)
    weight = QuantizedWeight((2, 256), dtype, 8, torch.stack([codes, codes.flip(0)]), torch.ones(2, 1))
    y = QuantizedLinear(weight)
    for start in range(0, 256, 4):
        for num_rows in (1, 2, 3, 4, 5):
            x = torch.eye(256, dtype=dtype)[start : start + num_rows]
            assert torch.equal(y(x).float(), weight.dequantized().t()[start : start + num_rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_of_bfloat16_has_the_same_product_beside_others(bits: int) -> None:
    first = 1 if dispatch.has_byte_tables() else 2  # there one row alone has sums of its own
    product = QuantizedLinear(quantize(weight_of(50, 450, torch.bfloat16), bits))
    x = torch.randn(8, 450).bfloat16()
    together = product(x, is_wide=True)
    for num_rows in range(first, 8):
        assert torch.equal(product(x[:num_rows], is_wide=True), together[:num_rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_wide_weights_are_widened_panel_by_panel(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PANEL_ELEMENTS", 64 * 96)
    weight, x = quantize(weight_of(130, 70), bits), torch.randn(20, 70)
    y = QuantizedLinear(weight, forms=PANELS)(x)
    torch.testing.assert_close(y, x @ weight.dequantized().t(), rtol=1e-5, atol=1e-4)


def test_int8_is_off_by_half_a_step_of_its_row_at_most(dtype: torch.dtype) -> None:
    weight = weight_of(40, 70, dtype).float() * torch.logspace(-6, 3, 40)[:, None]
    error = (quantize(weight, 8).dequantized() - weight).abs()
    steps = weight.abs().amax(1) / 127
    assert (error.amax(1) <= steps * 0.5001).all()


def test_int4_is_nearer_than_codes_laid_over_the_whole_range() -> None:
    weight = weight_of(64, 8 * GROUP)
    groups = weight.view(64, 8, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low - groups
    error = quantize(weight, 4).dequantized() - weight
    assert error.square().sum() < 0.93 * plain.square().sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_and_empty_rows_stay(bits: int) -> None:
    weight = torch.tensor([0.0, 0.5, -2.0, 3e-30])[:, None].expand(4, 40).contiguous()
    torch.testing.assert_close(quantize(weight, bits).dequantized(), weight, rtol=0.01, atol=0.0)


def test_bytes_and_pieces() -> None:
    weight = weight_of(300, 128)
    int8, int4 = quantize(weight, 8), quantize(weight, 4)
    assert int8.nbytes == 300 * (128 + 4)
    assert int4.nbytes == 300 * (64 + 4 * 128 // GROUP)
    for row in (0, 150, 299):
        alone = quantize(weight[row : row + 1], 4).dequantized()
        assert torch.equal(alone[0], int4.dequantized()[row])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = weight_of(4, 64)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, 4)


def test_without_numba_panels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "USE_NUMBA", False)
    weight, x = quantize(weight_of(40, 64), 4), torch.randn(1, 64)
    assert products.quantized_forms() == PANELS
    torch.testing.assert_close(QuantizedLinear(weight)(x), x @ weight.dequantized().t())
