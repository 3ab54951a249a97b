import pytest
import torch

from tests.tolerances import assert_close
from toppings.ops.activation import gelu_mul, silu_mul
from toppings.ops.experts import Experts, reference, route
from toppings.ops.linear import Linear

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
            [Linear(each) for each in gate_up],
            [Linear(each) for each in down],
            activation,
            top_k=2,
            is_normalised=is_normalised,
        )
        expected = reference(x, router, gate_up, down, activation, 2, is_normalised=is_normalised)
        assert_close(experts(x), expected)


def test_no_rows_give_none() -> None:
    linear = Linear(torch.ones(HIDDEN, HIDDEN))
    experts = Experts(linear, [linear], [linear], silu_mul, top_k=1, is_normalised=True)
    assert experts(torch.empty(0, HIDDEN)).shape == (0, HIDDEN)


def test_weights_are_the_largest_of_all_experts_and_add_up_to_one_where_asked() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    experts, weights = route(logits, 2, is_normalised=False)
    assert experts.tolist() == [[1, 2]]
    assert_close(weights, logits.softmax(-1)[:, [1, 2]])
    assert_close(route(logits, 2, is_normalised=True)[1].sum(-1), torch.ones(1))
