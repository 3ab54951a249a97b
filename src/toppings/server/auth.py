"""Who may ask: the API key, and loopback only for what changes state where there is none."""

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from toppings.server.errors import ApiError, json_response
from toppings.server.state import state_of

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready"})
DENIED = "PermissionDeniedError"


class KeyMiddleware:
    """Asks for `Authorization: Bearer <api_key>` on every path but `OPEN_PATHS`; 401 without it."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(scope):
            await json_response({"error": "Unauthorized"}, 401)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), self._expected)


def may_change_state(request: Request) -> None:
    """Dependency of routes that change state. Without a key: this machine only, and no foreign web page.

    Raises ApiError 403. The peer's address counts; forwarding headers are anyone's to write.
    """
    if state_of(request).config.server.api_key:
        return
    if request.client is None or not _is_loopback(request.client.host):
        raise ApiError(
            403,
            "without a configured api_key, routes that change state answer loopback clients only",
            DENIED,
        )
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, f"requests from web pages of {origin} may not change state", DENIED)


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
