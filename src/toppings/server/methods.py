"""Methods that no route has of its own: HEAD, OPTIONS, and what a wrong one is told."""

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toppings.server.exchange import exchange_of

IS_HEAD = "toppings.is_head"
"""In the scope of a GET that was a HEAD."""


class HeadMiddleware:
    """HEAD is answered as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET", IS_HEAD: True}, receive, send_head)


def is_head(scope: Scope) -> bool:
    """Whether the client asked for the head alone: an answer without an end must not be begun for it."""
    return IS_HEAD in scope


def allowed_methods(request: Request) -> list[str]:
    """All methods that the path has, those of every route that it matches: the header `Allow`."""
    routes: list[Route] = request.app.state.routes
    path = exchange_of(request.scope).path
    found = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
    if "GET" in found:
        found.add("HEAD")
    return sorted({*found, "OPTIONS"})
