"""Which adapter a request is for."""

from collections.abc import Callable

import numpy as np

from toppings.sim.specs import parse_spec
from toppings.sim.trace import FloatArray, IntArray

DRIFT_SHARE = 0.1
"""Share of the adapters that exchange popularity at each step of a drift."""


def published(num: int) -> FloatArray:
    """p(i) ∝ exp(-8.6 x^0.58), x = (i - 0.5) / num: the curve of the published traces (128 to 512
    adapters).
    """
    return _normalized(np.exp(-8.6 * ((np.arange(num) + 0.5) / num) ** 0.58))


def zipf(num: int, exponent: float) -> FloatArray:
    """p(i) ∝ i^-exponent."""
    return _normalized(np.arange(1, num + 1, dtype=np.float64) ** -exponent)


def geometric(num: int, ratio: float) -> FloatArray:
    """p(i) ∝ ratio^-i, each adapter `ratio` times less popular than the one before."""
    return _normalized(ratio ** -np.arange(num, dtype=np.float64))


def uniform(num: int) -> FloatArray:
    return _normalized(np.ones(num))


def _normalized(weights: FloatArray) -> FloatArray:
    shares: FloatArray = weights / weights.sum()
    return shares


POPULARITIES: dict[str, Callable[..., FloatArray]] = {
    "published": published,
    "zipf": zipf,
    "geometric": geometric,
    "uniform": uniform,
}
PARAMETERS: dict[str, tuple[float | None, ...]] = {
    "published": (),
    "zipf": (1.0,),
    "geometric": (1.5,),
    "uniform": (),
}


def popularity(spec: str, num_adapters: int) -> FloatArray:
    """Shares [A] of the adapters, most popular first: `published`, `zipf:EXPONENT`, `geometric:RATIO`,
    `uniform`.

    Raises ValueError for anything else, or less than one adapter.
    """
    if num_adapters < 1:
        raise ValueError(f"num_adapters is {num_adapters}; it must be at least 1")
    name, numbers = parse_spec(spec, PARAMETERS, kind="popularity")
    return POPULARITIES[name](num_adapters, *numbers)


def draw_adapters(spec: str, num_adapters: int, num_requests: int, rng: np.random.Generator) -> IntArray:
    """The adapter of each request [N], independent draws; adapter 0 is the most popular."""
    cumulative = np.cumsum(popularity(spec, num_adapters))
    drawn = np.searchsorted(cumulative, rng.random(num_requests) * cumulative[-1], side="right")
    kept: IntArray = np.minimum(drawn, num_adapters - 1).astype(np.int32)
    return kept


def drift(
    adapters: IntArray, arrivals_s: FloatArray, num_adapters: int, every_s: float, rng: np.random.Generator
) -> IntArray:
    """The same draws, but every `every_s` seconds a tenth of the adapters exchange their popularity."""
    holders = np.arange(num_adapters, dtype=np.int32)  # which adapter has the i-th popularity now
    num_moved = max(2, round(DRIFT_SHARE * num_adapters))
    epochs = (arrivals_s // every_s).astype(np.int64)
    drifted = np.empty_like(adapters)
    for epoch in range(int(epochs.max(initial=-1)) + 1):
        first, last = np.searchsorted(epochs, [epoch, epoch + 1])
        drifted[first:last] = holders[adapters[first:last]]
        moved = rng.choice(num_adapters, min(num_moved, num_adapters), replace=False)
        holders[moved] = holders[np.roll(moved, 1)]
    return drifted
