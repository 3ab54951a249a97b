"""What a router does with requests that no server could take within the objectives: interactive ones it sends
all the same, or refuses; batch ones it holds.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from toppings.cluster.batch_class import Held
from toppings.cluster.router import replies
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.meters import Meters
from toppings.cluster.router.settings import RouterConfig
from toppings.cluster.snapshot import Choice
from toppings.slo import BATCH, INTERACTIVE

TENANTS_SHARE = 0.5
"""Of what may be held, that one tenant may have."""
BODIES_SHARE = 0.5
"""Of `max_buffered_bytes`, that bodies of held requests may take."""

Entry = tuple[Flight, "asyncio.Future[Choice | None]"]


class Find(Protocol):
    """Where a request goes now; it gets no instance where that would break the objectives."""

    def __call__(self, flight: Flight, *, is_held: bool = False) -> Choice | None: ...


class Holding:
    """Batch requests that wait for room (`batch_class.Held`); `end` takes the place of one back."""

    def __init__(
        self, config: RouterConfig, meters: Meters, find: Find, end: Callable[[Flight], None]
    ) -> None:
        self._config, self._meters, self._find, self._end = config, meters, find, end
        self._held: Held[Entry] = Held()
        self._num_bytes = 0
        self._is_due: asyncio.Handle | None = None
        meters.held.set_function(lambda: len(self._held))

    def __len__(self) -> int:
        return len(self._held)

    async def place(self, flight: Flight) -> Choice | None:
        """Where the request goes: now, or a batch request perhaps later. None where no server is open for it.

        Raises ApiError 429 for an interactive one where the router is to refuse what breaks the objectives,
        and for a batch one that has waited for `batch_wait_s`, or that would be one too many.
        """
        is_batch, has_had_place = flight.request.is_batch, bool(flight.tried or flight.num_moves)
        is_behind = is_batch and not has_had_place and self._held.has(*_place_of(flight))
        if not is_behind:
            choice = self._find(flight)
            if choice is None or flight.instance_id:
                return choice
            if not is_batch:
                raise self._refusal(choice)
        return await self._hold(flight)

    async def _hold(self, flight: Flight) -> Choice | None:
        self._check_room(flight)
        place: asyncio.Future[Choice | None] = asyncio.get_running_loop().create_future()
        entry, stands = (flight, place), _place_of(flight)
        self._held.add(entry, *stands, weight=flight.place.account.tenant.weight)
        self._num_bytes += len(flight.call.body)
        limit_s = self._config.batch_wait_s
        try:
            async with asyncio.timeout(limit_s):
                return await place
        except BaseException as error:
            if flight.instance_id:  # it was placed in the very moment that it left
                self._end(flight)
            if not isinstance(error, TimeoutError):
                raise
        finally:
            self._num_bytes -= len(flight.call.body)
            self._held.discard(entry, *stands)
        raise self._too_long(f"no server had room within the objectives for a batch request in {limit_s:g} s")

    def _check_room(self, flight: Flight) -> None:
        """Raises ApiError 429 where more are held than may be, of all or of the tenant."""
        config, (tenant, _) = self._config, _place_of(flight)
        most = config.max_held if not tenant else max(1, int(TENANTS_SHARE * config.max_held))
        num_held = len(self._held) if not tenant else self._held.num_of(tenant)
        if num_held >= most or len(self._held) >= config.max_held:
            raise self._too_long(f"{num_held} batch requests wait for room already; at most {most} may")
        if self._num_bytes + len(flight.call.body) > BODIES_SHARE * config.max_buffered_bytes:
            raise self._too_long("batch requests that wait for room take all memory that they may")

    def _too_long(self, message: str) -> replies.ApiError:
        self._meters.slo_refused.labels(BATCH).inc()
        return replies.out_of_objective(message, self._config.retry_after_s)

    def look_soon(self) -> None:
        """There may be room: a request has ended, a server has reported or come up. Many such are one."""
        if self._held and self._is_due is None:
            self._is_due = asyncio.get_running_loop().call_soon(self.look)

    def look(self) -> None:
        """There may be room, if only since time has passed."""
        self._is_due = None
        self._held.look(self._try)

    def _try(self, entry: Entry) -> bool:
        flight, place = entry
        if place.done():
            return True  # its client has left
        choice = self._find(flight, is_held=True)
        if choice is not None and not flight.instance_id:
            return False
        place.set_result(choice)
        return True

    async def close(self, _: object = None) -> None:
        """The router stops: what waits is answered 503."""
        stopping = replies.unavailable("the router is stopping", self._config.retry_after_s)
        for _flight, place in self._held.pop_all():
            if not place.done():
                place.set_exception(stopping)

    def _refusal(self, choice: Choice) -> replies.ApiError:
        self._meters.slo_refused.labels(INTERACTIVE).inc()
        config = self._config
        told = [
            f"{name} {ms:.0f} ms instead of {slo_ms:g}"
            for name, ms, slo_ms in (
                ("time per token", choice.predicted_tpt_ms, config.slo_tpt_ms),
                ("time until the first token", choice.predicted_ttft_ms, config.slo_ttft_ms),
            )
            if ms is not None and ms > slo_ms
        ]
        late_ms = max(0.0, (choice.predicted_ttft_ms or 0.0) - config.slo_ttft_ms)
        message = f"no server could take the request within the objectives: {' and '.join(told)}"
        return replies.out_of_objective(message, max(config.retry_after_s, math.ceil(late_ms / 1e3)))


def _place_of(flight: Flight) -> tuple[str, str]:
    """Whose it is, and for which model."""
    return flight.place.account.name, flight.call.model or ""
