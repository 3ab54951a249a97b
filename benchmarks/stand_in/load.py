"""What is asked of the servers: arrivals, adapters with their ranks, lengths. One seed gives one load."""

import math
import random
from dataclasses import dataclass
from itertools import accumulate

from stand_in.server import Job
from toppings.cluster.snapshot import RequestSnapshot
from toppings.sim.synth.popularity import published
from toppings.sim.trace import Trace

RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 512
BYTES_PER_RANK = 101_000_000 / 64  # Llama-2-7B, q, k and v
MEAN_PROMPT, MAX_PROMPT = 70, 1000  # the mean is that of LMSYS chat
LENGTH_SIGMA = 0.9


@dataclass(frozen=True)
class Lengths:
    """Lognormal response tokens: the mean before they are cut at `max_response`."""

    mean_response: int
    max_response: int


@dataclass(frozen=True)
class Load:
    """`arrivals`: each request, its tokens and its instant in ms; `ranks` of every adapter that there is;
    `mean_response` is how many tokens policies expect.
    """

    arrivals: list[tuple[RequestSnapshot, int, float]]
    ranks: dict[str, int]
    mean_response: float

    def jobs(self) -> list[Job]:
        """The load as jobs that nobody has seen yet."""
        return [Job(*arrival) for arrival in self.arrivals]


def poisson_load(rate: float, duration_s: float, seed: int, lengths: Lengths) -> Load:
    """Poisson arrivals at `rate` requests/s; the adapters' ranks are dealt at random, the seed's own deal."""
    generator = random.Random(seed)
    ranks = {f"a{i}": generator.choice(RANKS) for i in range(NUM_ADAPTERS)}
    names, weights = list(ranks), list(accumulate(published(NUM_ADAPTERS).tolist()))
    arrivals: list[tuple[RequestSnapshot, int, float]] = []
    now = 0.0
    while (now := now + generator.expovariate(rate)) < duration_s:
        name = generator.choices(names, cum_weights=weights)[0]
        prompt_tokens = _draw_length(generator, MEAN_PROMPT, MAX_PROMPT)
        request = _request(len(arrivals), name, ranks[name], prompt_tokens, lengths.mean_response)
        num_tokens = _draw_length(generator, lengths.mean_response, lengths.max_response)
        arrivals.append((request, num_tokens, now * 1e3))
    return Load(arrivals, ranks, lengths.mean_response)


def trace_load(trace: Trace, rate: float, duration_s: float, seed: int) -> Load:
    """The trace stretched to `rate` requests/s, each seed a window of its own; all else is the trace's.

    Raises ValueError where it is too short for the seed's window.
    """
    scaled, stop_s = trace.scaled_to(rate), (seed + 1) * duration_s
    if scaled.duration_s < stop_s * (1 - 1e-9):
        raise ValueError(
            f"{trace.origin} lasts {scaled.duration_s:.1f} s at {rate:g} requests/s; {seed + 1} seeds of "
            f"{duration_s:g} s need {stop_s:g} s: take fewer seeds or a shorter duration"
        )
    window = scaled.between(seed * duration_s, stop_s)
    ranks = dict(zip(trace.adapter_names, trace.ranks.tolist()))
    mean_response = float(trace.response_tokens.mean())
    rows = zip(
        (trace.adapter_names[i] for i in window.adapters.tolist()),
        window.prompt_tokens.tolist(),
        window.response_tokens.tolist(),
        window.arrivals_s.tolist(),
    )
    arrivals = [
        (_request(i, name, ranks[name], prompt, mean_response), response, at * 1e3)
        for i, (name, prompt, response, at) in enumerate(rows)
    ]
    return Load(arrivals, ranks, mean_response)


def adapter_bytes(rank: int) -> int:
    return round(rank * BYTES_PER_RANK)


def _request(number: int, name: str, rank: int, prompt_tokens: int, mean_response: float) -> RequestSnapshot:
    return RequestSnapshot(
        request_id=str(number),
        adapter=name,
        rank=rank,
        prompt_tokens=prompt_tokens,
        response_tokens=float(mean_response),
        adapter_bytes=adapter_bytes(rank),
    )


def _draw_length(generator: random.Random, mean_tokens: int, max_tokens: int) -> int:
    mu = math.log(mean_tokens) - LENGTH_SIGMA**2 / 2
    return max(1, min(max_tokens, round(generator.lognormvariate(mu, LENGTH_SIGMA))))
