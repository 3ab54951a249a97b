import pytest
import torch
from torch.nn import functional

from tests.tolerances import assert_close
from toppings.ops import linear
from toppings.ops.linear import Linear


@pytest.mark.parametrize("use_packed", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 33, 600])
def test_product_agrees_with_fp32(
    dtype: torch.dtype, num_rows: int, has_bias: bool, use_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "USE_PACKED", use_packed)
    weight, x = torch.randn(48, 72).to(dtype) / 8, torch.randn(num_rows, 72).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert_close(Linear(weight, bias)(x), expected, dtype)


@pytest.mark.parametrize("use_packed", [True, False])
@pytest.mark.parametrize("is_wide", [True, False])
def test_no_rows_give_no_rows(
    dtype: torch.dtype, is_wide: bool, use_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a step that draws no token: of an embedding, or of a prompt's earlier chunks."""
    monkeypatch.setattr(linear, "USE_PACKED", use_packed)
    y = Linear(torch.randn(2048, 192).to(dtype))(torch.empty(0, 192, dtype=dtype), is_wide=is_wide)
    assert y.shape == (0, 2048)
    assert y.dtype == (torch.float32 if is_wide else dtype)


def test_an_operator_that_fails_leaves_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(linear, "_pack", fail)
    linear.packed_reason.cache_clear()
    try:
        weight, x = torch.randn(8, 8), torch.randn(2, 8)
        product = Linear(weight)
        assert not product.is_packed
        assert "no such operator" in linear.packed_reason(torch.float32)[1]
        assert_close(product(x), functional.linear(x, weight), torch.float32)  # sums in another order
    finally:
        linear.packed_reason.cache_clear()
