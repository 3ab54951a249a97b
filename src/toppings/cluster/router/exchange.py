"""One request to the router and its answer: what the log, the counters and the traces tell of it."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from toppings.exchanges.exchange import Exchange as AnyExchange
from toppings.exchanges.exchange import outcome_by
from toppings.tenants.account import Account
from toppings.tracing import Span

if TYPE_CHECKING:
    from toppings.cluster.router.flight import Flight

ANSWERED, ABORT, CUT = "answered", "abort", "cut"


@dataclass(slots=True)
class Exchange(AnyExchange):
    """`flight`: its way to the servers, where it came so far; `span`: of its trace. `has_left`: the client,
    before its answer was whole; `is_received`: it has come as far as to be read."""

    span: Span = field(default_factory=Span)
    flight: "Flight | None" = None
    has_left: bool = False
    is_received: bool = False

    @property
    def outcome(self) -> str:
        """How it ended: "answered", "abort" (the client left), "cut" (after it had begun); else as
        `outcome_by`."""
        if self.has_left:
            return ABORT
        if self.flight is not None and self.flight.is_cut:
            return CUT
        return ANSWERED if 200 <= self.status < 400 else outcome_by(self.status)

    @property
    def num_tokens(self) -> tuple[int, int] | None:
        return None if self.flight is None else self.flight.num_counted

    def measured(self) -> dict[str, Any]:
        return {} if self.flight is None else self.flight.measured(self.started_at)


EXCHANGE = web.RequestKey("toppings.exchange", Exchange)
current_exchange: ContextVar[Exchange | None] = ContextVar("current_exchange", default=None)


def account_of(request: web.Request) -> Account:
    """Of whoever sent it, once it was admitted."""
    account = request[EXCHANGE].account
    assert account is not None, "it was admitted"
    return account
