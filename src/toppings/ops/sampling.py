"""Drawing the next token of every row: penalties, temperature, truncation, logprobs.

The order is vLLM's: reported log-probabilities are those of the model's own distribution; then what a row may
not draw is excluded, biases are added, and the penalties change the logits; greedy rows take the largest; the
others divide by the temperature, drop what min-p, then top-k, then top-p exclude, and draw. Ties go to the
lower token id everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toppings.messages import TokenLogprobs
from toppings.ops.token_counts import TokenCounts
from toppings.ops.token_mask import TokenMask, allows_more_than, flags_of
from toppings.ops.truncation import likeliest, truncate
from toppings.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this draw the likeliest token: dividing by them would overflow."""


@dataclass(slots=True)
class SamplingRow:
    """What one row's draw depends on beside its logits. `generator` None draws from torch's global one.

    `allowed`: the tokens that may be drawn at all. Not drawn are those that would complete one of the
    parameters' `bad_token_ids`, and before `min_tokens` tokens are out `eos_token_ids` and `stop_token_ids`;
    what would leave nothing to draw does not count. `counts`: where they are kept for this sequence.
    `vocab_size`: the row's tokens, where logits may be wider than that; 0: as many as there are logits.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    generator: torch.Generator | None = None
    eos_token_ids: tuple[int, ...] = ()
    allowed: TokenMask | None = None
    counts: TokenCounts | None = None
    vocab_size: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    def occurred(self) -> TokenCounts:
        """Tokens of the output, and of the prompt where these count."""
        counts = self.counts
        if counts is None:
            counts = TokenCounts(self.prompt_token_ids if self.params.repetition_penalty != 1.0 else ())
        counts.follow(self.output_token_ids)
        return counts

    def forbidden_ids(self, vocab_size: int) -> list[int]:
        """Beside what `allowed` leaves out. `vocab_size`: of the logits."""
        vocab_size = self.vocab_size or vocab_size
        bad = self.bad_ids(vocab_size)
        bad = bad if self._leaves_some(bad, vocab_size) else []
        if len(self.output_token_ids) >= self.params.min_tokens:
            return bad
        ends = [t for t in (*self.eos_token_ids, *self.params.stop_token_ids) if t < vocab_size]
        ids = list({*bad, *ends})
        return ids if self._leaves_some(ids, vocab_size) else bad

    def bad_ids(self, vocab_size: int) -> list[int]:
        """Tokens that would complete one of `bad_token_ids`."""
        output = self.output_token_ids
        found = {
            sequence[-1]
            for sequence in self.params.bad_token_ids
            if len(sequence) == 1 or tuple(output[1 - len(sequence) :]) == sequence[:-1]
        }
        return [token for token in found if token < vocab_size]

    def is_stuck(self) -> bool:
        """Bad words leave nothing to draw of its `vocab_size` tokens."""
        size = self.vocab_size
        return bool(self.params.bad_token_ids) and not self._leaves_some(self.bad_ids(size), size)

    def _leaves_some(self, token_ids: list[int], vocab_size: int) -> bool:
        """`token_ids` have no number twice."""
        if self.allowed is None:
            return len(token_ids) < vocab_size
        return not token_ids or allows_more_than(self.allowed, token_ids, vocab_size)


@dataclass(slots=True)
class SampleOutput:
    """`undrawable`: rows whose logits are no distribution (NaN, infinite, or nothing may be drawn). Their
    tokens are of the vocabulary, but mean nothing."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    undrawable: list[int] = field(default_factory=list)


def sample(logits: Tensor, rows: list[SamplingRow]) -> SampleOutput:
    """One token per row. logits: fp32 [R, V], not changed.

    A row's draw takes one number from its generator and depends on no other row.
    """
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    if not rows:
        return SampleOutput([])
    adjusted = _penalise(_bias(_forbid(logits, rows), rows), rows)
    likeliest_ids = adjusted.argmax(-1)
    token_ids = likeliest_ids.tolist()
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    temperature = torch.tensor([rows[i].params.temperature for i in drawn], device=logits.device)
    if drawn:
        chosen = _draw(adjusted[drawn], temperature, [rows[i] for i in drawn])
        for i, token_id in zip(drawn, chosen, strict=True):
            token_ids[i] = token_id
    index = torch.tensor(drawn, dtype=torch.int64, device=logits.device)
    is_drawable = can_draw(adjusted, likeliest_ids, index, temperature).tolist()
    undrawable = [i for i, can_be in enumerate(is_drawable) if not can_be]
    return SampleOutput(token_ids, _logprobs(logits, rows, token_ids), undrawable)


def can_draw(logits: Tensor, likeliest_ids: Tensor, drawn: Tensor, temperature: Tensor) -> Tensor:
    """bool [R]: the logits [R, V], of the rows `drawn` [D] divided by `temperature` [D], have a softmax.
    `likeliest_ids` [R] are their argmax, a NaN's place where there is one: the largest alone tells."""
    largest = logits.gather(1, likeliest_ids[:, None])[:, 0]
    return largest.index_put((drawn,), largest[drawn] / temperature).isfinite()


