import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from toppings.ops import truncation
from toppings.ops.truncation import truncate


def weights(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Probability of each token after truncation, [R, V]."""
    num_rows = logits.shape[0]
    result = torch.zeros_like(logits)
    limits = torch.full((num_rows,), top_k), torch.full((num_rows,), top_p), torch.full((num_rows,), min_p)
    for rows, kept, ids in truncate(logits, *limits):
        columns = torch.arange(logits.shape[1]).expand(len(rows), -1) if ids is None else ids
        result[rows[:, None], columns] = kept
    return result / result.sum(-1, keepdim=True)


@pytest.fixture(params=[3, 256], ids=["sorts", "candidates"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Rows from flat to peaked; with 3 candidates most rows have to be sorted as a whole."""
    monkeypatch.setattr(truncation, "NUM_CANDIDATES", request.param)
    torch.manual_seed(0)
    return torch.randn(40, 400) * torch.linspace(0.1, 10, 40)[:, None]


@pytest.mark.parametrize("top_k", [1, 2, 50, 399, 400, 1000])
def test_top_k_is_that_of_transformers(logits: Tensor, top_k: int) -> None:
    expected = TopKLogitsWarper(top_k)(torch.empty(0), logits).softmax(-1)
    torch.testing.assert_close(weights(logits, top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(logits: Tensor, top_p: float) -> None:
    expected = TopPLogitsWarper(top_p)(torch.empty(0), logits).softmax(-1)
    torch.testing.assert_close(weights(logits, top_p=top_p), expected)


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_is_that_of_transformers(logits: Tensor, min_p: float) -> None:
    expected = MinPLogitsWarper(min_p)(torch.empty(0), logits).softmax(-1)
    torch.testing.assert_close(weights(logits, min_p=min_p), expected)


def test_min_p_then_top_k_then_top_p_are_applied_in_turn(logits: Tensor) -> None:
    expected = logits
    for warper in (MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        expected = warper(torch.empty(0), expected)
    torch.testing.assert_close(weights(logits, min_p=0.02, top_k=20, top_p=0.8), expected.softmax(-1))


def test_of_equal_tokens_the_lower_ids_are_kept(logits: Tensor) -> None:
    kept = weights(torch.zeros_like(logits), top_k=5)
    assert (kept[:, :5] > 0).all()
    assert (kept[:, 5:] == 0).all()
