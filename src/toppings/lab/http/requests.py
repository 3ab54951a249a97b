"""A load for a server that already runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toppings.lab.http.client import LoadClient
from toppings.lab.outcome import Outcome
from toppings.lab.players.http import run_load
from toppings.lab.summary import LoadSummary, summarize
from toppings.lab.workload import LoadShape, make_calls


@dataclass(frozen=True)
class RequestsResult:
    """`link_gbps`: of the server's emulated link, 0 where it says nothing of one."""

    shape: LoadShape
    num_adapters: int
    link_gbps: float
    summary: LoadSummary
    outcomes: list[Outcome]

    def to_json(self) -> dict[str, Any]:
        return {
            "emulated_link_gbps": self.link_gbps or None,
            "load": asdict(self.shape),
            "num_adapters": self.num_adapters,
            **self.summary.to_json(),
            "requests": [asdict(each) for each in self.outcomes],
        }


async def send_requests(
    client: LoadClient,
    shape: LoadShape,
    adapters: Sequence[str] | None,
    num_warmup: int,
    on_done: Callable[[], None],
) -> RequestsResult:
    """The warm-up one request after another, then the load; None for `adapters`: all that the server lists.

    Raises ValueError where the server cannot be reached, or lists no adapters.
    """
    async with client:
        names = await list_adapters(client) if adapters is None else list(adapters)
        if num_warmup:
            calls = make_calls(shape.one_after_another(num_warmup), names)
            await run_load(client, calls, is_sequential=True, on_done=on_done)
        calls = make_calls(shape, names, first=num_warmup)
        outcomes = await run_load(client, calls, is_sequential=not shape.rps, on_done=on_done)
        link_gbps = await _link_gbps(client)
    return RequestsResult(shape, len(names), link_gbps, summarize(outcomes), outcomes)


async def list_adapters(client: LoadClient) -> list[str]:
    """The models in `/v1/models` with a parent, as adapters have it. Raises ValueError if none has one."""
    cards = (await client.get("/v1/models"))["data"]
    names = [card["id"] for card in cards if card.get("parent")]
    if not names:
        raise ValueError(
            f"{client.url} lists no adapters; name models with --adapters, e.g. {cards[0]['id']!r}"
        )
    return names


async def _link_gbps(client: LoadClient) -> float:
    """Servers of other makes have no `/stats`, or another."""
    try:
        stats = await client.get("/stats")
    except ValueError:
        return 0.0
    return float(stats.get("link_gbps", 0.0)) if isinstance(stats, dict) else 0.0
