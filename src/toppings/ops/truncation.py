"""Top-k, top-p and min-p: which tokens may be drawn, without sorting the vocabulary where that can be
avoided."""

from collections.abc import Iterator

import torch
from torch import Tensor

NUM_CANDIDATES = 256
"""A row whose kept tokens are certainly among this many likeliest ones is not sorted as a whole."""


def truncate(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Splits rows by the work they need; yields (row numbers [n], weights [n, N], token ids [n, N] or None).

    Weights are proportional to the probabilities, 0 where a token is excluded; token ids None: column = token
    id. logits: fp32 [R, V], temperature applied; top_k: int64 [R], 0 is off; top_p: [R], 1 is off; min_p:
    [R], 0 is off. min-p keeps tokens at least min_p times as probable as the likeliest one; top-k the k
    likeliest of those; top-p the fewest likeliest of those whose probabilities, renormalised, reach p. The
    likeliest is always kept.
    """
    is_cut = (top_k > 0) | (top_p < 1) | (min_p > 0)
    probs = logits.softmax(-1)
    if not is_cut.all():
        yield (~is_cut).nonzero()[:, 0], probs[~is_cut], None
    if not is_cut.any():
        return
    rows = is_cut.nonzero()[:, 0]
    limits = top_k[rows], top_p[rows], min_p[rows]
    values, ids = likeliest(probs[rows], NUM_CANDIDATES)
    weights, is_certain = cut_candidates(values, *limits)
    is_certain |= torch.full_like(is_certain, values.shape[1] == probs.shape[1])
    if is_certain.any():
        yield rows[is_certain], weights[is_certain], ids[is_certain]
    if not is_certain.all():
        rest = ~is_certain
        values, ids = probs[rows[rest]].sort(dim=-1, descending=True, stable=True)
        total = torch.ones(values.shape[0], device=values.device)
        yield rows[rest], cut(values, total, *(limit[rest] for limit in limits)), ids


def cut_candidates(values: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the likeliest tokens, and whether tokens outside could not change them [n].

    They could where a token outside passes top-k and min-p, unless both are off: then the total is 1; and
    where it might tie with the last one kept.
    """
    passes = _passes(values, top_k, min_p)
    is_closed = ~passes[:, -1] | ((top_k == 0) & (min_p == 0))
    weights = cut(values, torch.ones_like(top_p), top_k, top_p, min_p)
    smallest_kept = values.masked_fill(weights == 0, torch.inf).amin(-1)
    return weights, is_closed & (smallest_kept > values[:, -1])


def likeliest(probs: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest of each row, descending, ties by token id."""
    _, ids = probs.topk(min(num, probs.shape[1]), sorted=False)
    ids = ids.sort(dim=-1).values
    values, order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _passes(probs: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Which of `probs` [n, N], descending, min-p and top-k keep."""
    columns = torch.arange(probs.shape[1], device=probs.device)
    is_among = (columns < top_k[:, None]) | (top_k == 0)[:, None]
    return is_among & (probs >= min_p[:, None] * probs[:, :1]) | (columns == 0)


def cut(probs: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`probs` [n, N], descending, with the excluded ones set to 0; `total` [n]: what they and all not given
    add up to, which counts where min-p and top-k exclude none of them."""
    passes = _passes(probs, top_k, min_p)
    probs = probs * passes
    total = torch.where(passes.all(-1), total, probs.sum(-1))
    before = probs.cumsum(-1) - probs
    is_over = (before >= (top_p * total)[:, None]) & (top_p < 1)[:, None]
    is_over[:, 0] = False  # the likeliest is always kept
    return probs.masked_fill(is_over, 0.0)
