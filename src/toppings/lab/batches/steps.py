"""Timed steps of batches: what to measure, the rounds in which it is measured, what came out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import msgspec
from numpy.random import Generator

from toppings.cluster.fitting import MIN_OBSERVATIONS, Observation, hold_out
from toppings.cluster.perf_model import FEATURES, PerfModel, batch_features
from toppings.lab.batches.plan import Rows
from toppings.synth import AdapterShape

MAX_ROUNDS = 10
MAX_SECONDS = 240.0

OnProgress = Callable[[str, float], None]
"""Called with what is going on, and what share of it is done."""


@dataclass(frozen=True)
class BatchSpec:
    """What to measure: adapters of these ranks and projections, for so many seconds at most.

    Making adapters and building the engine come on top. Where too few steps for a fit are timed by then, it
    goes on, but not beyond `MAX_SECONDS`.
    """

    seconds: float = 90.0
    ranks: tuple[int, ...] = AdapterShape.ranks
    targets: tuple[str, ...] = AdapterShape.targets

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ValueError(f"seconds is {self.seconds:g}; it must be above 0, at most {MAX_SECONDS:g}")

    @property
    def adapters(self) -> AdapterShape:
        """Raises ConfigError for ranks or projections that are none."""
        return AdapterShape(ranks=self.ranks, targets=self.targets)


@dataclass(frozen=True)
class BatchProfile:
    """A fitted model, the steps it was fitted to and judged on, and the seed that parted them."""

    model: PerfModel
    decode: list[Observation]
    prefill: list[Observation]
    seed: int

    def held_out(self, steps: list[Observation]) -> set[int]:
        """Indices of those of `decode` or `prefill` that the model was judged on."""
        return set(hold_out(len(steps), seed=self.seed)[1].tolist())

    def to_json(self) -> dict[str, Any]:
        """The model's own JSON, which readers of models take, with the steps beside it."""
        steps = {"decode": self._rows(self.decode), "prefill": self._rows(self.prefill)}
        return {**msgspec.to_builtins(self.model), "step_features": FEATURES, "steps": steps}

    def _rows(self, steps: list[Observation]) -> list[dict[str, Any]]:
        held_out = self.held_out(steps)
        return [
            {"features": batch_features(s.rows).tolist(), "ms": round(s.ms, 4), "is_held_out": i in held_out}
            for i, s in enumerate(steps)
        ]


class StepTimes:
    """Batches of one kind, and what their steps have taken so far; `time_ms` runs one and says how long."""

    def __init__(self, batches: Sequence[Rows], time_ms: Callable[[Rows], list[float]]) -> None:
        self._batches, self._time_ms = batches, time_ms
        self._times: list[list[float]] = [[] for _ in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def take(self, index: int) -> None:
        self._times[index] += self._time_ms(self._batches[index])

    @property
    def is_enough(self) -> bool:
        return sum(map(bool, self._times)) >= MIN_OBSERVATIONS

    def observations(self) -> list[Observation]:
        """The median of each batch that was timed; of two in the middle the lower, which fewer disturbed."""
        timed = zip(self._batches, self._times, strict=True)
        return [Observation(rows, median_low(ms)) for rows, ms in timed if ms]


def take_rounds(
    kinds: Sequence[StepTimes],
    seconds: float,
    rng: Generator,
    on_progress: OnProgress,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Every batch once a round, all kinds mixed, in an order drawn anew for each round: a machine that
    becomes slower or faster meanwhile then does so for no feature alone. How many rounds were begun."""
    visits = [(kind, index) for kind in kinds for index in range(len(kind))]
    started_at = clock()
    for num_rounds in range(1, MAX_ROUNDS + 1):
        for number in rng.permutation(len(visits)):
            elapsed = clock() - started_at
            is_late = elapsed > seconds and all(kind.is_enough for kind in kinds)
            if is_late or elapsed > MAX_SECONDS:
                return num_rounds
            on_progress("timing steps", elapsed / seconds)
            kind, index = visits[number]
            kind.take(index)
    return MAX_ROUNDS
