"""What every answer of the router has: an id, and its form where a route or a method is not there; and what
is noted of it when it is over."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from toppings.bad_input import shown
from toppings.cluster.router.connections import watched
from toppings.cluster.router.exchange import EXCHANGE, Exchange, current_exchange
from toppings.cluster.router.replies import ApiError
from toppings.cluster.router.spans import begin_span, end_span
from toppings.cluster.router.state import RouterState
from toppings.exchanges.exchange import CLIENT_GONE, MESSAGES_ID
from toppings.request_ids import REQUEST_ID, request_id_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def layers(state: RouterState) -> tuple[Middleware, ...]:
    """From the outermost on."""
    return watched, _noting(state), routing_errors


def _noting(state: RouterState) -> Middleware:
    @web.middleware
    async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
        """A request's id is the client's where that is of use, else a new one. Servers get it, too."""
        exchange = request[EXCHANGE] = Exchange(
            request_id_of(request.headers.get(REQUEST_ID, "")),
            request.path,
            method=request.method,
            client=request.remote or "",
        )
        token = current_exchange.set(exchange)
        begin_span(state, request, exchange)
        try:
            response = await handler(request)
            exchange.status = response.status
            return response
        except (asyncio.CancelledError, ConnectionError):
            exchange.has_left = True
            exchange.status = exchange.status or CLIENT_GONE
            raise
        finally:
            end_span(exchange)
            for observe in state.observers:
                observe(exchange)
            current_exchange.reset(token)

    return noted


async def add_id(request: web.Request, response: web.StreamResponse) -> None:
    """As the head of an answer leaves. A tenant is told what is left."""
    exchange = request.get(EXCHANGE)
    if exchange is None:  # refused before it came to the layers
        response.headers[REQUEST_ID] = request_id_of(request.headers.get(REQUEST_ID, ""))
        return
    exchange.status = response.status
    response.headers[REQUEST_ID] = exchange.request_id
    if exchange.is_message:
        response.headers[MESSAGES_ID] = exchange.request_id
    if exchange.account is not None:
        response.headers.update(exchange.account.headers())


@web.middleware
async def routing_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What is said of unknown routes and wrong methods; OPTIONS is told the methods there are."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        if request.method == "OPTIONS" and error.status == 405:
            return web.Response(status=204, headers=allow)
        if error.status == 404:
            text = f"no route is at {shown(request.path)}"
            return ApiError(404, text, "NotFoundError").response(request.path)
        text = f"{shown(request.method)} is not allowed on this route, only {', '.join(allow.values())}"
        return ApiError(405, text, "MethodNotAllowedError", headers=allow).response(request.path)
