"""One line for each request that asks for tokens: who asked, what it waited for, how it ended."""

import time
import zlib
from typing import Any

from toppings.bad_input import shown
from toppings.log_files import JsonLines
from toppings.messages import ColdStart
from toppings.server.cold_starts import place_of
from toppings.server.exchange import Exchange
from toppings.server.metrics import RequestTimer

INFERENCE_PATHS = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/v1/embeddings", "/v1/score", "/score", "/generate", "/generate_stream", "/"),
    }
)
MAX_ERROR_CHARS = 300
OUTCOMES = ("error", "abort", "length", "stop")
"""Of a request with several sequences, the first of these that one of them has."""
CLIENT_GONE = 499


class RequestLog:
    """Writes to `lines` the requests whose ids fall into `share` of all (0 to 1), the same ones on every
    server, and of what the server itself has failed all."""

    def __init__(self, lines: JsonLines, share: float) -> None:
        self._lines = lines
        self._bound = share * 2**32

    def note(self, exchange: Exchange) -> None:
        """An exchange that is over."""
        if exchange.method != "POST" or exchange.path not in INFERENCE_PATHS:
            return
        has_failed = exchange.status >= 500 or outcome_of(exchange) == "error"
        if has_failed or zlib.crc32(exchange.request_id.encode()) < self._bound:
            self._lines.write(describe(exchange))

    def close(self) -> None:
        self._lines.close()


def describe(exchange: Exchange) -> dict[str, Any]:
    """Times in ms. Of several sequences: tokens of all, the first one's queue and load, the earliest first
    token; `tpt_ms` is the longest one's end-to-end time over its tokens."""
    timers, now = exchange.timers, time.perf_counter()
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
        "outcome": outcome_of(exchange),
        "e2e_ms": _ms(now - exchange.started_at),
    }
    if timers:
        record |= _timed(timers)
    if exchange.error:
        record["error"] = shown(exchange.error, MAX_ERROR_CHARS)
    return record


def _timed(timers: list[RequestTimer]) -> dict[str, Any]:
    firsts = [timer.first_at - timer.started_at for timer in timers if timer.first_at is not None]
    longest = max(timers, key=lambda timer: timer.num_tokens)
    queue_ms, cold = timers[0].queue_ms, timers[0].cold_start
    return {
        "sequences": len(timers),
        "prompt_tokens": sum(timer.num_prompt_tokens for timer in timers),
        "cached_tokens": sum(timer.num_cached_tokens for timer in timers),
        "completion_tokens": sum(timer.num_tokens for timer in timers),
        "start": timers[0].start,
        "queue_ms": None if queue_ms is None else round(queue_ms, 3),
        "ttft_ms": _ms(min(firsts)) if firsts else None,
        "tpt_ms": _ms((longest.ended_at - longest.started_at) / longest.num_tokens)
        if longest.num_tokens
        else None,
        **({} if cold is None else {"load": _load(cold)}),
    }


def _load(cold: ColdStart) -> dict[str, Any]:
    times = {name: round(getattr(cold, name), 3) for name in ("read_ms", "copy_ms", "exposed_ms")}
    return {"tier": cold.tier, "rank": cold.rank, "bytes": cold.num_bytes, **times, "place": place_of(cold)}


def outcome_of(exchange: Exchange) -> str:
    """How its sequences ended: "stop", "length", "abort" or "error"; of a request that had none "rejected"
    (come back later), "refused" (its own fault), "abort" (the client left), or "error"."""
    ended = {timer.outcome for timer in exchange.timers}
    if ended:
        return next((outcome for outcome in OUTCOMES if outcome in ended), "error")
    if exchange.status == CLIENT_GONE:
        return "abort"
    if exchange.status == 429:
        return "rejected"
    return "refused" if 400 <= exchange.status < 500 else "error"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
