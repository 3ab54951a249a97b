"""One request and its answer: the id that both go by, and what of the request was not looked at."""

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toppings.bad_input import shown
from toppings.exchanges.exchange import MESSAGES_ID, Observer, outcome_by
from toppings.exchanges.exchange import Exchange as AnyExchange
from toppings.request_ids import REQUEST_ID, request_id_of
from toppings.sampling_params import SamplingParams
from toppings.server.metrics import RequestTimer
from toppings.server.timings import measured_by

logger = logging.getLogger(__name__)

OUTCOMES = ("error", "abort", "length", "stop")
"""Of a request with several sequences, the first of these that one of them has."""
IGNORED = "x-toppings-ignored"
MAX_NAMES, MAX_NAME_LEN, MAX_NAMES_BYTES = 64, 64, 1024
"""Of fields that were ignored: those that an exchange remembers, and those that its header names."""
MAX_WARNED = 256
"""Names that a server warns of in its life; clients that make up more are told by the header alone."""


class Warned:
    """The names that a server has warned of: once each, and so many at most."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def note(self, name: str, path: str) -> None:
        if name in self._names or len(self._names) >= MAX_WARNED:
            return
        self._names.add(name)
        logger.warning(
            "%s: the field %r is ignored (told once a name; --strict-fields on refuses unknown ones)",
            shown(path),
            name,
        )


@dataclass(slots=True)
class Exchange(AnyExchange):
    """`is_strict`: fields that nobody knows are refused. What became of it, too: its sequences' `timers` and
    what they may draw."""

    is_strict: bool = False
    warned: Warned = field(default_factory=Warned)
    ignored: dict[str, None] = field(default_factory=dict)
    headers_in: list[tuple[bytes, bytes]] = field(default_factory=list)
    sampling: SamplingParams | None = None
    timers: list[RequestTimer] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """How its sequences ended: "stop", "length", "abort" or "error"; else as `outcome_by`."""
        ended = {timer.outcome for timer in self.timers}
        if ended:
            return next((outcome for outcome in OUTCOMES if outcome in ended), "error")
        return outcome_by(self.status)

    @property
    def num_tokens(self) -> tuple[int, int] | None:
        if not self.timers:
            return None
        started = [timer for timer in self.timers if timer.first_at is not None]
        return sum(timer.num_prompt_tokens for timer in started), sum(timer.num_tokens for timer in started)

    def measured(self) -> dict[str, Any]:
        return measured_by(self.timers) if self.timers else {}

    def header(self, name: bytes) -> str:
        """ "" where the request has none."""
        return next((v.decode("latin-1") for n, v in self.headers_in if n == name), "")

    def ignore(self, name: str) -> None:
        name = shown(name, MAX_NAME_LEN)
        if len(self.ignored) < MAX_NAMES:
            self.ignored[name] = None
        self.warned.note(name, self.path)

    def headers(self) -> dict[str, str]:
        """Names of ignored fields are percent-encoded and parted by commas; `...` where there are more."""
        headers = {REQUEST_ID.lower(): self.request_id}
        if self.account is not None:
            headers |= self.account.headers()
        if self.is_message:
            headers[MESSAGES_ID] = self.request_id
        if not self.ignored:
            return headers
        names: list[str] = []
        for name in map(quote, self.ignored):
            if sum(map(len, names)) + len(name) > MAX_NAMES_BYTES:
                names.append("...")
                break
            names.append(name)
        return {**headers, IGNORED: ", ".join(names)}


current_exchange: ContextVar[Exchange | None] = ContextVar("current_exchange", default=None)


def exchange_of(scope: Scope) -> Exchange:
    exchange: Exchange = scope["toppings.exchange"]
    return exchange


class ExchangeMiddleware:
    """Outside of all others: every answer has the request's id, the client's own where that is of use."""

    def __init__(self, app: ASGIApp, *, is_strict: bool, observers: Sequence[Observer] = ()) -> None:
        """`observers` are told of each exchange when it is over."""
        self._app = app
        self._observers = observers
        self._is_strict = is_strict
        self._warned = Warned()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = self._begin(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                own = [(name.encode(), value.encode()) for name, value in exchange.headers().items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        token = current_exchange.set(exchange)
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            current_exchange.reset(token)
            for observe in self._observers:
                observe(exchange)

    def _begin(self, scope: Scope) -> Exchange:
        exchange = scope["toppings.exchange"] = Exchange(
            "",
            scope["path"].removeprefix(scope.get("root_path", "")),  # below where a front has the application
            is_strict=self._is_strict,
            warned=self._warned,
            method=scope["method"],
            client=(scope.get("client") or ("",))[0],
            headers_in=scope["headers"],
        )
        exchange.request_id = request_id_of(exchange.header(REQUEST_ID.lower().encode()))
        return exchange
