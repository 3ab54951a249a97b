"""What a scheduler asks of whoever places adapters."""

from typing import Protocol

from toppings.core import Admission


class AdapterPlacement(Protocol):
    """What the scheduler asks of whoever places adapters: the engine's manager, or a simulated one."""

    def prefetch(self, adapter_id: int) -> None:
        """A request for it was queued: begin to read it from disk, without blocking."""

    def holds(self, adapter_id: int) -> bool:
        """True where it has its room on the device already, whether its load is done or not."""

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        """Pin it for a request of `num_tokens` to compute, and begin its load.

        Raises ValueError where it can never be served.
        """

    def may_acquire(self, adapter_id: int) -> bool:
        """False where `try_acquire` is known to give LOADING or NO_ROOM now; changes nothing."""

    def release(self, adapter_id: int) -> None:
        """One request less that needs it."""

    def load_tokens(self, adapter_id: int) -> float:
        """What the load of an adapter that has its room costs, in tokens of prompts."""

    def victims_for(self, adapter_id: int) -> list[int]:
        """Adapters in use, least valuable first, whose leaving would make room for it."""
