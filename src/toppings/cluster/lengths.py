"""How long responses are expected to be."""

import math
from dataclasses import dataclass

RESPONSE_TOKENS = 128.0
"""Expected response length before any was seen."""
RESPONSE_MEMORY = 1000
"""The mean response length weighs about the last so many responses."""


@dataclass(slots=True)
class ResponseLengths:
    """How many tokens responses have: a running mean."""

    mean: float = RESPONSE_TOKENS
    num_seen: int = 1

    def note(self, num_tokens: int) -> None:
        self.num_seen = min(self.num_seen + 1, RESPONSE_MEMORY)
        self.mean += (num_tokens - self.mean) / self.num_seen

    def expected(self, max_tokens: float = math.inf) -> float:
        """Of a response that has at most so many."""
        tokens = self.mean if self.mean < max_tokens else max_tokens
        return tokens if tokens > 1.0 else 1.0
