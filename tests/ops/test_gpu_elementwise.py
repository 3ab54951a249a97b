"""The Triton kernels for norms, rotary positions and the activation against their references."""

from dataclasses import replace

import pytest
import torch

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.ops.test_elementwise import random_norm
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
from toppings.ops.rope import Rope, rotate_and_store_, rotate_and_store_reference_

pytestmark = [needs_triton, pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

NUM_ROWS = (1, 3, 33)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_rms_norm_agrees_with_its_reference(dtype: torch.dtype, num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 72).to(DEVICE, dtype), torch.rand(72).to(DEVICE, dtype)
    for base in (0.0, 1.0):
        assert_close(rms_norm(x, weight, 1e-5, base), rms_norm_reference(x, weight, 1e-5, base))


def test_add_rms_norm_adds_to_the_residual_then_normalises_it(dtype: torch.dtype) -> None:
    x, residual = torch.randn(5, 72).to(DEVICE, dtype), torch.randn(5, 72).to(DEVICE, dtype)
    weight, total = torch.rand(72).to(DEVICE, dtype), residual + x
    assert_close(add_rms_norm_(x, residual, weight, 1e-5), rms_norm_reference(total, weight, 1e-5), scale=2)
    assert_close(residual, total)
    if dtype != torch.bfloat16:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("size", [50, 1100])
def test_silu_mul_agrees_with_its_reference(dtype: torch.dtype, num_rows: int, size: int) -> None:
    gate_up = (torch.randn(num_rows, 2 * size) * 5).to(DEVICE, dtype)
    assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))
    assert_close(gelu_mul(gate_up), gelu_mul_reference(gate_up))
    clamped = clamped_swiglu_reference(gate_up, alpha=1.702, limit=7.0)
    assert_close(clamped_swiglu(gate_up, alpha=1.702, limit=7.0), clamped)


def test_silu_mul_is_right_where_the_exponential_saturates_and_hides_no_nan() -> None:
    gate = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, torch.nan]], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up), equal_nan=True)
    clamped = clamped_swiglu_reference(gate_up, alpha=1.702, limit=7.0)
    torch.testing.assert_close(clamped_swiglu(gate_up, alpha=1.702, limit=7.0), clamped, equal_nan=True)


@pytest.mark.parametrize("num_turned", [None, 10])
@pytest.mark.parametrize("norm_of", [None, "head", "whole"])
@pytest.mark.parametrize("heads", [(6, 2, 24), (1, 1, 16), (32, 32, 128)], ids=str)
def test_rotate_and_store_agrees_with_its_reference(
    dtype: torch.dtype, heads: tuple[int, int, int], norm_of: str | None, num_turned: int | None
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    num_rows = 7
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim).to(DEVICE, dtype)
    caches = [torch.zeros(20, num_kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(4)]
    norm = random_norm(norm_of, *heads, dtype)
    if norm is not None:
        norm = replace(norm, q=norm.q.to(DEVICE), k=norm.k.to(DEVICE))
    slots = torch.randperm(20)[:num_rows].to(DEVICE)
    cos, sin = Rope(torch.rand((num_turned or head_dim) // 2, device=DEVICE), 1.5).cos_sin(
        torch.arange(num_rows, device=DEVICE)
    )
    expected = qkv.clone()
    rotate_and_store_reference_(expected, cos, sin, caches[0], caches[1], slots, norm)
    rotate_and_store_(qkv, cos, sin, caches[2], caches[3], slots, norm)
    # The reference rounds between norm and rotation, as transformers does: one more unit in the last place.
    assert_close(qkv, expected, scale=2)
    assert_close(caches[2], caches[0], scale=2)
    assert torch.equal(caches[3], caches[1])
