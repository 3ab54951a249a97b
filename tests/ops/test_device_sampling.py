"""The sampler of logits on a GPU draws and reports what the one in host memory does, without looking back."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toppings.ops.device_sampling import SamplingPlan, draw, to_output
from toppings.ops.sampling import SamplingRow, sample
from toppings.ops.token_mask import TokenMask, mask_of
from toppings.sampling_params import SamplingParams

VOCAB_SIZE = 400
LOOKS_BACK = (
    *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique"),
    *("_unique2", "allclose"),
)


def check_no_look_back(operator: str, args: Any) -> None:
    """Fails where it would make the host wait for the device: to read a value, or for a shape that follows
    from values."""
    assert operator not in LOOKS_BACK, f"{operator} waits for the device"
    if operator in ("index", "index_put", "index_put_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        assert not masks, f"{operator} with a mask waits for the device"


class NoLookingBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_no_look_back(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def random_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.3]), "max_tokens": 50}
    choices: dict[str, list[Any]] = {
        "top_k": [1, 5, 255, 256, 399],
        "top_p": [0.1, 0.9, 0.999],
        "min_p": [0.01, 0.3],
        "repetition_penalty": [0.7, 1.4],
        "frequency_penalty": [0.3, -0.4],
        "presence_penalty": [0.9],
        "min_tokens": [10],
        "logprobs": [0, 3],
        "logprob_token_ids": [(5,), (399, 0, 7)],
        "logit_bias": [((3, 5.0), (11, -100.0)), ((12, 100.0),)],
        "bad_token_ids": [((11,), (5, 6)), ((7,), (1, 2, 12))],
    }
    for name, values in choices.items():
        if rng.random() < 0.3:
            params[name] = rng.choice(values)
    if "logprob_token_ids" in params:
        params.setdefault("logprobs", 2)
    return params


def random_rows(seed: int, num_rows: int) -> list[SamplingRow]:
    rng = random.Random(seed)
    return [
        SamplingRow(
            SamplingParams(**random_params(rng)),
            [rng.randrange(VOCAB_SIZE) for _ in range(9)],
            [rng.randrange(40) for _ in range(rng.choice([0, 1, 7, 30]))],
            torch.Generator().manual_seed(i) if rng.random() < 0.8 else None,
            (7, VOCAB_SIZE + 5),
            random_mask(rng),
        )
        for i in range(num_rows)
    ]


def random_mask(rng: random.Random) -> TokenMask | None:
    """None, or one that holds some tokens, or nothing but the end of the sequence."""
    if rng.random() < 0.5:
        return None
    return mask_of([7] if rng.random() < 0.3 else rng.sample(range(VOCAB_SIZE), 30), VOCAB_SIZE)


def test_draws_and_reports_what_the_reference_does() -> None:
    for seed, num_rows in enumerate((1, 2, 7, 60, 60)):
        torch.manual_seed(seed)
        logits = 3 * torch.randn(num_rows, VOCAB_SIZE)
        logits[:, 11] = logits[:, 12]  # ties
        expected = sample(logits, random_rows(seed, num_rows))
        torch.manual_seed(seed)
        torch.randn(num_rows, VOCAB_SIZE)
        rows, before = random_rows(seed, num_rows), logits.clone()
        plan = SamplingPlan.of(rows, VOCAB_SIZE)
        arrays = [torch.from_numpy(array.copy()) for array in plan.arrays]
        with NoLookingBack():  # type: ignore[no-untyped-call]
            drawn = draw(logits, plan, arrays)
        assert to_output(plan, rows, drawn) == expected
        assert torch.equal(logits, before)


def spoiled(logits: torch.Tensor, how: str) -> torch.Tensor:
    """Row 1 is no distribution, or becomes none by its temperature."""
    logits = logits.clone()
    if how == "all excluded":
        logits[1] = -torch.inf
    else:
        logits[1, 3] = {"NaN": torch.nan, "infinite": torch.inf, "overflows": 3e38}[how]
    return logits


@pytest.mark.parametrize("how", ["NaN", "infinite", "all excluded", "overflows"])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 300}, {"logprobs": 2}]
)
def test_a_row_that_is_no_distribution_fails_alone(how: str, params: dict[str, Any]) -> None:
    fine = 3 * torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))

    def rows() -> list[SamplingRow]:
        kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.1, **params}, {"temperature": 0.0})
        return [
            SamplingRow(SamplingParams(**({"logprobs": 1} | kind)), [], [], torch.Generator().manual_seed(i))
            for i, kind in enumerate(kinds)
        ]

    expected, logits, on_device = sample(fine, rows()), spoiled(fine, how), rows()
    plan = SamplingPlan.of(on_device, VOCAB_SIZE)
    drawn = draw(logits, plan, [torch.from_numpy(array.copy()) for array in plan.arrays])
    for output in (sample(logits, rows()), to_output(plan, on_device, drawn)):
        assert output.undrawable == [1]
        assert 0 <= output.token_ids[1] < VOCAB_SIZE
        for i in (0, 2):
            assert (output.token_ids[i], output.logprobs[i]) == (expected.token_ids[i], expected.logprobs[i])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_greedy_row_with_a_value_that_is_not_finite_fails_too(value: float) -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, 5] = value
    rows = [SamplingRow(SamplingParams(temperature=0.0), [], []) for _ in range(2)]
    plan = SamplingPlan.of(rows, VOCAB_SIZE)
    drawn = draw(logits, plan, [torch.from_numpy(array.copy()) for array in plan.arrays])
    assert sample(logits, rows).undrawable == to_output(plan, rows, drawn).undrawable == [0]


def test_greedy_rows_bring_nothing_to_the_device() -> None:
    rows = [SamplingRow(SamplingParams(temperature=0.0), [1], [2]) for _ in range(3)]
    assert sum(array.nbytes for array in SamplingPlan.of(rows, VOCAB_SIZE).arrays) == 0
