import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from toppings.ops import sampling
from toppings.ops.device_sampling import SamplingPlan, to_output
from toppings.ops.sampling import SamplingRow, sample
from toppings.ops.token_mask import device_flags, flags_of, mask_of
from toppings.sampling_params import SamplingParams

NUM_TOKENS = 5
GREEDY: dict[str, Any] = {"temperature": 0.0}


def row(
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    generator: torch.Generator | None = None,
    eos: tuple[int, ...] = (),
    allowed: list[int] | None = None,
    **params: Any,
) -> SamplingRow:
    mask = None if allowed is None else mask_of(allowed, NUM_TOKENS)
    return SamplingRow(SamplingParams(**params), prompt or [], output or [], generator, eos, mask)


def draw(logits: Tensor, *rows: SamplingRow) -> list[int]:
    return sample(logits, list(rows)).token_ids


def frequencies(logits: Tensor, num_draws: int, **params: Any) -> Tensor:
    """Share of each token among draws with one seeded generator."""
    generator = torch.Generator().manual_seed(5)
    rows = [row(generator=generator, **params) for _ in range(num_draws)]
    drawn = torch.tensor(draw(logits.expand(num_draws, -1), *rows))
    return drawn.bincount(minlength=logits.numel()) / num_draws


def assert_drawn_as(logits: Tensor, expected: Tensor, **params: Any) -> None:
    """Each share within 6 standard deviations of its probability: by the normal approximation a right sampler
    fails with a probability below 2e-9 per token (and the seed is fixed)."""
    num_draws = 20000
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    shares = frequencies(logits, num_draws, **params)
    assert ((shares - expected).abs() <= 6 * deviation).all(), (shares, expected)
    assert (shares[expected == 0] == 0).all()


LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def test_greedy_takes_the_likeliest() -> None:
    assert draw(LOGITS[None], row(**GREEDY)) == [1]


def test_ties_go_to_the_lower_token_id() -> None:
    assert draw(torch.tensor([[0.0, 3.0, 3.0, 3.0]]), row(**GREEDY)) == [1]
    only_one = [row(top_k=1, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert draw(torch.tensor([[0.0, 3.0, 3.0, 3.0]]).expand(20, -1), *only_one) == [1] * 20


def test_tiny_temperatures_are_greedy() -> None:
    assert draw(LOGITS[None] * 1e3, row(temperature=1e-9)) == [1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    assert_drawn_as(LOGITS, (LOGITS / temperature).softmax(-1), temperature=temperature)


def test_top_k_keeps_the_likeliest_in_proportion() -> None:
    expected = torch.where(torch.tensor([False, True, True, False, True]), LOGITS, -torch.inf).softmax(-1)
    assert_drawn_as(LOGITS, expected, top_k=3)


def test_top_p_applies_to_what_top_k_left() -> None:
    # Of the two likeliest, token 1 has e^2 / (e^2 + e^1.5) = 0.62: it alone reaches 0.6, not its 0.44 of all.
    assert_drawn_as(LOGITS, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), top_k=2, top_p=0.6)


def test_min_p_is_relative_to_the_likeliest() -> None:
    expected = torch.where(LOGITS - LOGITS.max() >= math.log(0.5), LOGITS, -torch.inf).softmax(-1)
    assert_drawn_as(LOGITS, expected, min_p=0.5)


def test_a_seeded_row_draws_the_same_in_any_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50)

    def seeded() -> SamplingRow:
        return row(generator=torch.Generator().manual_seed(7), top_p=0.9)

    alone = draw(logits[2:3], seeded())
    others = [row(), row(generator=torch.Generator().manual_seed(1)), seeded(), row(**GREEDY)]
    assert draw(logits, *others)[2] == alone[0]


def test_a_generator_moves_on_by_one_number_per_token() -> None:
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    cases: list[dict[str, Any]] = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}]
    for params in cases:
        draw(LOGITS[None], row(generator=generator, **params))
        torch.rand((), generator=twin, dtype=torch.float64)
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 12)
    prompt, output = [1, 3, 3, 5], [2, 7, 7]
    seen = torch.tensor([prompt + output]).expand(40, -1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()).argmax(-1)
    rows = [row(prompt=prompt, output=output, repetition_penalty=penalty, **GREEDY) for _ in range(40)]
    assert draw(logits, *rows) == expected.tolist()


def test_frequency_and_presence_penalties_count_output_tokens_only() -> None:
    logits = torch.tensor([3.0, 2.9, 2.0])
    params: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.25}
    adjusted = torch.tensor([3.0 - 2 * 0.5 - 0.25, 2.9 - 0.5 - 0.25, 2.0])
    assert_drawn_as(logits, adjusted.softmax(-1), prompt=[0, 1, 2, 2], output=[0, 1, 0], **params)


def test_rows_without_penalties_are_not_touched_by_their_neighbours() -> None:
    penalised = row(output=[1], presence_penalty=2.0, **GREEDY)
    assert draw(LOGITS.expand(3, -1), row(output=[1], **GREEDY), penalised, row(**GREEDY)) == [1, 4, 1]


def test_min_tokens_forbids_eos_and_stop_ids_until_reached() -> None:
    params: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (4, 999), **GREEDY}
    early = row(eos=(1,), output=[0], **params)
    late = row(eos=(1,), output=[0, 0], **params)
    assert draw(LOGITS.expand(2, -1), early, late) == [2, 1]


