"""What is asked of the servers: a trace, each seed with its own. Arrivals, adapters with ranks, lengths."""

import math
import random
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

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
    """`mean_response` is how many tokens policies expect."""

    trace: Trace
    mean_response: float

    @property
    def ranks(self) -> dict[str, int]:
        """Of every adapter that there is."""
        return dict(zip(self.trace.adapter_names, self.trace.ranks.tolist()))

    def jobs(self) -> list[Job]:
        """The load as jobs that nobody has seen yet; instants in ms."""
        names, ranks = self.trace.adapter_names, self.trace.ranks.tolist()
        rows = zip(
            self.trace.adapters.tolist(),
            self.trace.prompt_tokens.tolist(),
            self.trace.response_tokens.tolist(),
            self.trace.arrivals_s.tolist(),
        )
        return [
            Job(
                RequestSnapshot(
                    request_id=str(number),
                    adapter=names[adapter],
                    rank=ranks[adapter],
                    prompt_tokens=prompt_tokens,
                    response_tokens=self.mean_response,
                    adapter_bytes=adapter_bytes(ranks[adapter]),
                ),
                num_tokens,
                at * 1e3,
            )
            for number, (adapter, prompt_tokens, num_tokens, at) in enumerate(rows)
        ]


def poisson_load(rate: float, duration_s: float, seed: int, lengths: Lengths) -> Load:
    """Poisson arrivals at `rate` requests/s; the adapters' ranks are dealt at random, the seed's own deal."""
    generator = random.Random(seed)
    ranks = [generator.choice(RANKS) for _ in range(NUM_ADAPTERS)]
    weights = list(accumulate(published(NUM_ADAPTERS).tolist()))
    rows: list[tuple[int, int, int, float]] = []
    now = 0.0
    while (now := now + generator.expovariate(rate)) < duration_s:
        [adapter] = generator.choices(range(NUM_ADAPTERS), cum_weights=weights)
        prompt_tokens = _draw_length(generator, MEAN_PROMPT, MAX_PROMPT)
        num_tokens = _draw_length(generator, lengths.mean_response, lengths.max_response)
        rows.append((adapter, prompt_tokens, num_tokens, now))
    adapters, prompts, responses, arrivals = np.array(rows).reshape(-1, 4).T
    trace = Trace(
        arrivals,
        adapters.astype(np.int32),
        prompts.astype(np.int32),
        responses.astype(np.int32),
        np.array(ranks, dtype=np.int32),
        duration_s,
        origin="Poisson",
        names=tuple(f"a{i}" for i in range(NUM_ADAPTERS)),
    )
    return Load(trace, float(lengths.mean_response))


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
    return Load(scaled.between(seed * duration_s, stop_s), float(trace.response_tokens.mean()))


def adapter_bytes(rank: int) -> int:
    return round(rank * BYTES_PER_RANK)


def _draw_length(generator: random.Random, mean_tokens: int, max_tokens: int) -> int:
    mu = math.log(mean_tokens) - LENGTH_SIGMA**2 / 2
    return max(1, min(max_tokens, round(generator.lognormvariate(mu, LENGTH_SIGMA))))
