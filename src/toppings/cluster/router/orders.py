"""What a plan of homes asks of servers: to read ahead (Toppings), to have an adapter at all (vLLM).

Toppings servers read an adapter that is given a home there from disk. Others list only some adapters: one
that has a home where it is not listed is loaded there, from the path that a server which has it tells, and
what was loaded so is unloaded again where it has no home any more and its place is needed. Nothing is loaded
beyond what a server holds, nothing unloaded that the server was started with, that was loaded by others or
through the router's own administration, or that is in use.
"""

import asyncio
import logging
import math
from urllib.parse import quote

from toppings.cluster.placement import Plan, Untold
from toppings.cluster.router.adapters import AdapterAdmin, failure_of
from toppings.cluster.router.background import start_once
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import CALL_FAILURES, Kind, Upstream

logger = logging.getLogger(__name__)

MAX_ORDERS = 32
"""Homes that servers are told of at once: a plan may change many, and disks are slow. The next plan's turn
comes with what is left."""


class PlacementOrders:
    def __init__(self, state: RouterState, admin: AdapterAdmin) -> None:
        self._state, self._admin = state, admin
        self._untold = Untold()
        self._loads: dict[str, asyncio.Task[None]] = {}  # by server, while it loads something

    @property
    def loads(self) -> list[asyncio.Task[None]]:
        """Under way; whoever stops the router cancels them."""
        return list(self._loads.values())

    async def give(self, plan: Plan) -> None:
        """Whatever servers make of it: one that does not obey reads the adapter when a request comes, or
        leaves it to others. No server's load is waited for; it gets the next one when that is done.
        """
        self._untold.note(plan)
        told = self._untold.take(MAX_ORDERS, self._is_prefetch_due)
        upstreams = self._state.upstreams
        for adapter, homes in plan.known_homes():
            for home in homes:
                upstream = upstreams.get(home)
                if upstream is not None and upstream.kind is Kind.OPENAI and home not in self._loads:
                    self._start_load(adapter, upstream, plan)
        await asyncio.gather(*(self._prefetch(adapter, upstreams[home]) for adapter, home in told))

    def _is_prefetch_due(self, adapter: str, home: str) -> bool:
        upstream = self._state.upstreams.get(home)
        if upstream is None or upstream.kind is not Kind.TOPPINGS or not upstream.serves(adapter):
            return False
        [row] = self._state.fleet.rows_of([home])
        return not self._holds(row, adapter)

    def _holds(self, row: int, adapter: str) -> bool:
        fleet = self._state.fleet
        return adapter in fleet.on_host[row] or adapter in fleet.on_device[row]

    def _path_of(self, adapter: str) -> str | None:
        """As a server that has it tells."""
        cards = (each.cards.by_name.get(adapter) for each in self._state.upstreams.values() if each.cards)
        return next((card.path for card in cards if card is not None and card.path), None)

    async def _prefetch(self, adapter: str, upstream: Upstream) -> None:
        path = f"/adapters/{quote(adapter, safe='/')}/prefetch"
        audit = self._state.audit
        try:
            with audit.change("prefetch", adapter=adapter, instance=upstream.instance_id) as change:
                answer = await upstream.call("POST", path)
                change.failure = failure_of(answer)
            if change.failure:
                logger.info("%s: no prefetch of %s: %d", upstream.instance_id, adapter, answer.status)
        except CALL_FAILURES as error:
            logger.info("%s: no prefetch of %s: %r", upstream.instance_id, adapter, error)

    def _start_load(self, adapter: str, upstream: Upstream, plan: Plan) -> None:
        """What was loaded or unloaded through the router is everywhere, or nowhere, as soon as can be."""
        if upstream.serves(adapter) or adapter in upstream.refused or self._admin.remembers(adapter):
            return
        path = self._path_of(adapter)
        if path is None:
            return
        instance_id = upstream.instance_id
        task = start_once(f"placing on {instance_id}", lambda: self._load(adapter, path, upstream, plan))
        self._loads[instance_id] = task
        task.add_done_callback(lambda _: self._loads.pop(instance_id, None))

    async def _load(self, adapter: str, path: str, upstream: Upstream, plan: Plan) -> None:
        if await self._make_place(upstream, plan):
            await self._admin.place(upstream, adapter, path)

    async def _make_place(self, upstream: Upstream, plan: Plan) -> bool:
        """Whether one more adapter fits beside those that are listed, if need be in place of another."""
        assert upstream.cards is not None
        [row] = self._state.fleet.rows_of([upstream.instance_id])
        limit = upstream.config.max_cpu_loras or float(self._state.fleet.max_adapters[row])
        num_listed = sum(card.adapter is not None for card in upstream.cards.by_name.values())
        if math.isinf(limit) or num_listed > limit:
            return False
        if num_listed < limit:
            return True
        used = self._state.fleet.active[row]
        for adapter in upstream.placed & upstream.cards.by_name.keys():
            if adapter not in used and upstream.instance_id not in plan.homes_of(adapter):
                return await self._admin.displace(upstream, adapter)
        return False
