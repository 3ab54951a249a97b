"""Rounds in which every side answers every case, one after the other."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from peers.cases import CASES, Case, Competitor
from peers.running import SideFailed

Key = tuple[str, str, int]
"""Side, case and number of tokens."""


class Asked(Protocol):
    def ask(self, **question: Any) -> dict[str, Any]: ...


@dataclass
class Samples:
    """Seconds, answers' first tokens, and by side why it answers no more."""

    seconds: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_tokens: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def median_s(self, side: str, case: str, num_tokens: int) -> float | None:
        """Without the first, which warms up, where there are others; None where there is none."""
        times = self.seconds.get((side, case, num_tokens), [])
        return median(times[1:] or times) if times else None


@dataclass(frozen=True)
class Plan:
    """`patience_s`: what takes longer is measured once; `minutes`: no round begins that would end later."""

    adapters: Sequence[str]
    num_tokens: int
    rounds: int
    patience_s: float
    minutes: float
    cases: Mapping[str, Case] = field(default_factory=lambda: CASES)

    def questions(self) -> list[tuple[str, int]]:
        """Cases with their numbers of tokens: with one token a first token's time, with all the rest."""
        whole = [(case, self.num_tokens) for case in self.cases if case != "one_512"]
        return [("one", 1), ("one_512", 1), *whole]


def measure(
    sides: Mapping[str, Asked], limits: Asked, competitors: Mapping[str, Competitor], plan: Plan
) -> Samples:
    samples, started_at, longest_s = Samples(), time.monotonic(), 0.0
    for number in range(plan.rounds):
        round_started_at = time.monotonic()
        for name, value in limits.ask().items():
            samples.limits[name] = max(value, samples.limits.get(name, 0.0))
        for case, num_tokens in plan.questions():
            for name, side in sides.items():
                if case in competitors[name].cases and name not in samples.failures:
                    _ask(samples, side, (name, case, num_tokens), plan)
        now = time.monotonic()
        # The first round holds all that is measured once.
        longest_s = max(longest_s, now - round_started_at) if number else 0.0
        if now + longest_s > started_at + plan.minutes * 60:
            break
    return samples


def _ask(samples: Samples, side: Asked, key: Key, plan: Plan) -> None:
    name, case, num_tokens = key
    times = samples.seconds[key]
    if times and times[0] > plan.patience_s:
        return
    asked = plan.cases[case]
    adapters = list(plan.adapters) if asked.has_adapters else None
    try:
        answer = side.ask(prompts=asked.prompts(), num_tokens=num_tokens, adapters=adapters)
    except SideFailed as error:
        samples.failures[name] = str(error)
        return
    times.append(answer["seconds"])
    samples.first_tokens[name, case] = [tokens[0] for tokens in answer["tokens"]]
