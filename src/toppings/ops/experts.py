"""A mixture of experts: each token goes through a few of many gated feed-forward networks.

Rows are grouped by expert, so that each expert that is needed multiplies all of its rows at once, by the same
products as any other layer. How many there are is asked for on the host, which a CUDA graph does not allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toppings.ops.activation import Activation
from toppings.ops.linear import Linear, QuantizedLinear

AnyLinear = Linear | QuantizedLinear


def route(logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Which experts a token goes to, int64 [T, k], and with which weights, fp32 [T, k]: those with the
    largest softmax over all of them; the weights may then be made to add up to 1. logits: [T, E]."""
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights


@dataclass(frozen=True)
class Experts:
    """Called with x [T, hidden], returns [T, hidden] of x's dtype, summed in fp32 and rounded once."""

    router: Linear
    gate_up: Sequence[AnyLinear]
    down: Sequence[AnyLinear]
    activation: Activation
    top_k: int
    is_normalised: bool

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.router(x, is_wide=True)
        experts, weights = route(logits, self.top_k, is_normalised=self.is_normalised)
        order = experts.flatten().argsort(stable=True)  # of [T · k] places
        counts = torch.bincount(experts.flatten(), minlength=len(self.down)).tolist()
        rows = x[order // self.top_k]
        out = torch.empty_like(rows)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                own = rows[start : start + count]
                out[start : start + count] = self.down[expert](self.activation(self.gate_up[expert](own)))
                start += count
        placed = torch.empty_like(out)
        placed[order] = out
        parts = placed.view(x.shape[0], self.top_k, x.shape[1])
        return torch.einsum("tkh,tk->th", parts.float(), weights).to(x.dtype)


def reference(
    x: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    top_k: int,
    *,
    is_normalised: bool,
) -> Tensor:
    """`Experts` token by token in fp32. router: [E, hidden]; gate_up: [E, 2 I, hidden];
    down: [E, hidden, I]."""
    wide = x.float()
    experts, weights = route(wide @ router.float().T, top_k, is_normalised=is_normalised)
    out = torch.zeros_like(wide)
    for token, (chosen, shares) in enumerate(zip(experts.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            inner = activation((wide[token] @ gate_up[expert].float().T)[None])
            out[token] += share * (inner @ down[expert].float().T)[0]
    return out.to(x.dtype)
