"""What is sent and when: prompts, adapters, arrivals. The same seed gives the same load."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from toppings.core import RequestError
from toppings.lab.outcome import Call, Outcome

if TYPE_CHECKING:
    from toppings.lab.http.client import LoadClient

POPULARITIES = ("in_turn", "uniform", "published")
PROMPT_FORMS = ("ids", "text")
PROMPT_IDS = range(3, 256)
"""Token ids that every vocabulary has."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """`rps` 0: one request after another, else Poisson arrivals at this rate (requests a second).

    `popularity`: which adapter a request names: `in_turn` (each once before any comes again), `uniform`, or
    `published`, where the i-th of N adapters has weight exp(-8.6 x^0.58), x = (i - 0.5) / N: the curve that
    fits the published LoRA traces.
    `prompt_form` `ids` sends exactly `prompt_tokens` token ids, `text` as many words.

    Raises RequestError for a value out of range.
    """

    num_requests: int = 60
    rps: float = 0.0
    prompt_tokens: int = 64
    max_tokens: int = 16
    popularity: str = "in_turn"
    prompt_form: str = "ids"
    seed: int = 0

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


def make_calls(shape: LoadShape, adapters: Sequence[str], *, first: int = 0) -> list[Call]:
    """The load's calls in order of sending; taken in turn, adapters begin with number `first` modulo all."""
    if not adapters:
        raise RequestError("there is no adapter to send requests to; name at least one")
    chance = random.Random(f"{shape.seed} {first}")
    names = _choose_adapters(shape, adapters, first, chance)
    arrivals = poisson_arrivals(shape.num_requests, shape.rps, chance) if shape.rps else [0.0] * len(names)
    return [
        Call(name, _prompt(shape, chance), shape.max_tokens, send_at)
        for name, send_at in zip(names, arrivals, strict=True)
    ]


def poisson_arrivals(num: int, rps: float, chance: random.Random) -> list[float]:
    """Instants in seconds, with independent exponential gaps of mean 1 / rps, the first one included."""
    return list(accumulate(chance.expovariate(rps) for _ in range(num)))


def published_weights(num: int) -> list[float]:
    """Popularity of `num` adapters, most popular first, not normalised."""
    return [math.exp(-8.6 * ((i + 0.5) / num) ** 0.58) for i in range(num)]


def _choose_adapters(
    shape: LoadShape, adapters: Sequence[str], first: int, chance: random.Random
) -> list[str]:
    if shape.popularity == "in_turn":
        return [adapters[(first + i) % len(adapters)] for i in range(shape.num_requests)]
    weights = published_weights(len(adapters)) if shape.popularity == "published" else None
    return chance.choices(adapters, weights, k=shape.num_requests)


def _prompt(shape: LoadShape, chance: random.Random) -> list[int] | str:
    if shape.prompt_form == "ids":
        return chance.choices(PROMPT_IDS, k=shape.prompt_tokens)
    return " ".join(chance.choices(WORDS, k=shape.prompt_tokens))


async def run_load(
    client: "LoadClient",
    calls: Iterable[Call],
    *,
    is_sequential: bool,
    on_done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """One outcome per call, in their order. Arrivals do not wait for answers unless `is_sequential`."""
    started_at = time.perf_counter()

    async def send(call: Call) -> Outcome:
        await asyncio.sleep(max(0.0, started_at + call.send_at - time.perf_counter()))
        outcome = await client.send(call)
        on_done()
        return outcome

    if is_sequential:
        return [await send(call) for call in calls]
    return list(await asyncio.gather(*(send(call) for call in calls)))
