"""Counts that are kept from step to step are those of the whole sequence."""

import random
from collections import Counter

import pytest
import torch

from toppings.ops.sampling import SamplingRow, sample
from toppings.ops.token_counts import TokenCounts
from toppings.sampling_params import SamplingParams


def counted(counts: TokenCounts) -> dict[int, int]:
    return dict(zip(counts.token_ids.tolist(), counts.times.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_counts_follow_an_output_that_grows_and_is_drawn_again(seed: int) -> None:
    draw = random.Random(seed)
    prompt = [draw.randrange(1000) for _ in range(700)]
    counts, output = TokenCounts(prompt), list[int]()
    for _ in range(400):
        if output and draw.random() < 0.2:
            del output[-draw.randrange(1, 3) :]
        output = [*output, *(draw.randrange(2000) for _ in range(draw.randrange(3)))]
        counts.follow(output)
        times = Counter(output)
        found = counted(counts)
        assert {token: n for token, n in found.items() if n} == times
        assert {*prompt, *output} <= found.keys()
        assert len(counts.token_ids) == len(found)


def test_an_output_without_a_prompt_begins_with_nothing() -> None:
    counts = TokenCounts()
    counts.follow([])
    assert not counted(counts)
    counts.follow([7, 7, 3])
    assert counted(counts) == {7: 2, 3: 1}


def test_a_row_draws_the_same_with_counts_that_are_kept() -> None:
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2
    )
    prompt, kept = [3, 4, 4, 5], TokenCounts([3, 4, 4, 5])
    output: list[int] = []
    for row in logits:
        anew = SamplingRow(params, prompt, output)
        followed = SamplingRow(params, prompt, output, counts=kept)
        assert sample(row[None], [anew]) == sample(row[None], [followed])
        output = [*output, sample(row[None], [anew]).token_ids[0]]