def _forbid(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    vocab_size = logits.shape[1]
    places = [(i, token) for i, row in enumerate(rows) for token in row.forbidden_ids(vocab_size)]
    masks = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if not places and not masks:
        return logits
    logits = logits.clone()
    for i, mask in masks:
        is_allowed = torch.from_numpy(flags_of(mask, vocab_size)).to(logits.device)
        logits[i].masked_fill_(~is_allowed, -torch.inf)
    if places:
        row_index, token_ids = torch.tensor(places, device=logits.device).unbind(1)
        logits[row_index, token_ids] = -torch.inf
    return logits


def _bias(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Adds each row's `logit_bias`."""
    biases = [(i, *each) for i, row in enumerate(rows) for each in row.params.logit_bias]
    if not biases:
        return logits
    row_index, token_ids, added = zip(*biases, strict=True)
    places = (torch.tensor(row_index, device=logits.device), torch.tensor(token_ids, device=logits.device))
    return logits.index_put(places, torch.tensor(added, device=logits.device), accumulate=True)


def _penalise(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    penalised = [(i, row) for i, row in enumerate(rows) if row.params.has_penalty]
    if not penalised:
        return logits
    logits = logits.clone()
    for i, row in penalised:
        _penalise_row_(logits[i], row)
    return logits


def _penalise_row_(logits: Tensor, row: SamplingRow) -> None:
    """Repetition penalty p over prompt and output (logit / p where positive, else logit · p), then
    frequency · count and presence are subtracted for the tokens of the output. Only the tokens that occurred
    are touched, however large the vocabulary is. logits: [V]."""
    params, counts = row.params, row.occurred()
    seen, times = (torch.from_numpy(each).to(logits.device) for each in (counts.token_ids, counts.times))
    scores = logits[seen]
    if params.repetition_penalty != 1.0:
        p = params.repetition_penalty
        scores = torch.where(scores > 0, scores / p, scores * p)
    subtracted = params.frequency_penalty * times + params.presence_penalty
    logits[seen] = torch.where(times > 0, scores - subtracted, scores)


def _draw(logits: Tensor, temperature: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Inverse transform sampling: the first token at which the cumulated probability exceeds a uniform
    number."""
    min_p, top_p = (
        torch.tensor([getattr(row.params, name) for row in rows], device=logits.device)
        for name in ("min_p", "top_p")
    )
    top_k = torch.tensor([row.params.top_k for row in rows], device=logits.device)
    uniform = draw_uniform(rows)
    result = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for members, probs, token_ids in truncate(logits / temperature[:, None], top_k, top_p, min_p):
        result[members] = choose(probs, token_ids, uniform.to(logits.device)[members])
    return [int(token_id) for token_id in result.tolist()]


def draw_uniform(rows: list[SamplingRow]) -> Tensor:
    """A number of [0, 1) from each row's generator, fp64, in host memory."""
    numbers = [torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows]
    return torch.stack(numbers) if numbers else torch.empty(0, dtype=torch.float64)


def choose(weights: Tensor, token_ids: Tensor | None, uniform: Tensor) -> Tensor:
    """int64 [n]: per row, where the cumulated weights [n, N] exceed `uniform` of their sum: a column's token
    id, or without `token_ids` the column. Some column also where the weights are NaN."""
    cumulated = weights.double().cumsum(-1)
    total = cumulated[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulated, target, right=True).clamp_(max=weights.shape[1] - 1)
    return (place if token_ids is None else token_ids.gather(1, place))[:, 0]


def _logprobs(logits: Tensor, rows: list[SamplingRow], token_ids: list[int]) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return result
    logprobs = logits[wanted].log_softmax(-1)
    chosen = torch.tensor([token_ids[i] for i in wanted], device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)
    ranks = ((logprobs > values).sum(-1) + 1).tolist()
    top_values, top_ids = likeliest(logprobs, max(rows[i].params.num_top_logprobs for i in wanted))
    places = named_places([rows[i] for i in wanted])
    named = tuple(torch.tensor(each, dtype=torch.int64, device=logits.device) for each in places)
    reported = values[:, 0].tolist(), ranks, top_ids.tolist(), top_values.tolist()
    told = told_logprobs(
        [rows[i] for i in wanted], [token_ids[i] for i in wanted], *reported, logprobs[named].tolist()
    )
    for i, each in zip(wanted, told, strict=True):
        result[i] = each
    return result


def named_places(rows: Sequence[SamplingRow]) -> tuple[list[int], list[int]]:
    """Of all tokens that these rows want by their ids: the row's number, and the id."""
    places = [(i, token_id) for i, row in enumerate(rows) for token_id in row.params.logprob_token_ids]
    return [i for i, _ in places], [token_id for _, token_id in places]


def told_logprobs(
    rows: Sequence[SamplingRow],
    token_ids: Sequence[int],
    values: Sequence[float],
    ranks: Sequence[int],
    top_ids: Sequence[list[int]],
    top_values: Sequence[list[float]],
    named: Sequence[float],
) -> list[TokenLogprobs]:
    """Of rows that report the tokens chosen for them. `named`: the log-probabilities at `named_places`."""
    told, rest = [], iter(named)
    for row, token_id, value, rank, ids, alternatives in zip(
        rows, token_ids, values, ranks, top_ids, top_values, strict=True
    ):
        top = list(zip(ids, alternatives, strict=True))[: row.params.num_top_logprobs]
        own = [(each, next(rest)) for each in row.params.logprob_token_ids]
        told.append(TokenLogprobs(token_id, value, rank, own or top))
    return told
