"""When requests arrive: ascending instants in [0, duration_s), `rate` per second on average."""

from collections.abc import Callable
from functools import partial

import numpy as np

from toppings.sim.specs import parse_spec
from toppings.sim.trace import FloatArray

Arrivals = Callable[[float, float, np.random.Generator], FloatArray]

CODE_RATE = 2.57
CODE_ON_S, CODE_OFF_S = 8.11, 40.4
"""An interrupted Poisson process at 2.57/s: 15.4/s while on. Its gaps have CV 13.2 and its index of
dispersion is 13.2 / 84 / 155 at 1 / 10 / 60 s; the Azure LLM 2023 code trace has 13.2 and 13.2 / 72 / 164.
With s = 1/on + 1/off: I(T) = 1 + 2 on-rate / (on s^2) (1 - (1 - exp(-sT)) / sT), and CV^2 = I(infinity)."""

CONVERSATION_RATE = 5.53
CONVERSATION_TERMS = ((0.032, 1.0), (0.0473, 380.0))
"""Variance and correlation time (s) of the two Ornstein-Uhlenbeck terms of the log rate. At 5.53/s the
index of dispersion is 1.4 / 4 / 16 at 1 / 10 / 60 s; the Azure LLM 2023 conversation trace has 1.39 / 3.9 /
16."""
RATE_STEP_S = 0.1


def poisson(rate: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Index of dispersion 1 at every scale."""
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate * duration_s)))


def even(rate: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Evenly spaced within each second, as many in each as a steady rate gives: far less bursty than real
    load.
    """
    num_seconds = int(np.ceil(duration_s))
    counts = np.diff(np.floor(rate * np.arange(num_seconds + 1) + 1e-9)).astype(np.int64)
    seconds = np.repeat(np.arange(num_seconds), counts)
    index = np.arange(len(seconds)) - np.repeat(np.cumsum(counts) - counts, counts)
    instants: FloatArray = seconds + index / np.repeat(counts, counts)
    return instants[instants < duration_s]


def gamma(rate: float, duration_s: float, rng: np.random.Generator, *, cv: float) -> FloatArray:
    """A renewal process whose gaps are Gamma with coefficient of variation `cv`."""
    shape, instants, last = cv**-2, [], 0.0
    while last < duration_s:
        num = int(rate * (duration_s - last) * 1.1) + 100
        instants.append(last + np.cumsum(rng.gamma(shape, 1 / (rate * shape), num)))
        last = float(instants[-1][-1])
    joined = np.concatenate(instants)
    return joined[joined < duration_s]


def code(rate: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """On and off, gaps of CV 13 at any rate: other rates are the same process with time stretched."""
    stretch = CODE_RATE / rate
    on_s, off_s = CODE_ON_S * stretch, CODE_OFF_S * stretch
    share_on = on_s / (on_s + off_s)
    now = 0.0 if rng.random() < share_on else rng.exponential(off_s)
    starts, lengths = [], []
    while now < duration_s:
        starts.append(now)
        lengths.append(rng.exponential(on_s))
        now += lengths[-1] + rng.exponential(off_s)
    counts = rng.poisson(rate / share_on * np.array(lengths))
    instants = np.repeat(starts, counts) + rng.random(counts.sum()) * np.repeat(lengths, counts)
    return np.sort(instants[instants < duration_s])


def conversation(rate: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Poisson with a slowly varying lognormal rate. The excess of its dispersion over 1 grows with `rate`."""
    num = int(np.ceil(duration_s / RATE_STEP_S))
    log_rate = sum(
        _ornstein_uhlenbeck(variance, time_s, num, rng) - variance / 2
        for variance, time_s in CONVERSATION_TERMS
    )
    counts = rng.poisson(rate * RATE_STEP_S * np.exp(log_rate))
    instants = (np.repeat(np.arange(num), counts) + rng.random(counts.sum())) * RATE_STEP_S
    return np.sort(instants[instants < duration_s])


def _ornstein_uhlenbeck(variance: float, time_s: float, num: int, rng: np.random.Generator) -> FloatArray:
    """A stationary path [num] at steps of `RATE_STEP_S`."""
    decay = float(np.exp(-RATE_STEP_S / time_s))
    noise = rng.normal(0.0, np.sqrt(variance * (1 - decay**2)), num).tolist()
    value, path = float(rng.normal(0.0, np.sqrt(variance))), []
    for shock in noise:
        value = value * decay + shock
        path.append(value)
    return np.array(path)


ARRIVALS: dict[str, Callable[..., FloatArray]] = {
    "poisson": poisson,
    "even": even,
    "conversation": conversation,
    "code": code,
    "gamma": gamma,
}
PARAMETERS: dict[str, tuple[float | None, ...]] = {**dict.fromkeys(ARRIVALS, ()), "gamma": (None,)}


def make_arrivals(spec: str) -> Arrivals:
    """`poisson`, `even`, `conversation`, `code` or `gamma:CV`. Raises ValueError for anything else."""
    name, numbers = parse_spec(spec, PARAMETERS, kind="arrivals")
    return partial(gamma, cv=numbers[0]) if name == "gamma" else ARRIVALS[name]
