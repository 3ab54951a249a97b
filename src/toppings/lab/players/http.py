"""The requests of a trace, or calls made beforehand, to a server in real time."""

import asyncio
import time
from collections.abc import Callable, Iterable

from toppings.lab.http.client import LoadClient
from toppings.lab.outcome import Outcome, PlannedCall
from toppings.lab.workload import calls_of
from toppings.sim.trace import Trace


class HttpPlayer:
    """Plays to the client's server; each play opens the client and closes it again."""

    def __init__(self, client: LoadClient) -> None:
        self._client = client

    def play(self, trace: Trace) -> list[Outcome]:
        return asyncio.run(self._play(calls_of(trace)))

    async def _play(self, calls: list[PlannedCall]) -> list[Outcome]:
        async with self._client as client:
            return await run_load(client, calls, is_sequential=False)


async def run_load(
    client: LoadClient,
    calls: Iterable[PlannedCall],
    *,
    is_sequential: bool,
    on_done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """One outcome per call, in their order. Arrivals do not wait for answers unless `is_sequential`."""
    started_at = time.perf_counter()

    async def send(call: PlannedCall) -> Outcome:
        await asyncio.sleep(max(0.0, started_at + call.send_at - time.perf_counter()))
        outcome = await client.send(call)
        on_done()
        return outcome

    if is_sequential:
        return [await send(call) for call in calls]
    return list(await asyncio.gather(*(send(call) for call in calls)))
