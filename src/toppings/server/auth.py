"""Who may ask: the API key, and loopback only for what changes state where there is none."""

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from toppings.access import is_key, is_same, why_not_changed
from toppings.server.errors import ApiError, error_response, json_response
from toppings.server.exchange import exchange_of
from toppings.server.state import state_of

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/ping"})
DENIED = "PermissionDeniedError"


def is_open(path: str) -> bool:
    """A document of the API is the same on every server of this version."""
    return path in OPEN_PATHS or path in ("/openapi.json", "/docs") or path.startswith("/docs/")


class KeyMiddleware:
    """Asks for `Authorization: Bearer <api_key>`, or `X-Api-Key: <api_key>` as Anthropic's clients send it,
    on every path but `OPEN_PATHS` and the documents, which are no secret; 401 without it."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]) and not self._is_allowed(scope):
            await self._refusal(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = dict(reversed(scope["headers"]))  # the first of each name
        is_bearer = is_key(headers.get(b"authorization", b""), self._api_key)
        return is_bearer or is_same(headers.get(b"x-api-key", b""), self._api_key)

    @staticmethod
    def _refusal(scope: Scope) -> Response:
        headers = {"WWW-Authenticate": "Bearer"}
        if exchange_of(scope).is_message:
            return error_response(ApiError(401, "the key is missing or wrong", headers=headers))
        return json_response({"error": "Unauthorized"}, 401, headers=headers)


def may_change_state(request: Request) -> None:
    """Dependency of routes that change state: where no key is asked for, ApiError 403 but for this machine's
    own clients."""
    server = state_of(request).config.server
    if server.api_key:
        return
    peer = request.client.host if request.client else None
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    reason = why_not_changed(peer, host, origin, server.host, server.allowed_origins)
    if reason is not None:
        raise ApiError(403, reason, DENIED)
