"""What became of requests: each that was sent was answered, refused with a reason, left by its own client,
cut where there was nobody to answer, or lost."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MAX_EXAMPLES = 40
REASONS_OF_5XX = (503, 507)
CUT = (ConnectionError, EOFError, aiohttp.ClientError)
"""How a connection ends that nobody serves any more, as its client sees that."""


class Refused(Exception):
    """The server said no: its status and its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Left(Exception):
    """The client went away on purpose."""


@dataclass
class Tally:
    """`lost`: no answer, or half an answer. `faults`: answers that no server may give: after more than
    `limit_s`, a 5xx that is none of `allowed_5xx`, a refusal without a reason."""

    limit_s: float = 10.0
    allowed_5xx: tuple[int, ...] = REASONS_OF_5XX
    sent: int = 0
    answered: int = 0
    left: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    lost: int = 0
    faults: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    last_answer_at: float = 0.0
    num_outages: int = 0
    is_out: bool = False

    @property
    def open(self) -> int:
        return self.sent - self.answered - self.left - self.refused.total() - self.cut - self.lost

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Whoever takes the requests is killed, and begins anew: what it had, and what comes meanwhile, may
        end with its connection."""
        self.is_out = True
        self.num_outages += 1
        try:
            yield
        finally:
            self.is_out = False

    @asynccontextmanager
    async def request(self, kind: str, *, allowed_s: float | None = None) -> AsyncIterator[None]:
        """Around one request: returns where it was answered, raises Refused or Left, or whatever lost it.

        None of these goes further. `allowed_s`: the request itself takes so long, as a slow client's does.
        """
        self.sent += 1
        self.kinds[kind] += 1
        started_at = time.monotonic()
        outages_over = self.num_outages - self.is_out
        try:
            yield
        except Refused as refusal:
            self.refused[refusal.status] += 1
            if refusal.status >= 500:
                self.reasons[f"{refusal.status} {refusal.reason[:160]}"] += 1
            if (refusal.status >= 500 and refusal.status not in self.allowed_5xx) or not refusal.reason:
                self.faults += 1
                self._note(f"{kind}: {refusal}")
        except Left:
            self.left += 1
        except Exception as error:
            if self.num_outages > outages_over and isinstance(error, CUT):
                self.cut += 1
            else:
                self.lost += 1
                self._note(f"{kind}: lost after {time.monotonic() - started_at:.1f} s: {error!r}")
        else:
            self.answered += 1
            self.last_answer_at = time.monotonic()
        took_s = time.monotonic() - started_at
        self.longest_s = max(self.longest_s, took_s)
        if took_s > self.limit_s + (allowed_s or 0.0):
            self.faults += 1
            self._note(f"{kind}: took {took_s:.1f} s")

    def _note(self, text: str) -> None:
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(text[:300])

    def as_dict(self) -> dict[str, Any]:
        refused = {str(status): count for status, count in sorted(self.refused.items())}
        by_reason = dict(self.reasons.most_common(MAX_EXAMPLES))
        return {
            **{"sent": self.sent, "answered": self.answered, "refused": refused, "left": self.left},
            **{"cut": self.cut, "lost": self.lost, "open": self.open, "faults": self.faults},
            **{
                "longest_s": self.longest_s,
                "5xx": by_reason,
                "kinds": dict(self.kinds),
                "examples": self.examples,
            },
        }
