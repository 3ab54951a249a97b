"""Who may ask the router what: keys, roles and limits; and loopback only for changes without keys."""

import os
from typing import Any

from aiohttp import web

from toppings.access import why_not_changed, why_not_json
from toppings.cluster.router import replies
from toppings.cluster.router.adapters import LOAD, UNLOAD
from toppings.cluster.router.calls import INFERENCE_PATHS, MAX_NAME_LEN, Call
from toppings.cluster.router.exchange import EXCHANGE
from toppings.cluster.router.replies import ApiError
from toppings.cluster.router.settings import RouterConfig
from toppings.dashboard.page import is_page
from toppings.exchanges.exchange import UNCOUNTED
from toppings.tenants.book import TENANT_HEADER, TenantBook
from toppings.tenants.refusals import denied, no_access
from toppings.tenants.tenant import Tenant

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/ping"})
TENANT_PATHS = frozenset({*INFERENCE_PATHS, "/v1/models", "/v1/models/{name}", LOAD, UNLOAD, "/version"})
"""Routes for every key; all others are administrators'."""


class Guard:
    """Raises ConfigError where the tenants file cannot be read."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.book = TenantBook(config.tenants_file, config.api_key)

    def admit(self, request: web.Request) -> None:
        """Notes who asks (`account_of`). Raises Refusal: 401, 403 for a route that is not theirs, 429."""
        if request.path in OPEN_PATHS or is_page(request.path):
            return
        given = (
            request.headers[name].encode("utf-8", "surrogateescape") if name in request.headers else None
            for name in ("Authorization", "X-Api-Key", TENANT_HEADER)
        )
        authorization, plain, delegated = given
        account = request[EXCHANGE].identify(self.book, authorization or b"", plain or b"", delegated)
        resource = request.match_info.route.resource
        path = request.path if resource is None else resource.canonical
        if not account.tenant.is_admin and path not in TENANT_PATHS:
            raise denied(f"{request.method} {request.path} is for administrators")
        if request.method not in UNCOUNTED:
            account.take_request()

    def check_may_change(self, request: web.Request) -> None:
        """Where no key is asked for: raises ApiError 403."""
        if self.book.asks_for_keys:
            return
        headers = request.headers
        host, origin = headers.get("Host", ""), headers.get("Origin")
        reason = why_not_changed(request.remote, host, origin, self.config.host)
        if reason is not None:
            raise ApiError(403, reason, "PermissionDeniedError")

    def check_json(self, request: web.Request) -> None:
        """Raises ApiError 400 for a body that a web page could have sent unasked."""
        names = [name.lower() for name in request.headers]
        content_type = request.headers.get("Content-Type", "")
        reason = why_not_json(content_type, names, has_key=self.book.asks_for_keys)
        if reason is not None:
            raise ApiError(400, f"1 validation error:\n  body: {reason}")


def check_use(tenant: Tenant, call: Call, bases: list[str]) -> None:
    """Raises ApiError 404 for a model that the tenant may not see, as for one that there is not, Refusal 403
    for one that it may not use. `bases` are the base models' names."""
    if call.wrong:  # a server might read more of it than we can
        raise ApiError(400, f"1 validation error:\n  body: {call.wrong}")
    for name in call.selectors or (call.model,):
        adapter = None if name in bases else name
        if len(name or "") > MAX_NAME_LEN:
            raise replies.unknown_model(name or "", bases if tenant.may_see(None) else [])
        if not tenant.may_use(adapter):
            told = name or "the base model"
            if tenant.may_see(adapter):
                raise no_access(tenant.name, told)
            raise replies.unknown_model(told, bases if tenant.may_see(None) else [])


def check_load(tenant: Tenant, path: str, body: dict[str, Any]) -> None:
    """Raises Refusal 403 for an adapter that is not the tenant's to load or unload, and for a place that it
    may not load from; servers check that again with links followed."""
    name, place = str(body.get("lora_name")), str(body.get("lora_path"))
    if len(name) > MAX_NAME_LEN or not tenant.may_load(name):
        raise denied(f"tenant `{tenant.name}` may not load or unload adapter `{name}`")
    place = os.path.normpath(place) if place.startswith("/") else place
    if path == LOAD and not tenant.may_load_from(place):
        problem = f"tenant `{tenant.name}` may not load adapters from `{place}`"
        raise denied(f"{problem}: no pattern of its load_from fits")
