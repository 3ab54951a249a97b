"""What runs beside the requests: a watch over each server, and the policy's rebalancing of what waits."""

import asyncio
import logging
import time

from toppings.cluster.router.adapters import AdapterAdmin
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import CALL_FAILURES, Kind, Upstream

logger = logging.getLogger(__name__)


class Monitor:
    """One task per server, so that one that hangs delays no other's check."""

    def __init__(self, state: RouterState, admin: AdapterAdmin) -> None:
        self._state, self._admin = state, admin
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._rebalancing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look at every server once, then go on in the background."""
        await asyncio.gather(*(self.check(upstream) for upstream in self._state.upstreams.values()))
        for upstream in self._state.upstreams.values():
            self.watch(upstream)
        self._rebalancing = asyncio.create_task(self._rebalance_for_ever())

    def watch(self, upstream: Upstream) -> None:
        self._watches[upstream.instance_id] = asyncio.create_task(self._watch_for_ever(upstream))

    async def stop(self) -> None:
        tasks = [*self._watches.values(), *([self._rebalancing] if self._rebalancing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self, upstream: Upstream) -> None:
        """Is it there, what does it hold, how busy is it; one that was away is brought up to date first."""
        if not await upstream.is_healthy():
            self._state.note_failure(upstream)
            return
        try:
            await self._bring_up_to_date(upstream)
            if not upstream.is_alive:
                logger.info("%s is up (%s)", upstream.instance_id, upstream.kind)
                upstream.is_alive, upstream.num_failures, upstream.num_errors = True, 0, 0
                self._state.refresh_open(upstream)
            own_ranks = self._state.own_ranks(upstream.instance_id)
            report = await upstream.read_report()
            if report is not None:
                self._state.apply_report(upstream, report, own_ranks)
        except CALL_FAILURES as error:
            logger.info("%s: check failed: %r", upstream.instance_id, error)
            self._state.note_failure(upstream)

    async def _bring_up_to_date(self, upstream: Upstream) -> None:
        now = time.monotonic()
        if not upstream.is_alive:
            upstream.kind = Kind.UNKNOWN
            await upstream.detect_kind()
        elif upstream.synced_at is not None and now - upstream.synced_at < self._state.config.sync_interval_s:
            return
        await self._admin.sync(upstream)
        upstream.synced_at = now

    async def _watch_for_ever(self, upstream: Upstream) -> None:
        instance_id = upstream.instance_id
        while True:
            await asyncio.sleep(self._state.config.health_interval_s)
            if upstream.is_removed and not self._state.num_in_flight(instance_id):
                del self._watches[instance_id]
                self._state.remove_instance(instance_id)
                return
            try:
                await self.check(upstream)
            except Exception:  # a fault of ours in one check must not end the watch
                logger.exception("%s: the check itself failed", instance_id)

    async def _rebalance_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._state.config.migration_interval_s)
            try:
                rebalance(self._state)
            except Exception:
                logger.exception("rebalancing failed")


def rebalance(state: RouterState) -> None:
    """Ask the policy what should wait elsewhere, and send it there."""
    for move in state.policy.migrations(state.fleet):
        flight = state.flights.get(move.request_id)
        if flight is None or flight.deadline is None or flight.instance_id != move.source_id:
            continue
        if flight.call.is_stream and state.upstreams[move.target_id].serves(flight.call.model):
            flight.move_to = move.target_id
            flight.interrupt()
