"""One sequence of a batch whose cost is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One sequence of a hypothetical batch; `num_context` is how many of its tokens are cached before it."""

    rank: int
    adapter: str | None = None
    num_tokens: int = 1
    num_context: int = 0

    @property
    def num_attended(self) -> float:
        """Keys that the row's tokens attend to, themselves and each other (causally) included."""
        return self.num_tokens * (self.num_context + (self.num_tokens + 1) / 2)
