"""What a step tells of its prompts' tokens beside what it draws: how likely each was, and embeddings.

Logits of prompt rows are made and read some rows at a time, so that those of a whole prompt never exist at
once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toppings.core import BatchItem
from toppings.engine.staging import Array, Staging
from toppings.messages import PromptLogprobs
from toppings.model.config import ModelConfig
from toppings.ops.truncation import likeliest
from toppings.sampling_params import Pooling

CHUNK_LOGITS = 2**22
"""Logits of prompt rows that exist at once, fp32."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a step has told of one prompt. `start`: the place of its first token there.

    `logprobs`, `ranks` [P], `top_ids`, `top_logprobs` [P, k] as in `PromptLogprobs`, of the tokens behind the
    rows that were scored; `total`: the sum of pooled hidden states, float32 [hidden], or None.
    """

    start: int
    logprobs: Array
    ranks: Array
    top_ids: Array
    top_logprobs: Array
    total: Array | None


@dataclass(slots=True)
class PromptNotes:
    """What was told of a prompt so far. One that is computed again, from its beginning, is noted anew."""

    readings: list[Reading] = field(default_factory=list)

    def add(self, reading: Reading) -> None:
        if reading.start == 0:
            self.readings.clear()
        self.readings.append(reading)

    def logprobs(self, num_top: int) -> PromptLogprobs:
        """The best `num_top` alternatives, of more that a step may have told; of nothing, if it has one token
        only."""
        if not self.readings:
            return PromptLogprobs(num_top, b"", b"", b"", b"")
        top_ids = np.concatenate([r.top_ids[:, :num_top] for r in self.readings])
        return PromptLogprobs(
            top_ids.shape[1],
            np.concatenate([r.logprobs for r in self.readings]).tobytes(),
            np.concatenate([r.ranks for r in self.readings]).tobytes(),
            top_ids.tobytes(),
            np.concatenate([r.top_logprobs[:, :num_top] for r in self.readings]).tobytes(),
        )

    def embedding(self) -> bytes:
        """The pooled hidden states' direction: a mean's is that of the sum."""
        total = np.sum([r.total for r in self.readings if r.total is not None], axis=0, dtype=np.float64)
        length = np.linalg.norm(total)
        return bytes((total / (length or 1.0)).astype(np.float32).tobytes())


@dataclass(frozen=True)
class ReadingPlan:
    """What of a step is read. `rows` of the step: those to be scored, then those to be pooled; `targets`:
    int64, the token behind each row that is scored. By item, `starts` its first token's place in the prompt,
    `scored` its part of `targets`, `pooled` its part of `rows`."""

    rows: list[int]
    targets: Array
    num_top: int
    request_ids: list[str]
    starts: list[int]
    scored: list[slice]
    pooled: list[slice]

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> "ReadingPlan | None":
        """None where nothing is to be read."""
        read = [(item, end) for item, end in _ends(items) if item.request.sampling.reads_prompt]
        targets = [item.request.scored_token_ids(item.num_tokens) for item, _ in read]
        num_pooled = [_num_pooled(item) for item, _ in read]
        if not any(targets) and not any(num_pooled):
            return None
        scored = [
            list(range(end - i.num_tokens, end))[: len(t)] for (i, end), t in zip(read, targets, strict=True)
        ]
        pooled = [range(end - num, end) for (_, end), num in zip(read, num_pooled, strict=True)]
        num_scored = sum(map(len, targets))
        return cls(
            rows=[*chain(*scored), *chain(*pooled)],
            targets=np.array([*chain(*targets)], np.int64),
            num_top=max(item.request.sampling.prompt_logprobs or 0 for item, _ in read),
            request_ids=[item.request.request_id for item, _ in read],
            starts=[item.request.num_computed_tokens for item, _ in read],
            scored=_slices(map(len, targets), 0),
            pooled=_slices(num_pooled, num_scored),
        )


def _ends(items: Sequence[BatchItem]) -> Iterator[tuple[BatchItem, int]]:
    """With the row of the step behind each item's last."""
    return zip(items, accumulate(item.num_rows for item in items), strict=True)


