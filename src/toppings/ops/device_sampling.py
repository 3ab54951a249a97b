"""`sampling.sample` for logits on a GPU: what it needs of the rows comes in one copy, and nothing on the way
makes the host wait.

Draws the tokens that `sample` draws, with one difference: rows whose top-k is below `NUM_CANDIDATES` are
never sorted as a whole, so a tie that reaches from the kept tokens to beyond that many may be broken
otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toppings.messages import TokenLogprobs
from toppings.ops.dispatch import gpu_kernels
from toppings.ops.sampling import (
    SampleOutput,
    SamplingRow,
    can_draw,
    choose,
    draw_uniform,
    named_places,
    told_logprobs,
)
from toppings.ops.token_mask import TokenMask, device_flags, num_words
from toppings.ops.truncation import NUM_CANDIDATES, cut, cut_candidates, likeliest

Array = npt.NDArray[Any]
_NUM_LIKELY = 1024  # of a row whose top-k does not bound it: nearly always, top-p keeps fewer


@dataclass(frozen=True)
class SamplingPlan:
    """What a step's rows ask for, in host memory.

    `drawn`: rows that are not greedy; by position among them, `parameters` float32 [3, D] (temperature,
    top-p, min-p), `top_k`, `uniform` float64, and which are `uncut`, to be sorted in part (`few`) or whole.
    `masked`: rows with a mask, and their `masks`, int32 [N, W] (token_mask.py).
    `forbidden`: int64 [2, F], (rows, token ids). `biased`: int64 [2, B] with `biases` [B], which are added.
    `repeated`: int64 [2, N] with `repetition` [N], the factor. `counted`: int64 [2, M] with
    `subtracted` [M]. `reported`: rows that want logprobs, `num_top` of them; `named`: int64 [2, L], (number
    among these, token id) of tokens that they want by their ids.
    """

    drawn: Array
    parameters: Array
    top_k: Array
    uniform: Array
    uncut: Array
    few: Array
    many: Array
    masked: Array
    masks: Array
    forbidden: Array
    biased: Array
    biases: Array
    repeated: Array
    repetition: Array
    counted: Array
    subtracted: Array
    reported: Array
    named: Array
    num_top: int

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], vocab_size: int) -> "SamplingPlan":
        """Takes one number from the generator of every row that is drawn."""
        drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
        params = [rows[i].params for i in drawn]
        is_few = [0 < p.top_k < NUM_CANDIDATES for p in params]
        is_uncut = [p.top_k == 0 and p.top_p >= 1 and p.min_p <= 0 for p in params]
        places = [(i, t) for i, row in enumerate(rows) for t in row.forbidden_ids(vocab_size)]
        masks = {i: row.allowed for i, row in enumerate(rows) if row.allowed is not None}
        biases = [(i, *each) for i, row in enumerate(rows) for each in row.params.logit_bias]
        repeated, factors, counted, subtracted = _penalties(rows)
        reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        return cls(
            drawn=_longs(drawn),
            parameters=np.array([[p.temperature, p.top_p, p.min_p] for p in params], np.float32)
            .reshape(-1, 3)
            .T,
            top_k=_longs([p.top_k for p in params]),
            uniform=draw_uniform([rows[i] for i in drawn]).numpy(),
            uncut=_longs([d for d, uncut in enumerate(is_uncut) if uncut]),
            few=_longs([d for d, few in enumerate(is_few) if few]),
            many=_longs([d for d in range(len(drawn)) if not is_few[d] and not is_uncut[d]]),
            masked=_longs(list(masks)),
            masks=_masks(list(masks.values()), num_words(vocab_size)),
            forbidden=_pairs(places),
            biased=_pairs([(i, token) for i, token, _ in biases]),
            biases=np.array([bias for _, _, bias in biases], np.float32),
            repeated=repeated,
            repetition=factors,
            counted=counted,
            subtracted=subtracted,
            reported=_longs(reported),
            named=np.array(named_places([rows[i] for i in reported]), np.int64).reshape(2, -1),
            num_top=max((rows[i].params.num_top_logprobs for i in reported), default=0),
        )

    @property
    def changes(self) -> list[Array]:
        """What changes logits before a draw."""
        return [
            *(self.masked, self.masks, self.forbidden, self.biased, self.biases),
            *(self.repeated, self.repetition, self.counted, self.subtracted),
        ]

    @property
    def arrays(self) -> list[Array]:
        """To be brought to the device for `draw`."""
        return [
            *(self.drawn, self.parameters, self.top_k, self.uniform, self.uncut, self.few, self.many),
            *(self.reported, self.named, *self.changes),
        ]


def _masks(masks: Sequence[TokenMask], width: int) -> Array:
    """int32 [N, width]: what a smaller vocabulary does not have is not in it."""
    found = np.zeros((len(masks), width), np.int32)
    for row, mask in zip(found, masks, strict=True):
        row[: len(mask)] = mask
    return found


def draw(logits: Tensor, plan: SamplingPlan, arrays: Sequence[Tensor]) -> list[Tensor]:
    """The tokens drawn, int64 [R], which rows could be drawn, bool [R], and of the rows reported:
    log-probabilities, ranks, the likeliest tokens' ids and log-probabilities, and those of the tokens named.
    logits: fp32 [R, V], not changed; `arrays`: the plan's, on the device."""
    drawn, parameters, top_k, uniform, uncut, few, many, reported, named, *changes = arrays
    kinds = (uncut, few, many)
    adjusted = _adjusted(logits, *changes) if any(each.size for each in plan.changes) else logits
    token_ids = adjusted.argmax(-1)
    temperature, top_p, min_p = parameters
    is_drawable = can_draw(adjusted, token_ids, drawn, temperature)
    if plan.drawn.size:
        probs = (adjusted[drawn] / temperature[:, None]).softmax(-1)
        for kind, members in zip(("uncut", "few", "many"), kinds, strict=True):
            if len(members):
                limits = top_k[members], top_p[members], min_p[members]
                chosen = _choose(kind, probs[members], uniform[members], *limits)
                token_ids.index_put_((drawn[members],), chosen)
    report = _report(logits, token_ids, reported, named, plan.num_top) if len(reported) else []
    return [token_ids, is_drawable, *report]


