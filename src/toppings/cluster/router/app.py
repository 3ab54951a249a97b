"""The router's routes and its life: `run_router` serves until it is told to stop."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from toppings import __version__
from toppings.cluster.router import replies
from toppings.cluster.router.adapters import LOAD, UNLOAD, AdapterAdmin, failure_of
from toppings.cluster.router.bodies import Budget, read_body
from toppings.cluster.router.calls import INFERENCE_PATHS, MAX_NAME_LEN, TOKEN_PATHS, Call, parse_call
from toppings.cluster.router.cards import Card, Cards, seen_by
from toppings.cluster.router.connections import listen
from toppings.cluster.router.dashboard import Dashboard
from toppings.cluster.router.exchange import EXCHANGE, account_of, current_exchange
from toppings.cluster.router.forward import forward, tracing
from toppings.cluster.router.guard import Guard, check_load, check_use
from toppings.cluster.router.instances import Instances, read_change
from toppings.cluster.router.middlewares import Handler, add_id, layers
from toppings.cluster.router.monitor import Monitor
from toppings.cluster.router.records import keeping_records
from toppings.cluster.router.replies import ApiError, json_response
from toppings.cluster.router.settings import RouterConfig
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import ROUTER_HEADER, Answer
from toppings.config import OFF
from toppings.exchanges.log_lines import NamingFormatter
from toppings.log_files import LOG_FORMAT, log_handlers
from toppings.open_files import raise_file_limit
from toppings.slo import SLO_CLASS_HEADER, is_batch
from toppings.stop import Stop
from toppings.tenants.account import Account, Place
from toppings.tenants.refusals import Refusal
from toppings.tenants.tenant import Tenant
from toppings.tracing import open_tracing

logger = logging.getLogger(__name__)

IDLE_CONNECTION_S = 3.0  # below what servers keep idle connections for, so that few are found closed
UNKNOWN_MODEL_REFRESH_S = 1.0
SHUTDOWN_S = 30.0  # that requests in flight get
RECORDS = "router"  # in log_dir


AdapterChange = Callable[[dict[str, Any], Tenant], Coroutine[Any, Any, Answer]]


class Router:
    """The handlers, over one state."""

    def __init__(self, state: RouterState) -> None:
        self.state = state
        self.guard = Guard(state.config)
        self.admin = AdapterAdmin(state)
        self.monitor = Monitor(state, self.admin)
        self.dashboard = Dashboard(state)
        self.budget = Budget(state.config.max_buffered_bytes)
        self._instances = Instances(state, self.monitor, self.guard, self.budget)
        self._changes: set[asyncio.Task[Answer]] = set()
        self._refreshed_at = 0.0

    def routes(self) -> list[web.RouteDef]:
        plain: list[tuple[str, str, Handler]] = [
            *(("POST", path, self.infer) for path in INFERENCE_PATHS),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{name:.+}", self.get_model),
            ("POST", LOAD, self.load_adapter),
            ("POST", UNLOAD, self.unload_adapter),
            *self._instances.routes(),
            *self.dashboard.routes(),
            ("GET", "/health", self.health),
            ("GET", "/healthz", self.health),
            ("GET", "/ready", self.ready),
            *((method, "/ping", self.health) for method in ("GET", "POST")),
            ("GET", "/version", self.version),
            ("GET", "/metrics", self.metrics),
        ]
        plain += [("HEAD", path, handler) for method, path, handler in plain if method == "GET"]
        return [web.route(method, path, self._guarded(handler)) for method, path, handler in plain]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self.guard.admit(request)
                return await handler(request)
            except Refusal as refusal:
                if refusal.status == 429:
                    request[EXCHANGE].rejected_by = "tenant"
                return ApiError.of(refusal).response(request.path)
            except ApiError as error:
                if error.status == 429:
                    request[EXCHANGE].rejected_by = "objectives"
                return error.response(request.path)
            except (asyncio.CancelledError, ConnectionError):
                raise  # the client has left
            except Exception:
                logger.exception("%s %s failed", request.method, request.path)
                failure = ApiError(500, "the router failed; its log says why", "InternalServerError")
                return failure.response(request.path)

        return guarded

    # --- inference ---

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """One request from receipt to its answer; its outcome is counted when it is over."""
        exchange = request[EXCHANGE]
        exchange.is_received = True
        self.state.meters.received.inc()
        with self.budget.share() as share:
            body = await read_body(request, self.state.config, share)
            config = self.state.config
            names_blocks = config.prefix_routing != OFF
            call = parse_call(request.path, body, config.bytes_per_token, names_blocks=names_blocks)
            account, exchange.model = account_of(request), (call.model or "")[:MAX_NAME_LEN]
            if not account.tenant.is_admin:
                check_use(account.tenant, call, self._base_names())
            has_time = is_of_batch(request, account.tenant)
            await self._check_model(call, account.tenant)
            with closing_place(account, call) as place:
                flight = self.state.make_flight(call, place, exchange, is_batch=has_time)
                response = await forward(self.state, request, flight)
        if response.status == 429:
            exchange.rejected_by = "servers"
        if response.status >= 400:
            exchange.error = f"{flight.server} answered {response.status}"
        return response

    async def _check_model(self, call: Call, tenant: Tenant) -> None:
        """Raises ApiError 404 for a model that no server has, after asking them once more."""
        if call.path.startswith("/generate") or call.model is None or self.state.is_known(call.model):
            return
        now = time.monotonic()
        is_due = now - self._refreshed_at >= UNKNOWN_MODEL_REFRESH_S
        if is_due:
            self._refreshed_at = now
        if is_due or self.admin.is_refreshing:
            await self.admin.refresh()
        if not self.state.is_known(call.model):
            raise self._unknown(tenant, call.model)

    def _unknown(self, tenant: Tenant, model: str) -> ApiError:
        return replies.unknown_model(model, self._base_names() if tenant.may_see(None) else [])

    def _base_names(self) -> list[str]:
        return list(dict.fromkeys(name for cards in self._cards() for name in cards.bases))

    def _cards(self) -> list[Cards]:
        """The servers' models; open servers come first."""
        upstreams = sorted(
            self.state.upstreams.values(), key=lambda u: not (u.is_alive and not u.is_draining)
        )
        return [upstream.cards for upstream in upstreams if upstream.cards is not None]

    async def list_models(self, request: web.Request) -> web.Response:
        """Each name that the tenant may see once; where several servers have it, the first one's card."""
        cards: dict[str, Card] = {}
        tenant = account_of(request).tenant
        for each in reversed(self._cards()):
            cards = each.by_name | {name: card for name, card in cards.items() if name not in each}
        seen = await seen_by(tenant, list(cards.values()))
        return json_response({"object": "list", "data": seen})

    async def get_model(self, request: web.Request) -> web.Response:
        name, tenant = request.match_info["name"], account_of(request).tenant
        found = next((cards.by_name[name] for cards in self._cards() if name in cards), None)
        if found is None or not tenant.may_see(found.adapter):
            raise self._unknown(tenant, name)
        return json_response(found.told(tenant))

    # --- adapters ---

    async def load_adapter(self, request: web.Request) -> web.Response:
        return await self._change(request, "load", self.admin.load)

    async def unload_adapter(self, request: web.Request) -> web.Response:
        return await self._change(request, "unload", self.admin.unload)

    async def _change(self, request: web.Request, action: str, change: AdapterChange) -> web.Response:
        """It goes on where the client leaves: half of it done would be remembered by nobody."""
        body, tenant = await read_change(request, self.guard, self.budget), account_of(request).tenant
        check_load(tenant, request.path, body)
        task = asyncio.create_task(self._audited(action, body, change(body, tenant)))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        answer = await asyncio.shield(task)
        return web.Response(body=answer.body, status=answer.status, headers=_plain_headers(answer.status))

    async def _audited(self, action: str, body: dict[str, Any], change: Awaitable[Answer]) -> Answer:
        what = {"adapter": body.get("lora_name"), "path": body.get("lora_path")}
        told = {key: str(value) for key, value in what.items() if value is not None}
        with self.state.audit.change(action, **told) as noted:
            answer = await change
            noted.failure = failure_of(answer)
        return answer

    # --- itself ---

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(headers={ROUTER_HEADER: self.state.router_id})

    async def version(self, request: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def ready(self, request: web.Request) -> web.Response:
        if not self.state.fleet.is_open.any():
            raise replies.unavailable("no server is up", self.state.config.retry_after_s)
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self.state.meters.render(), headers=headers)


