"""A mixture of experts: each token goes through a few of many gated feed-forward networks.

Rows are grouped by expert, so that each expert that is needed multiplies all of its rows at once; an
adapter's rows of an expert are neighbours in it. On the CPU how many there are is asked for, and each
expert's products are those of any other layer; those of few rows run in one call. On a GPU nobody asks:
kernels go over chunks of neighbouring rows (`gpu_experts.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from toppings.ops.activation import Activation
from toppings.ops.dispatch import gpu_kernels, kernels
from toppings.ops.linear import MAX_FEW_ROWS, Linear, PackedBlocks, QuantizedLinear, linear
from toppings.ops.quantized import QuantizedWeight

_MANY_ROWS = 32
_SAMPLE = torch.empty(0)  # kernels of indices are the same for all types of elements


@dataclass(frozen=True)
class GroupedRows:
    """A step's rows for experts, `top_k` of each token, in the order of their experts and, of each expert, of
    their owners (adapters; 0: of none). `order`: int64 [P], row i is that of token `order[i] // top_k`;
    `keys`: int64 [P], ascending, expert · num_owners + owner."""

    order: Tensor
    keys: Tensor
    num_experts: int
    num_owners: int = 1
    known_counts: list[int] | None = None  # `counts`, where they were found on the way

    @classmethod
    def of(
        cls, experts: Tensor, num_experts: int, owners: Tensor | None = None, num_owners: int = 1
    ) -> "GroupedRows":
        """experts: int64 [T, k]; owners: int64 [T], below `num_owners`."""
        if experts.device.type == "cpu" and (fast := kernels("experts", _SAMPLE)) is not None:
            num, top_k = experts.numel(), experts.shape[1]
            found = torch.empty(2 * num + num_experts, dtype=torch.int64)
            order, keys, counts = found[:num], found[num : 2 * num], found[2 * num :]
            fast.group_rows(
                _SAMPLE, 1, num, order, keys, counts, experts.contiguous(), 0 if owners is None else owners,
                num, top_k, num_experts, num_owners,
            )  # fmt: skip
            return cls(order, keys, num_experts, num_owners, counts.tolist())
        keys = experts if owners is None else experts * num_owners + owners[:, None]
        keys, order = keys.flatten().sort(stable=True)
        return cls(order, keys, num_experts, num_owners)

    @property
    def has_many(self) -> bool:
        """So many for each expert that products cost their arithmetic, rather than reading weights."""
        return len(self.keys) >= _MANY_ROWS * self.num_experts

    @cached_property
    def counts(self) -> list[int]:
        """Of each expert's rows; asks the device."""
        if self.known_counts is not None:
            return self.known_counts
        counts: list[int] = torch.bincount(self.keys // self.num_owners, minlength=self.num_experts).tolist()
        return counts

    def chunks(self, num_rows: int, *, by_owner: bool) -> Tensor:
        """int32 [C, 3]: (start, stop, key) of up to `num_rows` neighbouring rows of one expert (`by_owner`:
        and of one owner), whose number the key then is. How many there may be is known, how many there are is
        not: key -1 where there are no more. Nothing is asked of the device."""
        keys = self.keys if by_owner else self.keys // self.num_owners
        num_keys = self.num_experts * (self.num_owners if by_owner else 1)
        num, device = len(keys), keys.device
        places = torch.arange(num, device=device)
        is_first = torch.ones(num, dtype=torch.bool, device=device)
        is_first[1:] = keys[1:] != keys[:-1]
        within = places - torch.where(is_first, places, 0).cummax(0).values
        chunk = (within % num_rows == 0).cumsum(0) - 1
        size = num // num_rows + min(num, num_keys)
        starts = torch.full((size,), num, device=device).scatter_reduce_(0, chunk, places, "amin")
        stops = torch.zeros(size, dtype=torch.int64, device=device).scatter_reduce_(
            0, chunk, places + 1, "amax"
        )
        found = torch.where(stops > 0, keys[starts.clamp(max=num - 1)], -1)
        return torch.stack((starts, stops, found), dim=1).int()


class ExpertLora(Protocol):
    """The adapters' part of one layer's experts; `owners` and `num_owners` as `GroupedRows.of` takes them."""

    owners: Tensor
    num_owners: int

    def add_to_routes_(self, logits: Tensor, x: Tensor) -> None:
        """logits: fp32 [T, experts], the router's of x [T, hidden]."""

    def add_(self, group: str, y: Tensor, x: Tensor, rows: GroupedRows) -> None:
        """`group`: "gate_up" or "down", whose product of x [P, in] y [P, out] is."""


def route(logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Which experts a token goes to, int64 [T, k], and with which weights, fp32 [T, k]: those with the
    largest softmax over all of them; the weights may then be made to add up to 1. logits: [T, E]."""
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights


class ExpertLinears:
    """A projection of every expert, weight [experts · out, in], perhaps as one of 8 or 4 `bits`, bias
    [experts, out] or None; called with rows in the order of experts."""

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        num_experts: int,
        bits: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self._gpu = self._weight = None
        self._bias = bias
        self.linears: list[Linear | QuantizedLinear] = []
        self._blocks: list[
            PackedBlocks
        ] = []  # of every expert, or none: those with biases have their own calls
        if bits is None and isinstance(weight, Tensor):
            self._gpu = gpu_kernels("experts", weight)
        if self._gpu is None:
            parts: Sequence[Tensor | QuantizedWeight] = weight.chunk(num_experts)
            self.linears = [
                linear(part, None if bias is None else bias[expert], bits)
                for expert, part in enumerate(parts)
            ]
            self.num_out = self.linears[0].num_out
            blocks = [each.blocks for each in self.linears if isinstance(each, Linear)]
            if bias is None and None not in blocks:
                self._blocks = [each for each in blocks if each is not None]
        else:
            assert isinstance(weight, Tensor)
            self._weight = weight.view(num_experts, weight.shape[0] // num_experts, -1)
            self.num_out = self._weight.shape[1]

    def __call__(self, x: Tensor, rows: GroupedRows) -> Tensor:
        if self._gpu is not None:
            y: Tensor = self._gpu.grouped_linear(x, self._weight, self._bias, rows)
            return y
        y, start = x.new_empty(x.shape[0], self.num_out), 0
        few: list[tuple[int, int, int]] = []
        for expert, count in enumerate(rows.counts):
            if not count:
                continue
            if self._blocks and count <= MAX_FEW_ROWS:
                few.append((start, count, self._blocks[expert].address))
            else:
                y[start : start + count] = self.linears[expert](x[start : start + count])
            start += count
        if few:  # all in one go: a call for each would cost as much again
            self._blocks[0].linear_groups(y, x.contiguous(), few)
        return y


@dataclass(frozen=True)
class Experts:
    """Called with x [T, hidden], returns [T, hidden] of x's dtype, summed in fp32 and rounded once."""

    router: Linear
    gate_up: ExpertLinears
    down: ExpertLinears
    activation: Activation
    top_k: int
    is_normalised: bool

    def __call__(self, x: Tensor, lora: ExpertLora | None = None) -> Tensor:
        logits = self.router(x, is_wide=True)
        if lora is not None:
            lora.add_to_routes_(logits, x)
        experts, weights = route(logits, self.top_k, is_normalised=self.is_normalised)
        owners, num_owners = (None, 1) if lora is None else (lora.owners, lora.num_owners)
        rows = GroupedRows.of(experts, self.router.num_out, owners, num_owners)
        out = self._feed_forward(x[rows.order // self.top_k], rows, lora)
        placed = torch.empty_like(out)
        placed[rows.order] = out
        parts = placed.view(x.shape[0], self.top_k, x.shape[1])
        return torch.bmm(weights[:, None], parts.float())[:, 0].to(x.dtype)

    def _feed_forward(self, x: Tensor, rows: GroupedRows, lora: ExpertLora | None) -> Tensor:
        gate_up = self.gate_up(x, rows)
        if lora is not None:
            lora.add_("gate_up", gate_up, x, rows)
        inner = self.activation(gate_up)
        down = self.down(inner, rows)
        if lora is not None:
            lora.add_("down", down, inner, rows)
        return down


def reference(
    x: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    top_k: int,
    *,
    is_normalised: bool,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """`Experts` token by token in fp32. router: [E, hidden]; gate_up: [E, 2 I, hidden];
    down: [E, hidden, I]; biases: of these three, [E], [E, 2 I] and [E, hidden]."""
    wide = x.float()
    of_router, of_gate_up, of_down = (
        (0.0 if bias is None else bias.float()) + torch.zeros(weight.shape[:-1], device=x.device)
        for weight, bias in zip((router, gate_up, down), biases or (None,) * 3, strict=True)
    )
    logits = wide @ router.float().T + of_router
    experts, weights = route(logits, top_k, is_normalised=is_normalised)
    out = torch.zeros_like(wide)
    for token, (chosen, shares) in enumerate(zip(experts.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            inner = activation((wide[token] @ gate_up[expert].float().T + of_gate_up[expert])[None])
            out[token] += share * (inner @ down[expert].float().T + of_down[expert])[0]
    return out.to(x.dtype)