def _adjusted(
    logits: Tensor,
    masked: Tensor,
    masks: Tensor,
    forbidden: Tensor,
    biased: Tensor,
    biases: Tensor,
    repeated: Tensor,
    factors: Tensor,
    counted: Tensor,
    subtracted: Tensor,
) -> Tensor:
    adjusted = logits.clone()
    is_allowed = device_flags(masks, logits.shape[1])
    adjusted.index_copy_(0, masked, adjusted[masked].masked_fill(~is_allowed, -torch.inf))
    adjusted.index_put_(tuple(forbidden), adjusted.new_full((), -torch.inf))
    adjusted.index_put_(tuple(biased), adjusted[tuple(biased)] + biases)
    scores = adjusted[tuple(repeated)]
    adjusted.index_put_(tuple(repeated), torch.where(scores > 0, scores / factors, scores * factors))
    adjusted.index_put_(tuple(counted), adjusted[tuple(counted)] - subtracted)
    return adjusted


def _choose(kind: str, probs: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """int64 [n]: a token of each row of probs [n, V]."""
    if kind == "uncut":
        return choose(probs, None, uniform)
    gpu = gpu_kernels("sampling", probs)
    if kind == "many" and (gpu is None or probs.shape[1] <= _NUM_LIKELY):
        values, ids = probs.sort(dim=-1, descending=True, stable=True)
    else:
        values, ids = likeliest(probs, NUM_CANDIDATES if kind == "few" else _NUM_LIKELY)
    chosen = choose(cut(values, torch.ones_like(top_p), top_k, top_p, min_p), ids, uniform)
    if kind == "many" and values.shape[1] < probs.shape[1]:
        _, is_certain = cut_candidates(values, top_k, top_p, min_p)
        gpu.draw_uncertain_(chosen, probs, is_certain, top_k, top_p, min_p, uniform)
    return chosen


def _report(logits: Tensor, token_ids: Tensor, reported: Tensor, named: Tensor, num_top: int) -> list[Tensor]:
    logprobs = logits[reported].log_softmax(-1)
    values = logprobs.gather(1, token_ids[reported][:, None])
    top_values, top_ids = likeliest(logprobs, num_top)
    return [values[:, 0], (logprobs > values).sum(-1) + 1, top_ids, top_values, logprobs[tuple(named)]]


def to_output(plan: SamplingPlan, rows: Sequence[SamplingRow], drawn: Sequence[Tensor]) -> SampleOutput:
    """`drawn`: what `draw` gave, in host memory."""
    token_ids: list[int] = drawn[0].tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    undrawable = [i for i, can_be in enumerate(drawn[1].tolist()) if not can_be]
    if len(drawn) > 2:
        reported = plan.reported.tolist()
        values, ranks, *more = (part.tolist() for part in drawn[2:])
        told = told_logprobs(
            [rows[i] for i in reported], [token_ids[i] for i in reported], values, ranks, *more
        )
        for i, each in zip(reported, told, strict=True):
            logprobs[i] = each
    return SampleOutput(token_ids, logprobs, undrawable)


def _penalties(rows: Sequence[SamplingRow]) -> tuple[Array, Array, Array, Array]:
    """(row, token) of every token that occurred in a row with a repetition penalty, int64 [2, N], and the
    penalty, float32 [N]; of every token of the output of a row with another one, and what is subtracted."""
    repeated, factors, counted, subtracted = [_pairs([])], [_NONE], [_pairs([])], [_NONE]
    for i, row in enumerate(rows):
        if not row.params.has_penalty:
            continue
        params, counts = row.params, row.occurred()
        tokens, times = counts.token_ids, counts.times
        if params.repetition_penalty != 1.0:
            repeated.append(np.stack([np.full_like(tokens, i), tokens]))
            factors.append(np.full(len(tokens), params.repetition_penalty, np.float32))
        if params.frequency_penalty or params.presence_penalty:
            drawn = tokens[times > 0]
            frequency, presence = np.float32(params.frequency_penalty), np.float32(params.presence_penalty)
            counted.append(np.stack([np.full_like(drawn, i), drawn]))
            subtracted.append(frequency * times[times > 0].astype(np.float32) + presence)
    return (
        np.concatenate(repeated, axis=1),
        np.concatenate(factors),
        np.concatenate(counted, axis=1),
        np.concatenate(subtracted),
    )


_NONE: Array = np.empty(0, np.float32)


def _longs(values: Sequence[int]) -> Array:
    return np.array(values, np.int64)


def _pairs(places: Sequence[tuple[int, int]]) -> Array:
    return np.array(places, np.int64).reshape(-1, 2).T