@contextmanager
def closing_place(account: Account, call: Call) -> Iterator[Place]:
    """What a request takes of its tenant's limits: of the prompt's tokens an estimate, and of its answer's as
    many as it may have. Raises Refusal 429."""
    place = account.enter(1)
    try:
        if call.path not in TOKEN_PATHS:
            place.take(call.prompt_tokens, call.reserved_tokens)
        yield place
    finally:
        place.leave()


def is_of_batch(request: web.Request, tenant: Tenant) -> bool:
    """Whether it may wait for room. Raises ApiError 400 for a class that there is not."""
    try:
        is_of_class = is_batch(request.headers.get(SLO_CLASS_HEADER), tenant.slo_class)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    return is_of_class and request.path not in TOKEN_PATHS


def _plain_headers(status: int) -> dict[str, str]:
    return {"Content-Type": "application/json" if status >= 400 else "text/plain; charset=utf-8"}


@asynccontextmanager
async def running_router(
    config: RouterConfig, records: Path | None = None
) -> AsyncIterator[tuple[Router, str]]:
    """A router that serves while the context is open, and its base URL. What it writes down of requests and
    changes goes to the directory `records`."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s)
    options: dict[str, Any] = {"timeout": timeout, "auto_decompress": False, "trace_configs": [tracing()]}
    async with aiohttp.ClientSession(connector=connector, **options) as session:
        state = RouterState(config, session)
        state.tracing = open_tracing(config.otlp_traces_endpoint, "toppings-router")
        for instance in config.instances:
            state.add_instance(instance)
        router = Router(state)
        app = web.Application(client_max_size=config.max_body_bytes, middlewares=layers(state))
        app.on_response_prepare.append(add_id)
        app.on_shutdown.extend((router.dashboard.close, state.holding.close, router.budget.close))
        app.add_routes(router.routes())
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
            auto_decompress=False,
        )
        await runner.setup()
        listener: asyncio.Server | None = None
        with keeping_records(state, router.guard.book, records):
            try:
                router.guard.book.watch()
                await router.monitor.start()
                limits = {"head_timeout_s": config.head_timeout_s, "write_timeout_s": config.write_timeout_s}
                listener = await listen(runner, host=config.host, port=config.port, **limits)
                host, port = listener.sockets[0].getsockname()[:2]
                yield router, f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                if listener is not None:
                    listener.close()
                await runner.cleanup()
                await router.monitor.stop()
                state.tracing.close()


def run_router(config: RouterConfig) -> None:
    """Serve until SIGINT or SIGTERM: requests in flight then get 30 s to end."""
    raise_file_limit()
    handlers = log_handlers("", 0)  # a pipe that nobody reads holds up no request
    for handler in handlers:
        handler.setFormatter(NamingFormatter(LOG_FORMAT, current_exchange.get))
    logging.basicConfig(level=config.log_level.upper(), handlers=handlers)
    asyncio.run(_serve(config))


async def _serve(config: RouterConfig) -> None:
    stop = Stop(SHUTDOWN_S)
    with stop.on_signals():
        async with running_router(config, Path(config.log_dir) / RECORDS) as (_, url):
            logger.info("Router running on %s", url)
            await stop.or_done()
