"""The router's routes and its life: `run_router` serves until it is told to stop."""

import asyncio
import hmac
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp import web

from toppings.cluster.router import replies
from toppings.cluster.router.adapters import LOAD, UNLOAD, AdapterAdmin, require_object
from toppings.cluster.router.calls import INFERENCE_PATHS, Call, parse_call
from toppings.cluster.router.forward import forward
from toppings.cluster.router.monitor import Monitor
from toppings.cluster.router.replies import ApiError, json_response
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.config import ConfigError

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/healthz", "/ready"})
IDLE_CONNECTION_S = 3.0  # below what servers keep idle connections for, so that few are found closed
UNKNOWN_MODEL_REFRESH_S = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Router:
    """The handlers, over one state."""

    def __init__(self, state: RouterState) -> None:
        self.state = state
        self.admin = AdapterAdmin(state)
        self.monitor = Monitor(state, self.admin)
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
            ("GET", "/metrics", self.metrics),
        ]
        return [web.route(method, path, self._guarded(handler)) for method, path, handler in plain]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                return error.response()
            except web.HTTPRequestEntityTooLarge:
                limit = self.state.config.max_body_bytes
                return ApiError(413, f"the body is longer than {limit} bytes", "Bad Request").response()

        return guarded

    def _check_key(self, request: web.Request) -> None:
        key = self.state.config.api_key
        if not key or request.path in OPEN_PATHS:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Unauthorized

    # --- inference ---

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """One request from receipt to its one outcome, which is counted."""
        meters, outcome = self.state.meters, "refused"
        meters.received.inc()
        try:
            call = parse_call(request.path, await request.read(), self.state.config.bytes_per_token)
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
        if now - self._refreshed_at >= UNKNOWN_MODEL_REFRESH_S:
            self._refreshed_at = now
            await self.admin.refresh()
        if not self.state.is_known(call.model):
            raise replies.unknown_model(call.model, self._base_names())

    def _base_names(self) -> list[str]:
        cards = self._cards().values()
        return [card["id"] for card in cards if not card.get("parent")]

    def _cards(self) -> dict[str, dict[str, Any]]:
        """The servers' models by name; where several have one, the first open server's card."""
        upstreams = sorted(
            self.state.upstreams.values(), key=lambda u: not (u.is_alive and not u.is_draining)
        )
        cards: dict[str, dict[str, Any]] = {}
        for upstream in upstreams:
            for name, card in (upstream.cards or {}).items():
                cards.setdefault(name, card)
        return cards

    async def list_models(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": list(self._cards().values())})

    async def get_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        card = self._cards().get(name)
        if card is None:
            raise replies.unknown_model(name, self._base_names())
        return json_response(card)

    # --- adapters ---

    async def load_adapter(self, request: web.Request) -> web.Response:
        answer = await self.admin.load(await self._read_change(request))
        return web.Response(body=answer.body, status=answer.status, headers=_plain_headers(answer.status))

    async def unload_adapter(self, request: web.Request) -> web.Response:
        answer = await self.admin.unload(await self._read_change(request))
        return web.Response(body=answer.body, status=answer.status, headers=_plain_headers(answer.status))

    async def _read_change(self, request: web.Request) -> dict[str, Any]:
        self._check_may_change(request)
        if request.content_type != "application/json":
            raise ApiError(400, "1 validation error:\n  the body must be application/json", "Bad Request")
        try:
            return require_object(msgspec.json.decode(await request.read()))
        except msgspec.DecodeError as error:
            raise ApiError(400, f"1 validation error:\n  body: {error}", "Bad Request") from error

    def _check_may_change(self, request: web.Request) -> None:
        """Without a key: this machine only, and no foreign web page. Raises ApiError 403."""
        if self.state.config.api_key:
            return
        if not _is_loopback(request.remote):
            text = (
                "this route changes the fleet; without a configured api_key it answers loopback clients only"
            )
            raise ApiError(403, text, "PermissionDeniedError")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
            raise ApiError(
                403, f"requests from web pages of {origin} may not change state", "PermissionDeniedError"
            )

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
        if known is not None:
            known.is_draining = known.is_removed = False
            self.state.refresh_open(known)
            return json_response(self._describe(known))
        upstream = self.state.add_instance(config)
        await self.monitor.check(upstream)
        self.monitor.watch(upstream)
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
            raise ApiError(404, f"no instance {instance_id!r}; there are: {known}", "NotFoundError")
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
            "num_in_flight": self.state.num_in_flight(upstream.instance_id),
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
        return web.Response()

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

    def response(self) -> web.Response:
        return json_response({"error": "Unauthorized"}, 401)


def _plain_headers(status: int) -> dict[str, str]:
    return {"Content-Type": "application/json" if status >= 400 else "text/plain; charset=utf-8"}


def _is_loopback(host: str | None) -> bool:
    try:
        address = ip_address(host or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Unknown routes and wrong methods as `{"detail": ...}`."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        text = "Not Found" if error.status == 404 else "Method Not Allowed"
        return json_response({"detail": text}, error.status, allow)


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
        app = web.Application(client_max_size=config.max_body_bytes, middlewares=[_plain_errors])
        app.add_routes(router.routes())
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=30.0)
        await runner.setup()
        try:
            await router.monitor.start()
            site = web.TCPSite(runner, config.host, config.port)
            await site.start()
            host, port = runner.addresses[0][:2]
            yield router, f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            await runner.cleanup()
            await router.monitor.stop()


def run_router(config: RouterConfig) -> None:
    """Serve until SIGINT or SIGTERM: requests in flight then get 30 s to end."""
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
