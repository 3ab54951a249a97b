import pytest
import torch

from tests.tolerances import assert_close
from toppings.ops.activation import (
    clamped_swiglu,
    clamped_swiglu_reference,
    gelu_mul,
    gelu_mul_reference,
    silu_mul,
    silu_mul_reference,
)
from toppings.ops.norm import add_rms_norm_, rms_norm, rms_norm_reference
from toppings.ops.rope import (
    HeadNorm,
    Rope,
    rotate_and_store_,
    rotate_and_store_reference_,
    rotate_reference,
)

NUM_ROWS = (1, 3, 133)


def random_norm(
    norm_of: str | None, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> HeadNorm | None:
    """Of each head, or of all of a token as one, which adds 1 to its weights."""
    if norm_of is None:
        return None
    is_whole = norm_of == "whole"
    q, k = (
        torch.rand(num * head_dim if is_whole else head_dim).to(dtype) for num in (num_heads, num_kv_heads)
    )
    return HeadNorm(q, k, 1e-6, base=1.0 if is_whole else 0.0, is_whole=is_whole)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_rms_norm_agrees_with_its_reference(dtype: torch.dtype, num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 72).to(dtype), torch.rand(72).to(dtype)
    for base in (0.0, 1.0):
        assert_close(rms_norm(x, weight, 1e-5, base), rms_norm_reference(x, weight, 1e-5, base))


@pytest.mark.usefixtures("form")
def test_add_rms_norm_adds_to_the_residual_then_normalises_it(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 72).to(dtype), torch.randn(5, 72).to(dtype), torch.rand(72).to(dtype)
    total = residual + x
    assert_close(add_rms_norm_(x, residual, weight, 1e-5, 1.0), rms_norm_reference(total, weight, 1e-5, 1.0))
    assert torch.equal(residual, total)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_silu_mul_agrees_with_its_reference(dtype: torch.dtype, num_rows: int) -> None:
    gate_up = (torch.randn(num_rows, 2 * 50) * 5).to(dtype)
    assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))
    assert_close(gelu_mul(gate_up), gelu_mul_reference(gate_up))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_clamped_swiglu_agrees_with_its_reference(dtype: torch.dtype, num_rows: int) -> None:
    """Of values on both sides of the limit."""
    gate_up = (torch.randn(num_rows, 2 * 50) * 5).to(dtype)
    expected = clamped_swiglu_reference(gate_up, alpha=1.702, limit=7.0)
    assert_close(clamped_swiglu(gate_up, alpha=1.702, limit=7.0), expected)


@pytest.mark.usefixtures("form")
def test_silu_mul_is_right_where_the_exponential_saturates() -> None:
    gate = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))


@pytest.mark.usefixtures("form")
def test_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    gate_up = torch.ones(1, 8, dtype=dtype)
    gate_up[0, 4] = torch.nan
    assert silu_mul(gate_up).isnan().tolist() == [[True, False, False, False]]
    for place in (4, 5):
        gate_up = torch.ones(1, 8, dtype=dtype)
        gate_up[0, place] = torch.nan
        clamped = clamped_swiglu(gate_up, alpha=1.702, limit=7.0)
        assert clamped.isnan().tolist() == [[False, False, True, False]]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_turned", [24, 10])
@pytest.mark.parametrize("norm_of", [None, "head", "whole"])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_rotate_and_store_agrees_with_its_reference(
    dtype: torch.dtype, num_rows: int, norm_of: str | None, num_turned: int
) -> None:
    num_heads, num_kv_heads, head_dim = 6, 2, 24
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    caches = [torch.zeros(150, num_kv_heads, head_dim, dtype=dtype) for _ in range(4)]
    norm = random_norm(norm_of, num_heads, num_kv_heads, head_dim, dtype)
    slots = torch.randperm(150)[:num_rows]
    cos, sin = Rope(torch.rand(num_turned // 2), 1.5).cos_sin(torch.arange(num_rows))
    expected = qkv.clone()
    rotate_and_store_reference_(expected, cos, sin, caches[0], caches[1], slots, norm)
    rotate_and_store_(qkv, cos, sin, caches[2], caches[3], slots, norm)
    # The reference rounds between norm and rotation, as transformers does: one more unit in the last place.
    assert_close(qkv, expected, scale=2)
    assert_close(caches[2], caches[0], scale=2)
    assert torch.equal(caches[3], caches[1])


def test_rotation_keeps_the_product_of_query_and_key_a_function_of_their_distance() -> None:
    rope = Rope(torch.tensor([1.0, 0.1, 0.01]))
    q, k = torch.randn(2, 1, 1, 6)

    def product(at: int, to: int) -> float:
        turned = (rotate_reference(x, *rope.cos_sin(torch.tensor([p]))) for x, p in ((q, at), (k, to)))
        first, second = turned
        return (first * second).sum().item()

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
