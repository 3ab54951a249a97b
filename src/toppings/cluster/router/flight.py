"""One inference request on its way."""

import asyncio
import time
from dataclasses import dataclass, field

from toppings.cluster.router.calls import Call
from toppings.cluster.snapshot import RequestSnapshot


@dataclass(slots=True, eq=False)
class Flight:
    """`deadline` is set while it has no token yet: only then can it go elsewhere. `idle` is set while it
    waits for more of a stream that has begun; `heard_at` is when it began to wait, by the loop's clock.
    """

    call: Call
    request: RequestSnapshot
    instance_id: str = ""
    deadline: asyncio.Timeout | None = None
    idle: asyncio.Timeout | None = None
    heard_at: float = 0.0
    move_to: str | None = None
    received_at: float = field(default_factory=time.monotonic)
    is_cut: bool = False

    def interrupt(self) -> None:
        """End the wait for the first token at once; the request is then tried elsewhere."""
        end_wait(self.deadline)

    def hurry(self, limit_s: float) -> None:
        """Wait no longer than this for more of the stream: its server has fallen silent."""
        if self.idle is not None:
            end_wait(self.idle, at=self.heard_at + limit_s)


def end_wait(wait: asyncio.Timeout | None, *, at: float = 0.0) -> None:
    """Let a wait run out now, or at this time of the loop's clock, but no later than it would."""
    when = wait.when() if wait is not None and not wait.expired() else None
    if wait is not None and when is not None:
        wait.reschedule(min(when, max(at, asyncio.get_running_loop().time())))
