"""A request as a trace: who asked for what, and what the time until its last token went into.

Names and attributes are those of OpenTelemetry's semantic conventions for generative AI where they have one,
else `toppings.`'s. All spans of an exchange are made when it is over, from what was measured.
"""

from collections.abc import Iterator
from itertools import groupby
from time import time_ns

from toppings.backlog import Backlog
from toppings.bad_input import shown
from toppings.exchanges.request_log import LOGGED_PATHS, MAX_ERROR_CHARS
from toppings.messages import ColdStart
from toppings.messages import Span as Time
from toppings.server.exchange import Exchange
from toppings.server.metrics import RequestTimer
from toppings.tracing import PARENT_HEADERS, Attributes, Span, Tracing, unix_ns

OPERATIONS = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/responses", "/v1/messages"), "chat"),
    **dict.fromkeys(("/v1/embeddings", "/v1/score", "/score"), "embeddings"),
}
OTHER_OPERATION = "text_completion"
LINGER_S = 2.0
MAX_WAITING = 1024
"""Exchanges whose traces are still to be made."""
MAX_SEQUENCES = 16
"""Of a request, whose course is told."""


class RequestTraces:
    """Makes a trace of each exchange that asks for tokens, in a thread of its own: a cold request has a span
    for each layer."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._backlog: Backlog[tuple[Exchange, int]] = Backlog("traces", self._make, MAX_WAITING)

    @property
    def num_dropped(self) -> int:
        return self._backlog.num_dropped

    def note(self, exchange: Exchange) -> None:
        """An exchange that is over."""
        if exchange.method == "POST" and exchange.path in LOGGED_PATHS:
            self._backlog.put((exchange, time_ns()))

    def close(self) -> None:
        """Returns when the last ones are made, or within a few seconds; before those who send them end."""
        self._backlog.close(LINGER_S)

    def _make(self, noted: tuple[Exchange, int]) -> None:
        exchange, ended_ns = noted
        operation = OPERATIONS.get(exchange.path, OTHER_OPERATION)
        headers = {name: exchange.header(name.encode()) for name in PARENT_HEADERS}
        name = f"{operation} {exchange.model}" if exchange.model else operation
        span = self._tracing.serve(
            name,
            {name: value for name, value in headers.items() if value},
            unix_ns(exchange.started_at),
            {"gen_ai.operation.name": operation, **_attributes(exchange)},
        )
        if exchange.failure:
            span.fail(exchange.failure)
        if span.is_recording:
            for timer in exchange.timers[:MAX_SEQUENCES]:
                _tell(span, timer)
        span.end(ended_ns)


def _attributes(exchange: Exchange) -> Attributes:
    timers, sampling = exchange.timers, exchange.sampling
    found: dict[str, str | int | float | bool | list[str]] = {
        "gen_ai.provider.name": "toppings",
        "http.request.method": exchange.method,
        "http.response.status_code": exchange.status,
        "url.path": exchange.path,
        "toppings.request_id": exchange.request_id,
        "toppings.outcome": exchange.outcome,
    }
    if exchange.tenant:
        found["toppings.tenant"] = exchange.tenant
    if exchange.error:
        found["toppings.error"] = shown(exchange.error, MAX_ERROR_CHARS)
    if exchange.model:
        found |= {"gen_ai.request.model": exchange.model, "gen_ai.response.model": exchange.model}
    if exchange.has_adapter:
        found["toppings.adapter"] = exchange.model
    if sampling is not None:
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        }
    if timers:
        found |= {
            "gen_ai.usage.input_tokens": sum(timer.num_prompt_tokens for timer in timers),
            "gen_ai.usage.output_tokens": sum(timer.num_tokens for timer in timers),
            "gen_ai.response.finish_reasons": [timer.outcome for timer in timers[:MAX_SEQUENCES]],
            "toppings.cached_tokens": sum(timer.num_cached_tokens for timer in timers),
            "toppings.start": timers[0].start,
        }
    firsts = [timer.first_at - timer.started_at for timer in timers if timer.first_at is not None]
    if firsts:
        found["gen_ai.response.time_to_first_chunk"] = min(firsts)
    return found


def _tell(span: Span, timer: RequestTimer) -> None:
    if timer.first_at is None:
        return
    arrived_ns, first_ns, end_ns = map(unix_ns, (timer.started_at, timer.first_at, timer.ended_at))
    if timer.cold_start is not None:
        _tell_cold(span, timer.cold_start)
    elif timer.queue_ms is not None:
        scheduled_ns = min(first_ns, arrived_ns + int(timer.queue_ms * 1e6))
        span.add("queue", arrived_ns, scheduled_ns)
        span.add("prefill", scheduled_ns, first_ns, {"gen_ai.usage.input_tokens": timer.num_prompt_tokens})
    if timer.num_tokens > 1:
        span.add("decode", first_ns, end_ns, {"gen_ai.usage.output_tokens": timer.num_tokens})


def _tell_cold(span: Span, cold: ColdStart) -> None:
    base_ns = int(cold.arrived_at * 1e9)

    def add(name: str, time: Time, attributes: Attributes | None = None) -> None:
        told = {f"toppings.{key}": value for key, value in (attributes or {}).items()}
        span.add(name, base_ns + int(time.from_ms * 1e6), base_ns + int(time.to_ms * 1e6), told)

    add("queue", Time(0.0, cold.queue_ms))
    where: dict[str, str | int | float | bool | list[str]] = {
        **{"tier": cold.tier, "rank": cold.rank},
        **{"bytes": cold.num_bytes, "exposed_ms": cold.exposed_ms},
    }
    add("adapter load", _whole(cold), where)
    if cold.read is not None:
        add("adapter read", cold.read, {"bytes": cold.num_bytes})
    for time, layers in _copies(cold):
        add("adapter copy", time, {"layers": _ranges(layers)})
    for number, layer in enumerate(cold.layers):
        if layer.cpu is not None:
            counts = {"products": layer.num_cpu_products, "of_products": layer.num_products}
            add("adapter cpu", layer.cpu, {"layer": number, "slices": layer.num_slices, **counts})
    for step in cold.steps:
        add("prefill step", step.span, {"tokens": step.num_tokens, "load_wait_ms": step.load_wait_ms})


def _whole(cold: ColdStart) -> Time:
    """From the first of its read and copies to the last one that had ended by the first token."""
    times = [cold.read, *(layer.load for layer in cold.layers)]
    there = [time for time in times if time is not None]
    if not there:
        return Time(cold.queue_ms, cold.first_token_ms)
    return Time(min(time.from_ms for time in there), max(time.to_ms for time in there))


def _copies(cold: ColdStart) -> Iterator[tuple[Time, list[int]]]:
    """Layers that landed together, in the order in which they did."""
    landed = [(layer.load, number) for number, layer in enumerate(cold.layers) if layer.load is not None]
    landed.sort(key=lambda each: (each[0].to_ms, each[1]))
    for _, group in groupby(landed, key=lambda each: each[0].to_ms):
        together = list(group)
        start = min(time.from_ms for time, _ in together)
        yield Time(start, together[0][0].to_ms), [number for _, number in together]


def _ranges(layers: list[int]) -> str:
    """ "0-3,7" of [0, 1, 2, 3, 7]."""
    told = []
    for _, group in groupby(enumerate(sorted(layers)), key=lambda each: each[1] - each[0]):
        numbers = [number for _, number in group]
        told.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(told)
