"""Draws behind drafts.

A token is drawn behind each token of a draft as if that had been drawn before, with the request's own
parameters; the first that is not the draft's is the last one that counts. So a token has the distribution
that it has without a draft: the draft's with its probability, else one of the others with theirs. Each draw
takes the number from the request's generator that it would take without a draft.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from toppings.core import BatchItem
from toppings.ops.sampling import SampleOutput, SamplingRow


def with_drafts(rows: list[SamplingRow], items: Sequence[BatchItem]) -> list[SamplingRow]:
    """`rows`: one for each of `items`. With each of these, one for every token of its draft."""
    if not any(item.draft for item in items):
        return rows
    found = []
    for row, item in zip(rows, items, strict=True):
        found.append(row)
        for place in range(1, len(item.draft) + 1):
            known = [*row.output_token_ids, *item.draft[:place]]
            generator = None if row.generator is None else _ahead(row.generator, place)
            # Counts are kept of what was drawn; what a draft adds may have to be forgotten.
            found.append(replace(row, output_token_ids=known, generator=generator, counts=None))
    return found


def kept_rows(items: Sequence[BatchItem], rows: Sequence[SamplingRow], drawn: SampleOutput) -> list[int]:
    """Which rows count, of `items` that have one each and one for every token of their drafts.

    The generators of requests are where these draws leave them. To be called once.
    """
    if not any(item.draft for item in items):
        return list(range(len(items)))
    undrawable, kept, start = set(drawn.undrawable), list[int](), 0
    while start < len(items):
        draft, num = items[start].draft, 1
        for place, token_id in enumerate(draft, start):
            if drawn.token_ids[place] != token_id or place in undrawable:
                break
            num += 1
        kept += range(start, start + num)
        if (generator := rows[start].generator) is not None:
            _skip(generator, num - 1)
        start += 1 + len(draft)
    return kept


def _ahead(generator: torch.Generator, num_draws: int) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    _skip(copy, num_draws)
    return copy


def _skip(generator: torch.Generator, num_draws: int) -> None:
    for _ in range(num_draws):  # as `draw_uniform` takes them
        torch.rand((), generator=generator, dtype=torch.float64)
