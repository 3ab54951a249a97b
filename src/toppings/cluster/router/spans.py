"""The router's spans: one of each request for tokens, below it one of each server that it was tried on."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from toppings.bad_input import shown
from toppings.cluster.router.calls import INFERENCE_PATHS
from toppings.cluster.router.exchange import Exchange
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.state import RouterState
from toppings.cluster.snapshot import Choice
from toppings.exchanges.request_log import MAX_ERROR_CHARS
from toppings.tracing import PARENT_HEADERS, Span

LEFT = "the client left"


def begin_span(state: RouterState, request: web.Request, exchange: Exchange) -> None:
    if not state.tracing.is_on or request.method != "POST" or request.path not in INFERENCE_PATHS:
        return
    headers = {name: request.headers[name] for name in PARENT_HEADERS if name in request.headers}
    told = {"url.path": request.path, "http.request.method": request.method}
    told |= {"toppings.request_id": exchange.request_id, "toppings.policy": state.config.policy}
    exchange.span = state.tracing.serve(f"route {request.path}", headers, time.time_ns(), told)


def end_span(exchange: Exchange) -> None:
    """With how it ended."""
    span, flight = exchange.span, exchange.flight
    span.set(http__response__status_code=exchange.status, toppings__outcome=exchange.outcome)
    if exchange.tenant:
        span.set(toppings__tenant=exchange.tenant)
    if exchange.model:
        span.set(gen_ai__request__model=exchange.model)
    if flight is not None:
        span.set(toppings__moves=flight.num_moves, toppings__attempts=flight.num_attempts)
        if flight.server:
            span.set(toppings__instance=flight.server)
    if exchange.error:
        span.set(toppings__error=shown(exchange.error, MAX_ERROR_CHARS))
    if exchange.failure and not exchange.has_left:
        span.fail(exchange.failure)
    span.end()


@contextmanager
def attempting(flight: Flight, choice: Choice) -> Iterator[Span]:
    """The span of an attempt, which has failed where an exception leaves."""
    span = flight.attempt = flight.span.begin("attempt", attributes={"toppings.instance": choice.instance_id})
    try:
        yield span
    except (asyncio.CancelledError, ConnectionError):
        span.fail(LEFT)
        raise
    except Exception as error:
        span.fail(str(error) or type(error).__name__)
        raise
    finally:
        span.end()


def note_answer(span: Span, status: int) -> None:
    """Of a server's answer that is passed on; what it refuses is a failure of the attempt."""
    span.set(http__response__status_code=status)
    if status >= 400:
        span.fail(f"answered {status}")
