"""What a line of the request log tells of a request's sequences: tokens, times, and a cold start's load."""

from typing import Any

from toppings.exchanges.request_log import milliseconds
from toppings.messages import ColdStart
from toppings.server.cold_starts import place_of
from toppings.server.metrics import RequestTimer


def measured_by(timers: list[RequestTimer]) -> dict[str, Any]:
    """Times in ms. Of several sequences: tokens of all, the first one's queue and load, the earliest first
    token; `tpt_ms` is the longest one's end-to-end time over its tokens."""
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
        "ttft_ms": milliseconds(min(firsts)) if firsts else None,
        "tpt_ms": milliseconds((longest.ended_at - longest.started_at) / longest.num_tokens)
        if longest.num_tokens
        else None,
        **({} if cold is None else {"load": _load(cold)}),
    }


def _load(cold: ColdStart) -> dict[str, Any]:
    times = {name: round(getattr(cold, name), 3) for name in ("read_ms", "copy_ms", "exposed_ms")}
    return {"tier": cold.tier, "rank": cold.rank, "bytes": cold.num_bytes, **times, "place": place_of(cold)}
