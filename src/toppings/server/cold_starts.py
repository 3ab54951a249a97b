"""The server's latest cold starts, for whoever looks at it."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from toppings.messages import ColdStart

MAX_COLD_STARTS = 64


@dataclass(frozen=True, slots=True)
class ToldColdStart:
    """The engine's record of a cold request, with the names that it goes by outside the engine."""

    request_id: str  # the answer's `X-Request-Id`
    tenant: str
    adapter: str
    num_prompt_tokens: int
    place: str
    """Where its adapter's layers were computed: "device", "cpu", "both"."""
    cold_start: ColdStart


class ColdStarts:
    """The last `MAX_COLD_STARTS`, oldest first. `num_noted` counts all there have been."""

    def __init__(self) -> None:
        self.num_noted = 0
        self._latest: deque[ToldColdStart] = deque(maxlen=MAX_COLD_STARTS)

    def __iter__(self) -> Iterator[ToldColdStart]:
        return iter(tuple(self._latest))

    def note(
        self, cold: ColdStart, *, request_id: str, tenant: str, adapter: str, num_prompt_tokens: int
    ) -> None:
        self.num_noted += 1
        told = ToldColdStart(request_id, tenant, adapter, num_prompt_tokens, place_of(cold), cold)
        self._latest.append(told)


def place_of(cold: ColdStart) -> str:
    """Where the adapter's products were computed: "device", "cpu", or "both"."""
    places = {layer.place for layer in cold.layers} - {"none"}
    return places.pop() if len(places) == 1 else "both" if places else "device"
