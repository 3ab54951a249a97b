from functools import partial
from typing import TypeGuard

import pytest
import torch

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.tolerances import assert_close
from toppings.ops import dispatch
from toppings.ops.activation import clamped_swiglu, gelu_mul, silu_mul
from toppings.ops.experts import ExpertLinears, Experts, GroupedRows, reference, route
from toppings.ops.linear import Linear, QuantizedLinear

NUM_EXPERTS, HIDDEN, SIZE = 6, 32, 24


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("is_normalised", [False, True])
def test_rows_grouped_by_expert_agree_with_token_by_token(num_rows: int, is_normalised: bool) -> None:
    torch.manual_seed(0)
    x, router = torch.randn(num_rows, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN)
    gate_up = torch.randn(NUM_EXPERTS, 2 * SIZE, HIDDEN) / HIDDEN**0.5
    down = torch.randn(NUM_EXPERTS, HIDDEN, SIZE) / SIZE**0.5
    for activation in (silu_mul, gelu_mul):
        experts = Experts(
            Linear(router),
            ExpertLinears(gate_up.flatten(0, 1), NUM_EXPERTS),
            ExpertLinears(down.flatten(0, 1), NUM_EXPERTS),
            activation,
            top_k=2,
            is_normalised=is_normalised,
        )
        expected = reference(x, router, gate_up, down, activation, 2, is_normalised=is_normalised)
        assert_close(experts(x), expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bits", [None, 8])
def test_every_expert_and_the_router_have_biases_of_their_own(bits: int | None) -> None:
    torch.manual_seed(0)
    activation = partial(clamped_swiglu, alpha=1.702, limit=7.0)
    x, router = torch.randn(9, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN)
    gate_up = torch.randn(NUM_EXPERTS, 2 * SIZE, HIDDEN) / HIDDEN**0.5
    down = torch.randn(NUM_EXPERTS, HIDDEN, SIZE) / SIZE**0.5
    biases = (torch.randn(NUM_EXPERTS), torch.randn(NUM_EXPERTS, 2 * SIZE), torch.randn(NUM_EXPERTS, HIDDEN))
    first, second = (
        ExpertLinears(weight.flatten(0, 1), NUM_EXPERTS, bits, bias)
        for weight, bias in ((gate_up, biases[1]), (down, biases[2]))
    )
    experts = Experts(Linear(router, biases[0]), first, second, activation, 2, is_normalised=True)
    if bits is not None:  # what is served is what the codes stand for
        gate_up, down = (
            torch.stack([each.weight.dequantized() for each in linears.linears if is_quantized(each)])
            for linears in (first, second)
        )
    expected = reference(x, router, gate_up, down, activation, 2, is_normalised=True, biases=biases)
    assert_close(experts(x), expected)


def is_quantized(product: Linear | QuantizedLinear) -> TypeGuard[QuantizedLinear]:
    return isinstance(product, QuantizedLinear)


def test_no_rows_give_none() -> None:
    router, (gate_up, down) = (
        Linear(torch.ones(4, HIDDEN)),
        (ExpertLinears(torch.ones(4 * out, size), 4) for out, size in ((2 * SIZE, HIDDEN), (HIDDEN, SIZE))),
    )
    experts = Experts(router, gate_up, down, silu_mul, top_k=1, is_normalised=True)
    assert experts(torch.empty(0, HIDDEN)).shape == (0, HIDDEN)


def test_weights_are_the_largest_of_all_experts_and_add_up_to_one_where_asked() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    experts, weights = route(logits, 2, is_normalised=False)
    assert experts.tolist() == [[1, 2]]
    assert_close(weights, logits.softmax(-1)[:, [1, 2]])
    assert_close(route(logits, 2, is_normalised=True)[1].sum(-1), torch.ones(1))


@pytest.mark.parametrize("num_rows", [0, 1, 5, 100])
def test_kernel_and_operators_group_rows_alike(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    experts = torch.randint(NUM_EXPERTS, (num_rows, 2), generator=generator)
    owners = torch.randint(3, (num_rows,), generator=generator)
    for more in ((), (owners, 3)):
        found = []
        for use_kernel in (True, False):
            monkeypatch.setattr(dispatch, "USE_NUMBA", use_kernel)
            rows = GroupedRows.of(experts, NUM_EXPERTS, *more)
            found.append((rows.order.tolist(), rows.keys.tolist(), rows.counts))
        assert found[0] == found[1]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 100])
def test_chunks_cover_every_row_once_and_hold_one_expert_and_one_owner(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    experts = torch.randint(NUM_EXPERTS, (num_rows, 2), generator=generator)
    owners = torch.randint(3, (num_rows,), generator=generator)
    rows = GroupedRows.of(experts, NUM_EXPERTS, owners, 3)
    of_token = rows.order // 2
    assert rows.keys.tolist() == (experts.flatten()[rows.order] * 3 + owners[of_token]).tolist()
    for by_owner in (False, True):
        chunks = [each for each in rows.chunks(4, by_owner=by_owner).tolist() if each[2] >= 0]
        covered = [row for start, stop, _ in chunks for row in range(start, stop)]
        assert covered == list(range(2 * num_rows))
        for start, stop, key in chunks:
            assert 1 <= stop - start <= 4
            assert {k if by_owner else k // 3 for k in rows.keys[start:stop].tolist()} == {key}


def test_there_is_room_for_as_many_chunks_as_there_may_be() -> None:
    """All rows of one expert, and every row of another."""
    for experts in (torch.zeros(9, 1, dtype=torch.int64), torch.arange(NUM_EXPERTS)[:, None]):
        rows = GroupedRows.of(experts, NUM_EXPERTS)
        chunks = [each for each in rows.chunks(4, by_owner=False).tolist() if each[2] >= 0]
        assert sum(stop - start for start, stop, _ in chunks) == len(experts)


@needs_triton
@pytest.mark.gpu
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 131])
def test_the_grouped_kernel_agrees_with_products_expert_by_expert(
    num_tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    num_in, num_out, num = 72, 136, 4
    weight = torch.randn(num * num_out, num_in, generator=generator).to(dtype) / num_in**0.5
    bias = torch.randn(num, num_out, generator=generator).to(dtype)
    experts = torch.randint(num, (num_tokens, 1), generator=generator)
    rows = GroupedRows.of(experts.to(DEVICE), num)
    x = torch.randn(num_tokens, num_in, generator=generator).to(dtype)
    expected = torch.cat(
        [
            part.float() @ weight.view(num, num_out, num_in)[expert].float().t() + bias[expert].float()
            for expert, part in enumerate(torch.split(x, rows.counts))
        ]
    )
    y = ExpertLinears(weight.to(DEVICE), num, bias=bias.to(DEVICE))(x.to(DEVICE), rows)
    assert y.dtype == dtype
    assert_close(y.cpu(), expected.to(dtype))
