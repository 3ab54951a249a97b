"""One line for each request that asks for tokens: who asked, what it waited for, how it ended."""

import time
import zlib
from collections.abc import Callable
from typing import Any

from toppings.bad_input import shown
from toppings.exchanges.denied import DeniedLines
from toppings.exchanges.exchange import Exchange
from toppings.log_files import JsonLines

LOGGED_PATHS = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/v1/embeddings", "/v1/score", "/score", "/generate", "/generate_stream", "/"),
    }
)
FAILED = ("error", "cut")
"""Outcomes."""
MAX_ERROR_CHARS = 300


class RequestLog:
    """Writes to `lines` the requests whose ids fall into `share` of all (0 to 1), the same ones on every
    server, and of what the server itself has failed all. Of nobody that is known it writes so many a minute
    (`clock`: seconds). Used from one event loop only."""

    def __init__(self, lines: JsonLines, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._denied = DeniedLines(clock)
        self._bound = share * 2**32

    def has(self, request_id: str) -> bool:
        """Whether the request falls into the share."""
        return zlib.crc32(request_id.encode()) < self._bound

    def note(self, exchange: Exchange) -> None:
        """An exchange that is over."""
        if exchange.method != "POST" or exchange.path not in LOGGED_PATHS:
            return
        if exchange.status >= 500 or exchange.outcome in FAILED:
            self._lines.write(describe(exchange))
        elif self.has(exchange.request_id):
            untold = self._denied.tell() if exchange.account is None else {}
            if untold is not None:
                self._lines.write({**describe(exchange), **untold})


def describe(exchange: Exchange) -> dict[str, Any]:
    """Times in ms."""
    now = time.perf_counter()
    record: dict[str, Any] = {
        "at": round(time.time() - (now - exchange.started_at), 3),
        "request_id": exchange.request_id,
        "tenant": exchange.tenant,
        "key": exchange.key,
        "client": exchange.client,
        "path": exchange.path,
        "model": exchange.model,
        "adapter": exchange.model if exchange.has_adapter else None,
        "status": exchange.status,
        "outcome": exchange.outcome,
        "e2e_ms": milliseconds(now - exchange.started_at),
        **exchange.measured(),
    }
    if exchange.error:
        record["error"] = shown(exchange.error, MAX_ERROR_CHARS)
    return record


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
