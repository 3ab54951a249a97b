"""What a trace is like: rate, burstiness at several scales, lengths, popularity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toppings.lab.summary import percentiles
from toppings.sim.trace import FloatArray, Trace

WINDOWS_S = (1, 10, 60)
QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Lengths:
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, tokens: NDArray[np.int32]) -> "Lengths":
        return cls(float(tokens.mean()), *percentiles(tokens, QUANTILES))


@dataclass(frozen=True, slots=True)
class Description:
    """`gap_cv`: coefficient of variation of the gaps between arrivals. `dispersion`: by window in s,
    variance over mean of the arrivals per window (1: Poisson; None: fewer than two whole windows).
    `top_share`: part of the requests that the most popular 1 % and 10 % of the A adapters get.
    `rank_share`: part of each rank.
    """

    origin: str
    num_requests: int
    num_dropped: int
    duration_s: float
    rate: float
    gap_cv: float
    dispersion: dict[int, float | None]
    prompt_tokens: Lengths
    response_tokens: Lengths
    num_adapters: int
    num_adapters_used: int
    top_share: dict[int, float]
    rank_share: dict[int, float]


def describe(trace: Trace) -> Description:
    """Raises ValueError for a trace of fewer than two requests."""
    if len(trace) < 2:
        raise ValueError(f"{trace.origin} has {len(trace)} requests; describing needs at least 2")
    counts = popularity_counts(trace)
    gaps = np.diff(trace.arrivals_s)
    ranks, num_of_rank = np.unique(trace.ranks[trace.adapters], return_counts=True)
    return Description(
        origin=trace.origin,
        num_requests=len(trace),
        num_dropped=trace.num_dropped,
        duration_s=trace.duration_s,
        rate=trace.rate,
        gap_cv=float(gaps.std() / gaps.mean()) if gaps.any() else 0.0,
        dispersion={window: dispersion(trace.arrivals_s, window, trace.duration_s) for window in WINDOWS_S},
        prompt_tokens=Lengths.of(trace.prompt_tokens),
        response_tokens=Lengths.of(trace.response_tokens),
        num_adapters=len(counts),
        num_adapters_used=int(np.count_nonzero(counts)),
        top_share={percent: _top_share(counts, percent) for percent in (1, 10)},
        rank_share=dict(zip(ranks.tolist(), (num_of_rank / len(trace)).tolist())),
    )


def dispersion(arrivals_s: FloatArray, window_s: float, duration_s: float) -> float | None:
    """Variance over mean of the number of arrivals in each whole window of `window_s`."""
    counts = window_counts(arrivals_s, window_s, duration_s)
    if len(counts) < 2 or not counts.any():
        return None
    return float(counts.var() / counts.mean())


def window_counts(arrivals_s: FloatArray, window_s: float, duration_s: float) -> NDArray[np.int64]:
    """Arrivals in each whole window; what comes after the last one is left out."""
    num_windows = int(duration_s // window_s)
    windows = (arrivals_s // window_s).astype(np.int64)
    return np.bincount(windows[windows < num_windows], minlength=num_windows)


def popularity_counts(trace: Trace) -> NDArray[np.int64]:
    """Requests of each adapter [A], most popular first."""
    return np.sort(np.bincount(trace.adapters, minlength=len(trace.ranks)))[::-1]


def _top_share(counts: Sequence[int] | NDArray[np.int64], percent: int) -> float:
    num_top = max(1, round(len(counts) * percent / 100))
    return float(np.sum(counts[:num_top]) / np.sum(counts))
