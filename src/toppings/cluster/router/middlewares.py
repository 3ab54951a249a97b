"""What every answer of the router has: an id, and its form where a route or a method is not there."""

import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from aiohttp import web

from toppings.bad_input import shown
from toppings.cluster.router.connections import watched
from toppings.cluster.router.replies import ApiError
from toppings.request_ids import REQUEST_ID, request_id_of
from toppings.tenants.account import Account

request_id: ContextVar[str] = ContextVar("request_id")
"""Of the request that is being answered."""
ACCOUNT = web.RequestKey("toppings.account", Account)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NamingFormatter(logging.Formatter):
    """Names the request that a line is about."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return f"{line} [request {given}]" if (given := request_id.get("")) else line


@web.middleware
async def identified(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A request's id: the client's where that is of use, else a new one. Servers get it, too."""
    request_id.set(request_id_of(request.headers.get(REQUEST_ID, "")))
    return await handler(request)


async def add_id(request: web.Request, response: web.StreamResponse) -> None:
    """As the head of an answer leaves; what a server said of it stays. A tenant is told what is left."""
    response.headers.setdefault(REQUEST_ID, request_id.get())
    if ACCOUNT in request:
        response.headers.update(account_of(request).headers())


def account_of(request: web.Request) -> Account:
    """Of whoever sent it, once it was admitted."""
    return request[ACCOUNT]


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


LAYERS = (watched, identified, routing_errors)