def _slices(lengths: Iterable[int], start: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=start))]


def _num_pooled(item: BatchItem) -> int:
    """Rows, up to the last, whose hidden states are added up."""
    pooling = item.request.sampling.pooling
    if pooling == Pooling.MEAN:
        return item.num_tokens
    return int(pooling == Pooling.LAST and item.is_last)


class Head(Protocol):
    """The part of a decoder that makes logits."""

    @property
    def config(self) -> ModelConfig: ...

    def logits(self, hidden: Tensor, start: int = 0) -> Tensor:
        """`start`: which row of all that are read comes first."""


def score(head: Head, hidden: Tensor, targets: Tensor, num_top: int) -> list[Tensor]:
    """Of the token `targets` [P] behind each row of hidden [P, h]: log-probabilities, fp32 [P]; ranks,
    int32 [P]; the likeliest tokens, int32 [P, k], and their log-probabilities, fp32 [P, k].

    Logarithm of softmax: logit - log Σ exp(logits).
    """
    num_rows, num_top = len(targets), min(num_top, head.config.vocab_size)
    size = max(1, CHUNK_LOGITS // head.config.vocab_size)
    logprobs, ranks = hidden.new_empty(num_rows, dtype=torch.float32), targets.int()
    top_ids, top_logprobs = targets.new_empty(num_rows, num_top), logprobs.new_empty(num_rows, num_top)
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        logits = head.logits(hidden[rows], start)
        scale = logits.logsumexp(-1, keepdim=True)
        values = logits.gather(1, targets[rows, None])
        logprobs[rows], ranks[rows] = (values - scale)[:, 0], (logits > values).sum(-1) + 1
        best, top_ids[rows] = likeliest(logits, num_top)
        top_logprobs[rows] = best - scale
    return [logprobs, ranks, top_ids.int(), top_logprobs]


def _read(head: Head, hidden: Tensor, plan: ReadingPlan, targets: Tensor) -> list[Tensor]:
    """What `score` gives, and fp32 [items, h]: the sums of pooled rows. hidden: the plan's rows."""
    sums = [hidden[part].float().sum(0) for part in plan.pooled]
    return [*score(head, hidden[: len(targets)], targets, plan.num_top), torch.stack(sums)]


def _readings(plan: ReadingPlan, parts: Sequence[Tensor]) -> dict[str, Reading]:
    """By request id. `parts`: what `_read` gave, in host memory."""
    logprobs, ranks, top_ids, top_logprobs, sums = (part.numpy() for part in parts)
    spans = zip(plan.request_ids, plan.starts, plan.scored, plan.pooled, sums, strict=True)
    return {
        request_id: Reading(
            start,
            logprobs[scored],
            ranks[scored],
            top_ids[scored],
            top_logprobs[scored],
            total if pooled.stop > pooled.start else None,
        )
        for request_id, start, scored, pooled, total in spans
    }


Readings = Callable[[], dict[str, Reading]]
"""Waits for what was read of a step, by request id; may be asked as often as one likes."""
Reader = Callable[[Head, Tensor, ReadingPlan], Readings]
"""Queues the reading of hidden [rows, h], final hidden states of a plan's rows."""


def read_nothing() -> dict[str, Reading]:
    return {}


def read_on_host(head: Head, hidden: Tensor, plan: ReadingPlan) -> Readings:
    found = _readings(plan, _read(head, hidden, plan, torch.from_numpy(plan.targets)))
    return lambda: found


class DeviceReader:
    """Reads on a GPU: one copy there, results copied back without a wait. `cuda`: the `torch.cuda` module, or
    a fake."""

    def __init__(self, staging: Staging, cuda: Any) -> None:
        self._staging = staging
        self._cuda = cuda

    def __call__(self, head: Head, hidden: Tensor, plan: ReadingPlan) -> Readings:
        (targets,) = self._staging.bring([plan.targets])
        on_host = [part.to("cpu", non_blocking=True) for part in _read(head, hidden, plan, targets)]
        copied = self._cuda.Event()
        copied.record()

        @cache
        def wait() -> dict[str, Reading]:
            copied.synchronize()
            return _readings(plan, on_host)

        return wait
