"""Who may ask: the API key, and loopback only for what changes state where there is none."""

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from toppings.access import is_key, is_loopback, is_named_here, is_own_page
from toppings.core import shown
from toppings.server.errors import ApiError, json_response
from toppings.server.state import state_of

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready"})
DENIED = "PermissionDeniedError"


class KeyMiddleware:
    """Asks for `Authorization: Bearer <api_key>` on every path but `OPEN_PATHS`; 401 without it."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            await json_response({"error": "Unauthorized"}, 401, headers=headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return is_key(given, self._api_key)


def may_change_state(request: Request) -> None:
    """Dependency of routes that change state. Without a key: this machine only, by a name that no web page
    can make its own, and no foreign web page.

    Raises ApiError 403. The peer's address counts; forwarding headers are anyone's to write.
    """
    server = state_of(request).config.server
    if server.api_key:
        return
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if request.client is None or not is_loopback(request.client.host):
        raise ApiError(
            403,
            "without a configured api_key, routes that change state answer loopback clients only",
            DENIED,
        )
    if not is_named_here(host, server.host):
        raise ApiError(
            403,
            f"the header Host is {shown(host)!r}; without a configured api_key, routes that change state "
            f"answer to localhost, 127.0.0.1, [::1] and {server.host} only",
            DENIED,
        )
    if not is_own_page(origin, host, server.allowed_origins):
        raise ApiError(403, f"requests from web pages of {shown(origin or '')} may not change state", DENIED)