def test_logprobs_are_those_before_temperature_and_penalties() -> None:
    params: dict[str, Any] = {"logprobs": 2, "temperature": 0.0, "presence_penalty": 2.0}
    output = sample(LOGITS[None], [row(output=[1], **params)])
    reported = output.logprobs[0]
    assert reported is not None
    expected = LOGITS.log_softmax(-1)
    assert (reported.token_id, reported.rank) == (4, 2)
    assert reported.logprob == pytest.approx(expected[4].item())
    assert [token for token, _ in reported.top] == [1, 4]
    assert [value for _, value in reported.top] == pytest.approx(expected[[1, 4]].tolist())


def test_tokens_that_are_named_are_told_instead_of_the_likeliest() -> None:
    rows = [
        row(logprobs=2, **GREEDY),
        row(logprobs=2, logprob_token_ids=(3, 0), **GREEDY),
        row(**GREEDY),
        row(logprobs=0, logprob_token_ids=(1,), **GREEDY),
    ]
    likeliest, named, nothing, one = sample(LOGITS.expand(4, -1), rows).logprobs
    expected = LOGITS.log_softmax(-1).tolist()
    assert nothing is None
    assert likeliest is not None
    assert named is not None
    assert one is not None
    assert len(likeliest.top) == 2
    assert [token_id for token_id, _ in named.top] == [3, 0]
    assert [value for _, value in named.top] == pytest.approx([expected[3], expected[0]])
    assert one.top[0][0] == 1
    assert one.top[0][1] == pytest.approx(expected[1])
    assert named.token_id == likeliest.token_id
    assert named.rank == 1


def test_rows_get_as_many_logprobs_as_they_asked_for() -> None:
    output = sample(
        LOGITS.expand(3, -1), [row(logprobs=0, **GREEDY), row(**GREEDY), row(logprobs=4, **GREEDY)]
    )
    assert [None if entry is None else len(entry.top) for entry in output.logprobs] == [0, None, 4]


def test_no_rows_draw_nothing() -> None:
    assert sample(torch.empty(0, 5), []).token_ids == []


@pytest.mark.parametrize("num_lost", [1, 2])
def test_draws_that_are_too_few_leave_no_row_with_a_token_of_its_own(
    monkeypatch: pytest.MonkeyPatch, num_lost: int
) -> None:
    """A row without its draw would go on with the likeliest token, as if it had asked for that."""
    monkeypatch.setattr(sampling, "_draw", lambda logits, temperature, rows: [0] * (len(rows) - num_lost))
    rows = [row(temperature=1.0) for _ in range(3)]
    with pytest.raises(ValueError, match="zip"):
        sample(torch.randn(3, 8), rows)


def test_log_probabilities_that_are_too_few_are_not_handed_out() -> None:
    rows = [row(logprobs=1) for _ in range(2)]
    plan = SamplingPlan.of(rows, 8)
    drawn = [torch.zeros(2), torch.ones(2), torch.zeros(1), torch.ones(1)]
    drawn += [torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(0)]
    with pytest.raises(ValueError, match="zip"):
        to_output(plan, rows, drawn)


def test_only_allowed_tokens_are_drawn_and_their_shares_keep_their_proportions() -> None:
    assert draw(LOGITS[None], row(**GREEDY, allowed=[0, 3])) == [0]
    expected = LOGITS.index_fill(0, torch.tensor([1, 4]), -torch.inf).softmax(-1)
    generator = torch.Generator().manual_seed(5)
    rows = [row(generator=generator, allowed=[0, 2, 3]) for _ in range(5000)]
    shares = torch.tensor(draw(LOGITS.expand(5000, -1), *rows)).bincount(minlength=5) / 5000
    assert ((shares - expected).abs() <= 6 * (expected * (1 - expected) / 5000).sqrt()).all()
    assert (shares[[1, 4]] == 0).all()


def test_penalties_and_truncation_act_among_the_allowed() -> None:
    assert draw(LOGITS[None], row(**GREEDY, allowed=[2, 4], output=[4], presence_penalty=1.0)) == [2]
    assert draw(LOGITS[None], row(allowed=[0, 3], top_k=1)) == [0]
    assert draw(LOGITS[None], row(allowed=[3], top_p=0.1, repetition_penalty=2.0, prompt=[3])) == [3]


def test_the_end_is_drawn_before_min_tokens_only_where_nothing_else_is_allowed() -> None:
    wanted = {**GREEDY, "min_tokens": 4, "eos": (1,)}
    assert draw(LOGITS[None], row(**wanted, allowed=[1, 3])) == [3]
    assert draw(LOGITS[None], row(**wanted, allowed=[1])) == [1]
    beyond = mask_of([1], NUM_TOKENS)
    beyond |= np.int32(-1 << NUM_TOKENS)  # bits of no token
    assert draw(LOGITS[None], dataclasses.replace(row(**wanted), allowed=beyond)) == [1]


def test_reported_logprobs_are_the_models_own_whatever_is_allowed() -> None:
    output = sample(LOGITS[None], [row(**GREEDY, allowed=[3], logprobs=1)])
    (entry,) = output.logprobs
    assert entry is not None
    assert entry.token_id == 3
    assert entry.logprob == pytest.approx(LOGITS.log_softmax(-1)[3].item())
    assert [token for token, _ in entry.top] == [1]


def test_a_mask_is_the_same_set_on_host_and_device() -> None:
    for vocab_size in (1, 31, 32, 33, 400):
        ids = [t for t in range(vocab_size) if t % 3 == 0 or t == vocab_size - 1]
        mask = mask_of([*ids, vocab_size + 7, -1], vocab_size)
        assert mask.dtype == np.int32
        assert np.flatnonzero(flags_of(mask, vocab_size)).tolist() == ids
        assert device_flags(torch.from_numpy(mask)[None], vocab_size)[0].nonzero()[:, 0].tolist() == ids
