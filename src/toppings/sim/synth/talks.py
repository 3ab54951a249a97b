"""Conversations: each turn's prompt is all that was said before, and what is new."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.sim.blocks import PromptBlocks
from toppings.sim.trace import FloatArray, IntArray

BLOCK_LEN = 512
"""Tokens of a block, as in Mooncake's traces."""
MOST_TOKENS = 16_384
"""A conversation ends before its prompt is longer."""


@dataclass(frozen=True, eq=False)
class Talks:
    """The turns [N] of conversations, by arrival: which one each belongs to, and its prompt with the blocks
    that it is made of."""

    arrivals_s: FloatArray
    talks: NDArray[np.int64]
    prompt_tokens: IntArray
    response_tokens: IntArray
    blocks: PromptBlocks


def num_turns(num_talks: int, mean: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Of each conversation, geometric [T]: after each turn it ends with the same probability."""
    return rng.geometric(1 / mean, num_talks)


def make_talks(
    starts_s: FloatArray,
    nums: NDArray[np.int64],
    new_tokens: IntArray,
    response_tokens: IntArray,
    pause_s: float,
    duration_s: float,
    rng: np.random.Generator,
) -> Talks:
    """Conversations that begin at `starts_s` [T] and have `nums` [T] turns, with `new_tokens` and
    `response_tokens` [sum of nums] each; between two turns there is an exponential pause of mean `pause_s`.
    Those within 0 … `duration_s` and `MOST_TOKENS` are kept.
    """
    talks = np.repeat(np.arange(len(nums)), nums)
    firsts = np.cumsum(nums) - nums
    pauses = rng.exponential(pause_s, len(talks))
    pauses[firsts] = 0.0
    arrivals = np.repeat(starts_s, nums) + _within(pauses, firsts, nums)
    said = new_tokens.astype(np.int64) + response_tokens
    prompts = (_within(said, firsts, nums) - response_tokens).astype(np.int32)
    is_kept = (arrivals >= 0) & (arrivals < duration_s) & (prompts <= MOST_TOKENS)
    kept = np.flatnonzero(is_kept)
    order = kept[np.argsort(arrivals[kept], kind="stable")]
    return Talks(
        arrivals[order],
        talks[order],
        prompts[order],
        response_tokens[order],
        _blocks(talks[order], prompts[order]),
    )


def _within(values: NDArray[Any], firsts: NDArray[np.int64], nums: NDArray[np.int64]) -> NDArray[Any]:
    """Running sums that begin anew with each conversation."""
    sums: NDArray[Any] = np.cumsum(values)
    before = sums[firsts] - values[firsts] if len(firsts) else sums[:0]
    within: NDArray[Any] = sums - np.repeat(before, nums)
    return within


def _blocks(talks: NDArray[np.int64], prompts: IntArray) -> PromptBlocks:
    """A conversation's full blocks are the same in all its turns; what does not fill one is a turn's own."""
    most = MOST_TOKENS // BLOCK_LEN
    num_shared = (int(talks.max(initial=-1)) + 1) * most
    lists = []
    for turn, (talk, tokens) in enumerate(zip(talks.tolist(), prompts.tolist(), strict=True)):
        num_full, num_rest = divmod(tokens, BLOCK_LEN)
        ids = list(range(talk * most, talk * most + num_full))
        lists.append([*ids, num_shared + turn] if num_rest else ids)
    return PromptBlocks.of(lists, BLOCK_LEN)
