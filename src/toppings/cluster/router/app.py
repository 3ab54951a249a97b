"""The router's routes and its life: `run_router` serves until it is told to stop."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from toppings import __version__
from toppings.access import is_key, is_same, why_not_changed, why_not_json
from toppings.cluster.router import replies
from toppings.cluster.router.adapters import LOAD, UNLOAD, AdapterAdmin, require_object
from toppings.cluster.router.bodies import MAX_ADMIN_BYTES, Budget, read_body
from toppings.cluster.router.calls import INFERENCE_PATHS, NO_JSON, Call, not_json, parse_call
from toppings.cluster.router.cards import Card, Cards
from toppings.cluster.router.connections import listen
from toppings.cluster.router.forward import forward
from toppings.cluster.router.middlewares import LAYERS, Handler, add_id
from toppings.cluster.router.monitor import Monitor
from toppings.cluster.router.replies import ApiError, json_response
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import ROUTER_HEADER, Answer, Upstream
from toppings.config import ConfigError
from toppings.open_files import raise_file_limit

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready", "/ping"})
IDLE_CONNECTION_S = 3.0  # below what servers keep idle connections for, so that few are found closed
UNKNOWN_MODEL_REFRESH_S = 1.0
SHUTDOWN_S = 30.0  # that requests in flight get


class Router:
    """The handlers, over one state."""

    def __init__(self, state: RouterState) -> None:
        self.state = state
        self.admin = AdapterAdmin(state)
        self.monitor = Monitor(state, self.admin)
        self._budget = Budget(state.config.max_buffered_bytes)
        self._changes: set[asyncio.Task[Answer]] = set()
        self._refreshed_at = 0.0

    def routes(self) -> list[web.RouteDef]:
        plain: list[tuple[str, str, Handler]] = [
            *(("POST", path, self.infer) for path in INFERENCE_PATHS),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{name:.+}", self.get_model),
            ("POST", LOAD, self.load_adapter),
            ("POST", UNLOAD, self.unload_adapter),
            ("GET", "/instances", self.list_instances),
            ("POST", "/instances", self.add_instance),
            ("POST", "/instances/{id}/drain", self.drain_instance),
            ("DELETE", "/instances/{id}", self.remove_instance),
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
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                return error.response(request.path)
            except (asyncio.CancelledError, ConnectionError):
                raise  # the client has left
            except Exception:
                logger.exception("%s %s failed", request.method, request.path)
                failure = ApiError(500, "the router failed; its log says why", "InternalServerError")
                return failure.response(request.path)

        return guarded

    def _check_key(self, request: web.Request) -> None:
        key = self.state.config.api_key
        if not key or request.path in OPEN_PATHS:
            return
        names = ("Authorization", "X-Api-Key")
        bearer, plain = (request.headers.get(n, "").encode("utf-8", "surrogateescape") for n in names)
        if not (is_key(bearer, key) or is_same(plain, key)):
            raise Unauthorized

    # --- inference ---

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """One request from receipt to its one outcome, which is counted."""
        meters, outcome = self.state.meters, "refused"
        meters.received.inc()
        try:
            with self._budget.share() as share:
                body = await read_body(request, self.state.config, share)
                call = parse_call(request.path, body, self.state.config.bytes_per_token)
                await self._check_model(call)
                flight = self.state.make_flight(call)
                response = await forward(self.state, request, flight)
            outcome = "cut" if flight.is_cut else "answered" if response.status < 500 else "refused"
            return response
        except (asyncio.CancelledError, ConnectionError):
            outcome = "client_gone"
            raise
        finally:
            meters.ended.labels(outcome).inc()

    async def _check_model(self, call: Call) -> None:
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
            raise replies.unknown_model(call.model, self._base_names())

    def _base_names(self) -> list[str]:
        return list(dict.fromkeys(name for cards in self._cards() for name in cards.bases))

    def _cards(self) -> list[Cards]:
        """The servers' models; open servers come first."""
        upstreams = sorted(
            self.state.upstreams.values(), key=lambda u: not (u.is_alive and not u.is_draining)
        )
        return [upstream.cards for upstream in upstreams if upstream.cards is not None]

    async def list_models(self, request: web.Request) -> web.Response:
        """Each name once; where several servers have it, the first one's card."""
        cards: dict[str, Card] = {}
        for each in reversed(self._cards()):
            cards = each.by_name | {name: card for name, card in cards.items() if name not in each}
        return json_response({"object": "list", "data": [card.raw for card in cards.values()]})

    async def get_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        found = next((cards.by_name[name] for cards in self._cards() if name in cards), None)
        if found is None:
            raise replies.unknown_model(name, self._base_names())
        return json_response(found.raw)

    # --- adapters ---

    async def load_adapter(self, request: web.Request) -> web.Response:
        return await self._change(request, self.admin.load)

    async def unload_adapter(self, request: web.Request) -> web.Response:
        return await self._change(request, self.admin.unload)

    async def _change(
        self, request: web.Request, change: Callable[[dict[str, Any]], Coroutine[Any, Any, Answer]]
    ) -> web.Response:
        """It goes on where the client leaves: half of it done would be remembered by nobody."""
        task = asyncio.create_task(change(await self._read_change(request)))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        answer = await asyncio.shield(task)
        return web.Response(body=answer.body, status=answer.status, headers=_plain_headers(answer.status))

    async def _read_change(self, request: web.Request) -> dict[str, Any]:
        self._check_may_change(request)
        names = [name.lower() for name in request.headers]
        has_key = bool(self.state.config.api_key)
        reason = why_not_json(request.headers.get("Content-Type", ""), names, has_key=has_key)
        if reason is not None:
            raise ApiError(400, f"1 validation error:\n  body: {reason}", "Bad Request")
        with self._budget.share() as share:
            body = await read_body(request, self.state.config, share, MAX_ADMIN_BYTES)
        try:
            return require_object(msgspec.json.decode(body))
        except NO_JSON as error:
            raise not_json(error) from error

    def _check_may_change(self, request: web.Request) -> None:
        """Raises ApiError 403."""
        config = self.state.config
        if config.api_key:
            return
        headers = request.headers
        host, origin = headers.get("Host", ""), headers.get("Origin")
        reason = why_not_changed(request.remote, host, origin, config.host)
        if reason is not None:
            raise ApiError(403, reason, "PermissionDeniedError")

    # --- instances ---

    async def list_instances(self, request: web.Request) -> web.Response:
        return json_response({"instances": [self._describe(u) for u in self.state.upstreams.values()]})

    async def add_instance(self, request: web.Request) -> web.Response:
        """Take a server in; one that was drained takes requests again."""
        try:
            config = InstanceConfig.of(await self._read_change(request))
        except ConfigError as error:
            raise ApiError(400, str(error)) from error
        known = self.state.upstreams.get(config.instance_id)
        if known is not None and known.config.url != config.url:
            raise ApiError(
                409, f"instance {config.instance_id!r} is another server, {known.config.url}", "Conflict"
            )
        if known is not None and not known.is_itself:
            known.is_draining = known.is_removed = False
            self.state.refresh_open(known)
            return json_response(self._describe(known))
        upstream = known or self.state.add_instance(config)
        if known is None:
            await self.monitor.take_in(upstream)
        if upstream.is_itself:
            upstream.is_draining = upstream.is_removed = True
            raise ApiError(400, f"{config.url} is this router itself; an instance is a server")
        return json_response(self._describe(upstream), 201)

    async def drain_instance(self, request: web.Request) -> web.Response:
        """No further requests; those that are there end in peace."""
        return json_response(self._describe(self._drain(request)))

    async def remove_instance(self, request: web.Request) -> web.Response:
        """Drain it, and forget it once its last request has ended."""
        upstream = self._drain(request)
        upstream.is_removed = True
        return json_response(self._describe(upstream), 202)

    def _drain(self, request: web.Request) -> Upstream:
        self._check_may_change(request)
        instance_id = request.match_info["id"]
        upstream = self.state.upstreams.get(instance_id)
        if upstream is None:
            known = ", ".join(self.state.upstreams) or "none"
            raise ApiError(404, f"no instance {instance_id[:128]!r}; there are: {known}", "NotFoundError")
        upstream.is_draining = True
        self.state.refresh_open(upstream)
        return upstream

    def _describe(self, upstream: Upstream) -> dict[str, Any]:
        snapshot = self.state.fleet.instance(upstream.instance_id)
        requests = (*snapshot.running, *snapshot.waiting)
        return {
            "id": upstream.instance_id,
            "url": upstream.config.url,
            "kind": upstream.kind,
            "is_alive": upstream.is_alive,
            "is_draining": upstream.is_draining,
            "num_in_flight": len(self.state.flights.on(upstream.instance_id)),
            "num_running": len(snapshot.running),
            "num_waiting": len(snapshot.waiting),
            "ranks": sorted(request.rank for request in requests),
            "adapters_on_device": sorted(snapshot.on_device),
            "perf_model": {
                "decode_form": snapshot.perf_model.decode_form,
                "prefill_form": snapshot.perf_model.prefill_form,
                "origin": snapshot.perf_model.origin,
            },
        }

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


class Unauthorized(ApiError):
    """A missing or wrong key; the body's `error` is a string, as clients of these servers know it."""

    def __init__(self) -> None:
        super().__init__(401, "Unauthorized")

    def response(self, path: str = "") -> web.Response:
        if path.startswith(replies.MESSAGES):
            return super().response(path)
        return json_response({"error": "Unauthorized"}, 401)


def _plain_headers(status: int) -> dict[str, str]:
    return {"Content-Type": "application/json" if status >= 400 else "text/plain; charset=utf-8"}


@asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[tuple[Router, str]]:
    """A router that serves while the context is open, and its base URL."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        state = RouterState(config, session)
        for instance in config.instances:
            state.add_instance(instance)
        router = Router(state)
        app = web.Application(client_max_size=config.max_body_bytes, middlewares=LAYERS)
        app.on_response_prepare.append(add_id)
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
        try:
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


def run_router(config: RouterConfig) -> None:
    """Serve until SIGINT or SIGTERM: requests in flight then get 30 s to end."""
    raise_file_limit()
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    asyncio.run(_serve(config))


async def _serve(config: RouterConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with running_router(config) as (_, url):
        logger.info("Router running on %s", url)
        await stop.wait()
