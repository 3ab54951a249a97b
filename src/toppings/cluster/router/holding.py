"""What a router does with requests that no server could take within the objectives: interactive ones it sends
all the same, or refuses; batch ones it holds.
"""

import asyncio
import math
from collections.abc import Callable

from toppings.cluster.batch_class import Held
from toppings.cluster.router import replies
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.meters import Meters
from toppings.cluster.router.settings import RouterConfig
from toppings.cluster.snapshot import Choice
from toppings.slo import BATCH, INTERACTIVE

Entry = tuple[Flight, "asyncio.Future[Choice | None]"]


class Holding:
    """Batch requests that wait for room, in the order they came. `find` says where a request goes now, and
    leaves it without an instance where that would break the objectives; `end` takes such a place back.
    """

    def __init__(
        self,
        config: RouterConfig,
        meters: Meters,
        find: Callable[[Flight], Choice | None],
        end: Callable[[Flight], None],
    ) -> None:
        self._config, self._meters, self._find, self._end = config, meters, find, end
        self._held: Held[Entry] = Held()
        meters.held.set_function(lambda: len(self._held))

    def __len__(self) -> int:
        return len(self._held)

    async def place(self, flight: Flight) -> Choice | None:
        """Where the request goes: now, or a batch request perhaps later. None where no server is open for it.

        Raises ApiError 429 for an interactive one where the router is to refuse what breaks the objectives,
        and for a batch one that has waited for `batch_wait_s`.
        """
        is_batch = flight.request.is_batch
        if not (is_batch and self._held):
            choice = self._find(flight)
            if choice is None or flight.instance_id:
                return choice
            if not is_batch:
                raise self._refusal(choice)
        return await self._hold(flight)

    async def _hold(self, flight: Flight) -> Choice | None:
        place: asyncio.Future[Choice | None] = asyncio.get_running_loop().create_future()
        entry = flight, place
        self._held.add(entry)
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
            self._held.discard(entry)
        self._meters.slo_refused.labels(BATCH).inc()
        message = f"no server had room within the objectives for a batch request in {limit_s:g} s"
        raise replies.out_of_objective(message, self._config.retry_after_s)

    def look(self) -> None:
        """There may be room: a request has ended, a server has reported or come up, time has passed."""
        self._held.look(self._try)

    def _try(self, entry: Entry) -> bool:
        flight, place = entry
        if place.done():
            return False
        choice = self._find(flight)
        if not flight.instance_id and (choice is not None or not flight.tried):
            return False
        place.set_result(choice)
        return True

    async def close(self, _: object = None) -> None:
        """The router stops: what waits is answered 503."""
        stopping = replies.unavailable("the router is stopping", self._config.retry_after_s)
        while self._held:
            _, place = self._held.pop()
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
