"""The application: every route over one engine client, registry and tokeniser."""

from collections.abc import Callable

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.routing import Route

from toppings import __version__
from toppings.adapters.registry import AdapterRegistry
from toppings.cluster.perf_model import PerfModel
from toppings.config import Config
from toppings.dashboard.feed import Feed
from toppings.exchanges.exchange import Observer
from toppings.server import (
    admin,
    chat,
    completions,
    dashboard,
    embeddings,
    generate,
    messages,
    models,
    openapi,
    responses,
    tokens,
)
from toppings.server.adapters import AdapterAdmin
from toppings.server.auth import KeyMiddleware, check_role
from toppings.server.catalogue import Catalogue
from toppings.server.errors import install_error_handlers
from toppings.server.exchange import ExchangeMiddleware
from toppings.server.limits import BoundsMiddleware, body_limit
from toppings.server.methods import HeadMiddleware
from toppings.server.metrics import Metrics
from toppings.server.readings import Readings
from toppings.server.resolver import Resolver
from toppings.server.state import Client, ServerState
from toppings.tenants.book import TenantBook
from toppings.text import TextModel

EXPOSED_HEADERS = (
    *("X-Request-Id", "X-Toppings-Ignored", "Retry-After", "Retry-After-Ms"),
    *(
        f"X-RateLimit-{what}-{kind}"
        for what in ("Limit", "Remaining", "Reset")
        for kind in ("Requests", "Tokens")
    ),
)
"""What pages of `allowed_origins` may read of an answer beside its body."""


def create_app(
    client: Client,
    registry: AdapterRegistry,
    text_model: TextModel,
    config: Config,
    perf_model: PerfModel | None = None,
    make_admin: Callable[[ServerState], AdapterAdmin] = AdapterAdmin,
) -> FastAPI:
    """An application that owns none of what it is given; `app.state.toppings` is its ServerState.

    Raises ConfigError where the tenants file cannot be read.
    """
    book = TenantBook(config.server.tenants_file, config.server.api_key)
    book.watch()
    app = FastAPI(
        dependencies=[Depends(check_role)],
        title="Toppings",
        version=__version__,
        description="Many LoRA adapters of one base model.",
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics(client.info.model_name)
    observers: list[Observer] = [metrics.note_exchange]
    state = ServerState(client, registry, text_model, config, metrics, book, perf_model)
    app.state.toppings = state
    app.state.admin = make_admin(state)
    if config.server.adapter_source:
        state.resolver = Resolver(state, app.state.admin)
    app.state.catalogue = Catalogue(state)
    app.state.readings = Readings(state)
    app.state.feed = Feed(app.state.readings.read)
    # Pins come before `/adapters/{name:path}`, whose pattern would take them for part of a name.
    routers = (
        *(admin.router, admin.changing, completions.router, chat.router, generate.router, tokens.router),
        *(messages.router, responses.router, embeddings.router),
        *(models.router, models.changing, openapi.router, dashboard.router),
    )
    for router in routers:
        app.include_router(router)
    openapi.install(app)
    all_routes = (*app.routes, *(route for router in routers for route in router.routes))
    app.state.routes = [route for route in all_routes if isinstance(route, Route)]
    install_error_handlers(app)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(
        BoundsMiddleware,
        max_body_bytes=body_limit(config.server.max_body_bytes, client.info.max_model_len),
        timeout_s=config.server.receive_timeout_s,
    )
    app.add_middleware(KeyMiddleware, book=book)
    if config.server.allowed_origins:  # outside of all: browsers ask beforehand, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.allowed_origins,
            allow_methods=config.server.allowed_methods,
            allow_headers=config.server.allowed_headers,
            allow_credentials=config.server.allow_credentials == "on",
            expose_headers=EXPOSED_HEADERS,
        )
    app.state.observers = observers
    app.add_middleware(ExchangeMiddleware, is_strict=config.server.strict_fields == "on", observers=observers)
    return app
