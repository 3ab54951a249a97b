"""Latencies in a few numbers: the same ones, and numpy's percentiles, whoever played the requests."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.lab.outcome import Outcome

METRICS = ("ttft", "tpt", "e2e")

FloatArray = NDArray[np.float64]
Values = NDArray[Any] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Stats:
    """Of values of any unit; NaN where there are none."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Values) -> "Stats":
        known = np.asarray(values, dtype=np.float64)
        if not known.size:
            return cls(float("nan"), float("nan"), float("nan"))
        return cls(float(known.mean()), *percentiles(known, (50, 99)))

    def named(self) -> dict[str, float]:
        return asdict(self)

    def ratio_to(self, other: "Stats") -> dict[str, float]:
        return {name: value / getattr(other, name) for name, value in self.named().items()}


def percentiles(values: Values, percents: Sequence[float]) -> list[float]:
    """Of one or more values, interpolated linearly between the two nearest."""
    found: list[float] = np.percentile(values, percents).tolist()
    return found


@dataclass(frozen=True, eq=False)
class Latencies:
    """Of the requests that were served, float64 [N], ms: until the first token, per generated token, until
    the end. Where a server does not tell the tokens of all, `ttft` and `tpt` are shorter."""

    ttft: FloatArray
    tpt: FloatArray
    e2e: FloatArray

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Latencies":
        good = [outcome for outcome in outcomes if outcome.error is None]
        return cls(
            _known(outcome.ttft_ms for outcome in good),
            _known(outcome.tpt_ms for outcome in good),
            _known(outcome.e2e_ms for outcome in good),
        )

    def named(self) -> dict[str, FloatArray]:
        return {name: getattr(self, name) for name in METRICS}

    def stats(self) -> dict[str, Stats]:
        return {name: Stats.of(values) for name, values in self.named().items()}


def _known(values: Iterable[float | None]) -> FloatArray:
    return np.array([value for value in values if value is not None], dtype=np.float64)


@dataclass(frozen=True)
class LoadSummary:
    """Latencies are those of requests that succeeded, None where none did; `errors` counts the others by
    their reason.

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
    ttft: Stats | None
    tpt: Stats | None
    e2e: Stats | None
    num_cold: int | None = None

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def latencies(self) -> dict[str, Stats | None]:
        return {name: getattr(self, name) for name in METRICS}

    def ratios_to(self, other: "LoadSummary") -> dict[str, dict[str, float]]:
        """Per metric, each latency over the other's; metrics that one of them has not are left out."""
        pairs = [(name, mine, other.latencies()[name]) for name, mine in self.latencies().items()]
        return {name: mine.ratio_to(theirs) for name, mine, theirs in pairs if mine and theirs}

    def to_json(self) -> dict[str, Any]:
        latencies = {
            name: stats and {f"{kind}_ms": ms for kind, ms in stats.named().items()}
            for name, stats in self.latencies().items()
        }
        return {**asdict(self), **latencies}


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
    latencies = {
        name: Stats.of(values) if values.size else None
        for name, values in Latencies.of(outcomes).named().items()
    }
    e2e = latencies["e2e"]
    return LoadSummary(
        num_requests=len(outcomes),
        errors=dict(Counter(o.error for o in outcomes if o.error is not None)),
        total_s=total_s,
        average_s=e2e.mean / 1e3 if e2e else None,
        tokens_per_s=sum(o.num_tokens for o in good) / total_s,
        mean_prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        num_cold=num_cold,
        **latencies,
    )
