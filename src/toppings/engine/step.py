"""A step that was started, and who runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from toppings.core import Batch, BatchItem, Request
from toppings.engine.model_runner import StepInFlight


class Runner(Protocol):
    """A `ModelRunner`, or the lead of several."""

    def start(self, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight: ...

    def can_run_ahead(self, requests: Sequence[Request]) -> bool: ...

    def forget(self, request: Request) -> None: ...


class Followers(Protocol):
    """The other processes of a split model (parallel.py)."""

    def check(self) -> None:
        """Raises FollowerLostError where one has ended."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Step:
    """`read_out`: items with which a prompt is read to its end, and nothing is to be drawn; `record`: what
    the step log says of its batch."""

    batch: Batch
    read_out: list[BatchItem]
    flight: StepInFlight
    started_at: float
    num_prompt_tokens: int
    record: dict[str, object]
