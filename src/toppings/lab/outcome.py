"""A request to send, and what became of it, whoever played it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A request to send, `send_at` seconds after its load has begun (0: as soon as it is its turn)."""

    adapter: str
    prompt: list[int] | str
    max_tokens: int
    send_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: with `error`, its times only say when that was known.

    `sent_at`: seconds on the player's clock. `ttft_ms`: until the first token; `e2e_ms`: until the end.
    """

    adapter: str
    sent_at: float
    e2e_ms: float
    ttft_ms: float | None = None
    num_tokens: int = 0
    num_prompt_tokens: int | None = None
    error: str | None = None

    @property
    def tpt_ms(self) -> float | None:
        """Time per token: E2E over generated tokens."""
        return self.e2e_ms / self.num_tokens if self.num_tokens else None
