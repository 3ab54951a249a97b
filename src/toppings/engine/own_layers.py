"""What adapters of a step have of their own outside the projections: the decoder's `OwnLayers`.

Each adapter's rows are computed once more with its own embedding, norms or output layer, by torch's operators
on any device; rows of other adapters are not touched. What has not landed is waited for, whatever the mode:
it decides what goes into the layer, so that the CPU could not begin without it, and it is one row of products
or less.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import EMBED, HEAD, NORM, TIED
from toppings.adapters.loader import LoadHandle
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder, RmsNorm
from toppings.ops.columns import adjust_rows_
from toppings.ops.linear import Linear
from toppings.ops.lora import LoraSegments, lora_expand_add_, lora_shrink
from toppings.ops.products import Forms
from toppings.ops.rope import HeadNorm

Run = tuple[slice, int]
"""Neighbouring rows of one adapter, and its slot."""

_WHERE_IT_LIES = Forms(is_packed=False, max_stream_rows=32)


class OwnLayers:
    """Of one step. `rows`: those of the step whose logits are wanted; `loads`: of its adapters, by slot."""

    def __init__(
        self, pool: DevicePool, segments: LoraSegments, rows: Sequence[int], loads: dict[int, LoadHandle]
    ) -> None:
        self._pool = pool
        self._runs = [
            (slice(start, stop), slot) for start, stop, slot in segments.adapted if pool.has_outer([slot])
        ]
        self._wanted = _runs_of(self._runs, rows)
        self._loads = [loads[slot] for slot in {slot for _, slot in self._runs} if slot in loads]
        self.wait_s = 0.0
        self._num_tokens = {slot: pool.num_tokens_of(slot) for _, slot in self._runs}

    def embed(self, token_ids: Tensor, x: Tensor) -> None:
        """token_ids: int64 [T]; x: [T, hidden], the base model's embedding of them."""
        self._await(0)
        for rows, slot in self._runs:
            ids = token_ids[rows]
            if (weight := self._find(slot, 0, f"{EMBED}.weight")) is not None:
                x[rows] = functional.embedding(ids, weight)
            if (trained := self._find(slot, 0, f"{EMBED}.rows")) is not None:
                places, is_trained = self._places(slot, 0, EMBED, ids)
                x[rows] = torch.where(is_trained[:, None], trained[places], x[rows])
            if (b := self._find(slot, 0, f"{EMBED}.B")) is not None:
                a = self._find(slot, 0, f"{EMBED}.A")
                assert a is not None
                adjust_rows_(x[rows], self._find(slot, 0, f"{EMBED}.gain"), None)
                lora_expand_add_(x[rows], functional.embedding(ids, a), b)

    def norm(self, layer: int, name: str, source: Tensor, x: Tensor, norm: RmsNorm) -> None:
        """x: [T, hidden], the base model's norm of `source`."""
        self._await(layer)
        self._norm(self._runs, layer, name, source, x, norm)

    def last_norm(self, source: Tensor, x: Tensor, norm: RmsNorm) -> None:
        """`norm`, of the rows that are wanted."""
        last = self._pool.num_layers - 1
        self._await(last)
        self._norm(self._wanted, last, NORM, source, x, norm)

    def head_norms(self, layer: int, num_rows: int, base: HeadNorm) -> list[tuple[slice, HeadNorm]]:
        """Whose queries' and keys' norms are whose: all rows, cut where they change."""
        own = []
        for rows, slot in self._runs:
            q, k = (self._find(slot, layer, name) for name in ("q_norm", "k_norm"))
            if q is not None or k is not None:
                norm = replace(base, q=base.q if q is None else q, k=base.k if k is None else k)
                own.append((rows, norm))
        cut, done = [], 0
        for rows, norm in own:
            cut += [(slice(done, rows.start), base), (rows, norm)]
            done = rows.stop
        return [
            (rows, norm) for rows, norm in [*cut, (slice(done, num_rows), base)] if rows.stop > rows.start
        ]

    def change_logits(self, hidden: Tensor, logits: Tensor, first: int) -> Tensor:
        """The logits with the adapters' own: wider than the base model's, where one has more tokens.

        hidden [R, hidden] are the wanted rows from `first` on, logits fp32 [R, vocab] the base model's
        product, which is changed.
        """
        last = self._pool.num_layers - 1
        self._await(last)
        num_base = logits.shape[1]
        if (num_more := max(self._num_tokens.values(), default=0) - num_base) > 0:
            logits = functional.pad(logits, (0, num_more))
        for rows, slot in self._among(first, hidden.shape[0]):
            num_tokens = self._num_tokens[slot] or num_base
            self._change_logits(slot, last, hidden[rows], logits[rows, :num_tokens])
        return logits

    def hide_others_(self, logits: Tensor, num_base: int, first: int) -> None:
        """Of finished logits as `change_logits` made them: no row has tokens beyond its adapter's."""
        if logits.shape[1] == num_base:
            return
        done = 0
        for rows, slot in self._among(first, logits.shape[0]):
            logits[done : rows.start, num_base:] = -torch.inf
            logits[rows, self._num_tokens[slot] or num_base :] = -torch.inf
            done = rows.stop
        logits[done:, num_base:] = -torch.inf

    def _among(self, first: int, num_rows: int) -> list[Run]:
        """Of the wanted rows those from `first` on, as many as there are: whose they are."""
        cut = [
            (slice(max(0, rows.start - first), min(num_rows, rows.stop - first)), slot)
            for rows, slot in self._wanted
        ]
        return [(rows, slot) for rows, slot in cut if rows.stop > rows.start]

    def _change_logits(self, slot: int, last: int, hidden: Tensor, logits: Tensor) -> None:
        is_tied = self._find(slot, last, TIED) is not None
        layer, name = (0, EMBED) if is_tied else (last, HEAD)
        if (weight := self._find(slot, layer, f"{name}.weight")) is not None:
            logits.copy_(_product(hidden, weight))
        if (trained := self._find(slot, layer, f"{name}.rows")) is not None:
            logits.index_copy_(1, self._ids(slot, layer, name).long(), _product(hidden, trained))
        gain, offset, a, b = (
            self._find(slot, last, f"{HEAD}.{part}") for part in ("gain", "offset", "A", "B")
        )
        adjust_rows_(logits, gain, offset)
        if a is not None and b is not None:
            logits += _product(lora_shrink(hidden, a).to(b.dtype), b.t())

    def _norm(
        self, runs: Sequence[Run], layer: int, name: str, source: Tensor, x: Tensor, norm: RmsNorm
    ) -> None:
        for rows, slot in runs:
            if (weight := self._find(slot, layer, name)) is not None:
                x[rows] = replace(norm, weight=weight)(source[rows])

    def _find(self, slot: int, layer: int, name: str) -> Tensor | None:
        return self._pool.find_extra(slot, layer, name)

    def _ids(self, slot: int, layer: int, name: str) -> Tensor:
        ids = self._find(slot, layer, f"{name}.ids")
        assert ids is not None
        return ids.view(torch.int32)

    def _places(self, slot: int, layer: int, name: str, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where among the trained tokens each one would be, and whether it is there."""
        ids = self._ids(slot, layer, name).to(token_ids.dtype)
        places = torch.searchsorted(ids, token_ids).clamp_(max=len(ids) - 1)
        return places, ids[places] == token_ids

    def _await(self, layer: int) -> None:
        started_at = time.perf_counter()
        for load in self._loads:
            load.wait(layer)
        self.wait_s += time.perf_counter() - started_at


@dataclass(frozen=True)
class OwnHead:
    """A decoder's output layer with the adapters' own; its rows are the wanted ones from `first` on."""

    decoder: Decoder
    own: OwnLayers
    first: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def logits(self, hidden: Tensor, start: int = 0) -> Tensor:
        """fp32 [R, vocab], as wide as the largest vocabulary of the step; `start`: which of the head's rows
        comes first."""
        base, first = self.decoder.head(hidden), self.first + start
        logits = self.decoder.finish_logits_(self.own.change_logits(hidden, base, first))
        self.own.hide_others_(logits, base.shape[1], first)
        return logits


def _runs_of(runs: Sequence[Run], rows: Sequence[int]) -> list[Run]:
    """Runs of places among `rows` that belong to the adapters of `runs`."""
    slots = [next((slot for run, slot in runs if run.start <= row < run.stop), -1) for row in rows]
    edges = [0]
    for _, group in groupby(slots):
        edges.append(edges[-1] + len(list(group)))
    return [(slice(low, high), slots[low]) for low, high in pairwise(edges) if slots[low] >= 0]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in fp32: x [n, in], weight [out, in], which is not packed for one step."""
    if not weight.is_contiguous():
        return torch.mm(x.float(), weight.t().float())
    return Linear(weight, forms=_WHERE_IT_LIES)(x, is_wide=True)
