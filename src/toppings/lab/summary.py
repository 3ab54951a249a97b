"""Latencies of a load in a few numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toppings.lab.outcome import Outcome

METRICS = ("ttft", "tpt", "e2e")


@dataclass(frozen=True)
class Latency:
    """Of one or more measured values, in ms."""

    mean_ms: float
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Latency | None":
        """None where there is no value."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return None
        return cls(sum(known) / len(known), percentile(known, 50), percentile(known, 99))

    def ratio_to(self, other: "Latency") -> dict[str, float]:
        return {name: value / getattr(other, f"{name}_ms") for name, value in self.named().items()}

    def named(self) -> dict[str, float]:
        return {"mean": self.mean_ms, "p50": self.p50_ms, "p99": self.p99_ms}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly between the two nearest."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class LoadSummary:
    """Latencies are those of requests that succeeded; `errors` counts the others by their reason.

    `total_s` is from the first request's sending to the last one's end, less pauses between parts of a load;
    `average_s` is the mean E2E.
    `num_cold`: requests that found their adapter not on the device, None where the server does not tell.
    """

    num_requests: int
    errors: dict[str, int]
    total_s: float
    average_s: float | None
    tokens_per_s: float
    mean_prompt_tokens: float | None
    ttft: Latency | None
    tpt: Latency | None
    e2e: Latency | None
    num_cold: int | None = None

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def latencies(self) -> dict[str, Latency | None]:
        return {name: getattr(self, name) for name in METRICS}

    def ratios_to(self, other: "LoadSummary") -> dict[str, dict[str, float]]:
        """Per metric, each latency over the other's; metrics that one of them has not are left out."""
        pairs = [(name, mine, other.latencies()[name]) for name, mine in self.latencies().items()]
        return {name: mine.ratio_to(theirs) for name, mine, theirs in pairs if mine and theirs}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def span_s(outcomes: Sequence[Outcome]) -> float:
    """From the first request's sending to the last one's end."""
    return max(o.sent_at + o.e2e_ms / 1e3 for o in outcomes) - min(o.sent_at for o in outcomes)


def summarize(
    outcomes: Sequence[Outcome], *, total_s: float | None = None, num_cold: int | None = None
) -> LoadSummary:
    """`total_s`: the sum over the parts of a load that was sent with pauses between them.

    Raises ValueError for no outcomes at all.
    """
    if not outcomes:
        raise ValueError("there are no outcomes to summarize")
    good = [o for o in outcomes if o.error is None]
    total_s = span_s(outcomes) if total_s is None else total_s
    prompts = [o.num_prompt_tokens for o in good if o.num_prompt_tokens is not None]
    e2e = Latency.of(o.e2e_ms for o in good)
    return LoadSummary(
        num_requests=len(outcomes),
        errors=dict(Counter(o.error for o in outcomes if o.error is not None)),
        total_s=total_s,
        average_s=e2e.mean_ms / 1e3 if e2e else None,
        tokens_per_s=sum(o.num_tokens for o in good) / total_s,
        mean_prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        ttft=Latency.of(o.ttft_ms for o in good),
        tpt=Latency.of(o.tpt_ms for o in good),
        e2e=e2e,
        num_cold=num_cold,
    )
