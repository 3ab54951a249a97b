"""What is sent and when. The same seed gives the same load; as calls, with prompts, or as a trace without."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from toppings.bad_input import RequestError
from toppings.config import setting
from toppings.lab.outcome import PlannedCall
from toppings.sim.seeds import generator
from toppings.sim.synth.popularity import popularity
from toppings.sim.trace import FloatArray, IntArray, Trace

POPULARITIES = ("in_turn", "uniform", "published")
PROMPT_FORMS = ("ids", "text")
PROMPT_IDS = range(3, 256)
"""Token ids that every vocabulary has."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """`rps` 0: one request after another, else Poisson arrivals at this rate (requests a second).

    `popularity`: which adapter a request names: `in_turn` (each once before any comes again), `uniform`, or
    `published`, the curve that fits the published LoRA traces.
    `prompt_form` `ids` sends exactly `prompt_tokens` token ids, `text` as many words.

    Raises RequestError for a value out of range.
    """

    num_requests: int = setting(60, "how many, after the warm-up")
    rps: float = setting(0.0, "Poisson arrivals a second (0: one request after another)")
    prompt_tokens: int = setting(64, "tokens of a prompt")
    max_tokens: int = setting(16, "tokens to generate")
    popularity: str = setting("in_turn", "of the adapters", choices=POPULARITIES)
    prompt_form: str = "ids"
    seed: int = setting(0, "seed of prompts and arrivals")

    def __post_init__(self) -> None:
        for name in ("num_requests", "prompt_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.rps) and self.rps >= 0):
            raise RequestError(f"rps is {self.rps}; it must be at least 0")
        for name, choices in (("popularity", POPULARITIES), ("prompt_form", PROMPT_FORMS)):
            if getattr(self, name) not in choices:
                raise RequestError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    def one_after_another(self, num_requests: int) -> "LoadShape":
        return replace(self, num_requests=num_requests, rps=0.0)

    def make_trace(self, adapters: Sequence[str], *, first: int = 0) -> Trace:
        """Taken in turn, adapters begin with number `first` modulo all; their ranks are not known: 0."""
        rng, num = generator(abs(self.seed), f"load {self.seed} {first}"), self.num_requests
        arrivals_s = poisson_arrivals(num, self.rps, rng) if self.rps else np.zeros(num)
        return Trace(
            arrivals_s,
            self._choose_adapters(len(adapters), first, rng),
            np.full(num, self.prompt_tokens, dtype=np.int32),
            np.full(num, self.max_tokens, dtype=np.int32),
            np.zeros(len(adapters), dtype=np.int32),
            duration_s=max(float(arrivals_s[-1]), 1e-9),
            origin="load",
            names=tuple(adapters),
        )

    def _choose_adapters(self, num_adapters: int, first: int, rng: np.random.Generator) -> IntArray:
        if self.popularity == "in_turn":
            chosen = (first + np.arange(self.num_requests)) % num_adapters
        else:
            chosen = rng.choice(num_adapters, self.num_requests, p=popularity(self.popularity, num_adapters))
        return chosen.astype(np.int32)


def poisson_arrivals(num: int, rps: float, rng: np.random.Generator) -> FloatArray:
    """Exactly `num` instants in seconds: independent exponential gaps of mean 1 / rps, the first included."""
    return np.cumsum(rng.exponential(1 / rps, num))


def make_calls(shape: LoadShape, adapters: Sequence[str], *, first: int = 0) -> list[PlannedCall]:
    """The load's calls in order of sending; taken in turn, adapters begin with number `first` modulo all."""
    if not adapters:
        raise RequestError("there is no adapter to send requests to; name at least one")
    trace = shape.make_trace(adapters, first=first)
    return calls_of(trace, prompt_form=shape.prompt_form, purpose=f"prompts {shape.seed} {first}")


def calls_of(trace: Trace, *, prompt_form: str = "ids", purpose: str = "prompts") -> list[PlannedCall]:
    """The requests of a trace with random prompts, the same ones for the same `purpose`."""
    rng = generator(0, purpose)
    rows = zip(
        trace.adapters.tolist(),
        trace.prompt_tokens.tolist(),
        trace.response_tokens.tolist(),
        trace.arrivals_s.tolist(),
    )
    names = trace.adapter_names
    return [
        PlannedCall(names[adapter], _prompt(prompt_form, num_tokens, rng), max_tokens, send_at)
        for adapter, num_tokens, max_tokens, send_at in rows
    ]


def _prompt(form: str, num_tokens: int, rng: np.random.Generator) -> list[int] | str:
    if form == "ids":
        ids: list[int] = rng.integers(PROMPT_IDS.start, PROMPT_IDS.stop, num_tokens).tolist()
        return ids
    return " ".join(rng.choice(WORDS, num_tokens))
