"""Who may ask what: the keys, and loopback only for what changes state where none is asked for."""

from fastapi import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from toppings.access import why_not_changed
from toppings.dashboard.page import is_page
from toppings.exchanges.exchange import UNCOUNTED
from toppings.server.errors import ApiError, describe, error_response
from toppings.server.exchange import exchange_of
from toppings.server.state import state_of
from toppings.tenants.book import TENANT_HEADER, TenantBook
from toppings.tenants.refusals import Refusal, denied
from toppings.tenants.tenant import Tenant

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/ping"})
TENANT_PATHS = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses"),
        *("/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/embeddings", "/v1/score", "/score", "/generate", "/generate_stream"),
        *("/tokenize", "/detokenize", "/v1/models", "/v1/models/{name:path}"),
        *("/adapters", "/adapters/{name:path}", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        *("/load_lora_adapter", "/unload_lora_adapter", "/version"),
    }
)
"""Routes for every key; what they answer and do is bounded by the tenant. All others are administrators'."""
DENIED = "PermissionDeniedError"
TENANT_NAME = TENANT_HEADER.lower().encode()


def is_open(path: str) -> bool:
    """A document of the API, and the dashboard's page, are the same on every server of this version."""
    is_document = path in ("/openapi.json", "/docs") or path.startswith("/docs/")
    return path in OPEN_PATHS or is_document or is_page(path)


class KeyMiddleware:
    """Finds out who asks, on every path that is not open (`is_open`), and counts the request, unless
    its route is not for them.

    401 without a key where one is asked for, 429 for a tenant's request that is one too many; nothing of its
    body has been read then.
    """

    def __init__(self, app: ASGIApp, book: TenantBook) -> None:
        self._app, self._book = app, book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(exchange_of(scope).path):
            try:
                self._admit(scope)
            except Refusal as refusal:
                await error_response(describe(refusal), exchange_of(scope))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = dict(reversed(scope["headers"]))  # the first of each name
        given = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        account = exchange_of(scope).identify(self._book, *given, headers.get(TENANT_NAME))
        if scope["method"] not in UNCOUNTED and (account.tenant.is_admin or is_for_tenants(scope)):
            account.take_request()


def is_for_tenants(scope: Scope) -> bool:
    """Whether it leads to a route of `TENANT_PATHS`; what tenants are refused uses up no limit."""
    routes = scope["app"].state.routes
    return next((r.path for r in routes if r.matches(scope)[0] is Match.FULL), "") in TENANT_PATHS


def check_role(request: Request) -> None:
    """Dependency of all routes. Raises Refusal: 403 for a tenant on a route that is not in `TENANT_PATHS`,
    401 for who is not known on one that is not open."""
    path = request.scope["route"].path
    if is_open(path):
        return
    is_admin = tenant_of(request).is_admin
    if not (is_admin or path in TENANT_PATHS):
        raise denied(f"{request.method} {exchange_of(request.scope).path} is for administrators")


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    return state_of(request).account.tenant


def check_may_load(request: Request, adapter: str, *, pins: bool = False) -> Tenant:
    """Who asks. Raises Refusal 403 where it is not theirs to load, unload or (`pins`) pin an adapter of this
    name, whether there is one or not."""
    tenant = tenant_of(request)
    if not tenant.may_load(adapter):
        raise denied(f"tenant `{tenant.name}` may not load or unload adapter `{adapter}`")
    if pins and not tenant.is_admin:
        raise denied("pinning is for administrators")
    return tenant


def may_change_state(request: Request) -> None:
    """Dependency of routes that change state: where no key is asked for, ApiError 403 but for this machine's
    own clients."""
    server = state_of(request).config.server
    if server.asks_for_keys:
        return
    peer = request.client.host if request.client else None
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    reason = why_not_changed(peer, host, origin, server.host, server.allowed_origins)
    if reason is not None:
        raise ApiError(403, reason, DENIED)
