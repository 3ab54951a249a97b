"""The router's servers over HTTP: shown, added, drained, removed."""

from typing import Any

import msgspec
from aiohttp import web

from toppings.cluster.router.adapters import require_object
from toppings.cluster.router.bodies import MAX_ADMIN_BYTES, Budget, read_body
from toppings.cluster.router.calls import NO_JSON, not_json
from toppings.cluster.router.guard import Guard
from toppings.cluster.router.middlewares import Handler
from toppings.cluster.router.monitor import Monitor
from toppings.cluster.router.replies import ApiError, json_response
from toppings.cluster.router.settings import InstanceConfig
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.config import ConfigError


class Instances:
    """The handlers of `/instances`."""

    def __init__(self, state: RouterState, monitor: Monitor, guard: Guard, budget: Budget) -> None:
        self._state, self._monitor, self._guard, self._budget = state, monitor, guard, budget

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/instances", self.show),
            ("POST", "/instances", self.add),
            ("POST", "/instances/{id}/drain", self.drain),
            ("DELETE", "/instances/{id}", self.remove),
        ]

    async def show(self, request: web.Request) -> web.Response:
        return json_response({"instances": [self._describe(u) for u in self._state.upstreams.values()]})

    async def add(self, request: web.Request) -> web.Response:
        """Take a server in; one that was drained takes requests again."""
        try:
            config = InstanceConfig.of(await read_change(request, self._guard, self._budget))
        except ConfigError as error:
            raise ApiError(400, str(error)) from error
        known = self._state.upstreams.get(config.instance_id)
        if known is not None and known.config.url != config.url:
            raise ApiError(
                409, f"instance {config.instance_id!r} is another server, {known.config.url}", "Conflict"
            )
        with self._state.audit.change("add instance", instance=config.instance_id, url=config.url):
            return await self._add(config, known)

    async def _add(self, config: InstanceConfig, known: Upstream | None) -> web.Response:
        if known is not None and not known.is_itself:
            known.is_draining = known.is_removed = False
            self._state.refresh_open(known)
            return json_response(self._describe(known))
        upstream = known or self._state.add_instance(config)
        if known is None:
            await self._monitor.take_in(upstream)
        if upstream.is_itself:
            upstream.is_draining = upstream.is_removed = True
            raise ApiError(400, f"{config.url} is this router itself; an instance is a server")
        return json_response(self._describe(upstream), 201)

    async def drain(self, request: web.Request) -> web.Response:
        """No further requests; those that are there end in peace."""
        return json_response(self._describe(self._drain(request, "drain instance")))

    async def remove(self, request: web.Request) -> web.Response:
        """Drain it, and forget it once its last request has ended."""
        upstream = self._drain(request, "remove instance")
        upstream.is_removed = True
        return json_response(self._describe(upstream), 202)

    def _drain(self, request: web.Request, action: str) -> Upstream:
        self._guard.check_may_change(request)
        instance_id = request.match_info["id"]
        upstream = self._state.upstreams.get(instance_id)
        if upstream is None:
            known = ", ".join(self._state.upstreams) or "none"
            raise ApiError(404, f"no instance {instance_id[:128]!r}; there are: {known}", "NotFoundError")
        upstream.is_draining = True
        self._state.refresh_open(upstream)
        self._state.audit.write(action, "done", instance=instance_id, url=upstream.config.url)
        return upstream

    def _describe(self, upstream: Upstream) -> dict[str, Any]:
        snapshot = self._state.fleet.instance(upstream.instance_id)
        requests = (*snapshot.running, *snapshot.waiting)
        return {
            "id": upstream.instance_id,
            "url": upstream.config.url,
            "kind": upstream.kind,
            "is_alive": upstream.is_alive,
            "is_draining": upstream.is_draining,
            "num_in_flight": len(self._state.flights.on(upstream.instance_id)),
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


async def read_change(request: web.Request, guard: Guard, budget: Budget) -> dict[str, Any]:
    """The JSON object that a request for a change brings. Raises ApiError 400, 403, and as `read_body`."""
    guard.check_may_change(request)
    guard.check_json(request)
    with budget.share() as share:
        body = await read_body(request, guard.config, share, MAX_ADMIN_BYTES)
    try:
        return require_object(msgspec.json.decode(body))
    except NO_JSON as error:
        raise not_json(error) from error
