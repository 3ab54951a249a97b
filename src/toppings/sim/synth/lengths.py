"""How many tokens prompts and responses have."""

import math
from dataclasses import dataclass

import numpy as np

from toppings.sim.specs import parse_spec
from toppings.sim.trace import IntArray


@dataclass(frozen=True)
class LogNormal:
    """exp(mu + sigma z), rounded, and kept within 1 … `longest`."""

    mu: float
    sigma: float
    longest: int

    @classmethod
    def of_mean(cls, mean: float, sigma: float, longest: int) -> "LogNormal":
        return cls(math.log(mean) - sigma**2 / 2, sigma, longest)

    def draw(self, num: int, rng: np.random.Generator) -> IntArray:
        drawn = np.rint(np.exp(rng.normal(self.mu, self.sigma, num)))
        return np.clip(drawn, 1, self.longest).astype(np.int32)


LOG_NORMALS = {
    "chat": (LogNormal.of_mean(69.5, 1.0, 4096), LogNormal.of_mean(214.5, 0.8, 4096)),
    "instruct": (LogNormal.of_mean(20.0, 0.6, 2048), LogNormal.of_mean(60.0, 0.6, 2048)),
    "azure_code": (LogNormal(7.00, 1.36, 7436), LogNormal(2.79, 0.85, 251)),
    "azure_conversation": (LogNormal(6.63, 0.99, 4142), LogNormal(5.02, 0.86, 601)),
}
"""Prompt and response. `chat` has the published means of LMSYS chats, 69.5 and 214.5; its spread is our
choice. `instruct`: 60 tokens of response are the mean of the published simulation of 60 servers, whose
lengths are those of an instruction data set; prompts and spreads are our choice. The other two are the
published lognormal fits to Azure LLM 2023, cut at that trace's 99th percentile, beyond which the fits are far
too long."""

PARAMETERS: dict[str, tuple[float | None, ...]] = {**dict.fromkeys(LOG_NORMALS, ()), "fixed": (None, None)}


def draw_lengths(spec: str, num: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Prompt and response tokens [N]: `chat`, `instruct`, `azure_code`, `azure_conversation` or
    `fixed:PROMPT:RESPONSE`.

    Raises ValueError for anything else.
    """
    name, numbers = parse_spec(spec, PARAMETERS, kind="lengths")
    if name == "fixed":
        if any(number != int(number) for number in numbers):
            raise ValueError(f"lengths {spec!r}: tokens come whole")
        prompt, response = (np.full(num, int(number), dtype=np.int32) for number in numbers)
        return prompt, response
    prompt_law, response_law = LOG_NORMALS[name]
    return prompt_law.draw(num, rng), response_law.draw(num, rng)
