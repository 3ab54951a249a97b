"""The next tokens of a step's logits: queued as they are asked for, waited for when they are needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toppings.engine.staging import Staging
from toppings.ops.device_sampling import SamplingPlan, draw, to_output
from toppings.ops.sampling import SampleOutput, SamplingRow, sample


@dataclass(frozen=True, slots=True)
class Drawing:
    """A token for each of some rows. `token_ids`: int64 [R], on the model's device, in the order of its
    stream; `wait` gives them to the host, when they are there, as often as it is asked."""

    token_ids: Tensor
    wait: Callable[[], SampleOutput]


Sampler = Callable[[Tensor, list[SamplingRow]], Drawing]
"""Draws a token per row of logits [R, vocab], as `ops.sampling.sample` does."""


def draw_on_host(logits: Tensor, rows: list[SamplingRow]) -> Drawing:
    drawn = sample(logits, rows)
    return Drawing(torch.tensor(drawn.token_ids, dtype=torch.int64), lambda: drawn)


class DeviceSampler:
    """Draws on a GPU: one copy there, one back. `cuda`: the `torch.cuda` module, or a fake."""

    def __init__(self, staging: Staging, cuda: Any) -> None:
        self._staging = staging
        self._cuda = cuda

    def __call__(self, logits: Tensor, rows: list[SamplingRow]) -> Drawing:
        if not rows:
            return Drawing(torch.empty(0, dtype=torch.int64), lambda: SampleOutput([]))
        plan = SamplingPlan.of(rows, logits.shape[1])
        drawn = draw(logits, plan, self._staging.bring(plan.arrays))
        on_host = [part.to("cpu", non_blocking=True) for part in drawn]  # into page-locked memory
        copied = self._cuda.Event()
        copied.record()

        @cache
        def wait() -> SampleOutput:
            copied.synchronize()
            return to_output(plan, rows, on_host)

        return Drawing(drawn[0], wait)
