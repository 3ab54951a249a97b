"""What runs beside the requests: a watch over each server, the policy's rebalancing of what waits, and plans
of where adapters should be.
"""

import asyncio
import logging
import time

from toppings.cluster.router.adapters import AdapterAdmin
from toppings.cluster.router.background import start_loop, start_once
from toppings.cluster.router.orders import PlacementOrders
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import CALL_FAILURES, Health, Kind, Upstream
from toppings.open_files import is_out_of_files

logger = logging.getLogger(__name__)


class Monitor:
    """One task per server, so that one that hangs delays no other's check.

    A check never waits for what changes a server's adapters: that is a task of its own.
    """

    def __init__(self, state: RouterState, admin: AdapterAdmin) -> None:
        self._state, self._admin = state, admin
        self.orders = PlacementOrders(state, admin)
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._syncs: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at every server once, then go on in the background."""
        await asyncio.gather(*(self.take_in(upstream) for upstream in self._state.upstreams.values()))
        config = self._state.config
        self._loops.append(start_loop("rebalancing", config.migration_interval_s, self._rebalance))
        self._loops.append(start_loop("sizing", config.placement_interval_s, self._size))
        if self._state.dispatcher.placement is not None:
            self._loops.append(start_loop("placement", config.placement_interval_s, self.plan))

    async def take_in(self, upstream: Upstream) -> None:
        """Watch a server from now on. Returns when it was checked and, where it is up, has the adapters.

        One that takes longer than `health_timeout_s` over them is opened in the background. It is watched,
        too, where whoever asked for that leaves before.
        """
        try:
            await self.check(upstream)
            sync = self._syncs.get(upstream.instance_id)
            if sync is not None:
                await asyncio.wait([sync], timeout=self._state.config.health_timeout_s)
        finally:
            name, interval_s = f"the watch over {upstream.instance_id}", self._state.config.health_interval_s
            self._watches[upstream.instance_id] = start_loop(name, interval_s, lambda: self._watch(upstream))

    async def stop(self) -> None:
        tasks = [*self._watches.values(), *self._syncs.values(), *self._loops, *self.orders.loads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def check(self, upstream: Upstream) -> None:
        """Is it there, and how busy is it? One that was away is brought up to date before it is opened."""
        health = await upstream.check_health()
        if health is Health.UNASKED:
            logger.error("%s is not checked: the router has too many files open", upstream.instance_id)
            return
        if health is Health.ITSELF and not upstream.is_itself:
            upstream.is_itself = True
            logger.error("%s is this router itself; it gets no requests", upstream.instance_id)
        if health is not Health.OK:
            self._state.note_failure(upstream, is_silent=health is Health.SILENT)
            return
        upstream.num_failures = 0
        self._start_sync(upstream)
        if not upstream.is_alive:
            return
        try:
            if upstream.kind is Kind.UNKNOWN:
                await self._detect_again(upstream)
            own_ranks = self._state.dispatcher.own_ranks(upstream.instance_id)
            report = await upstream.ask_report()
            if report is not None:
                self._state.apply_report(upstream, report, own_ranks)
        except CALL_FAILURES as error:
            logger.info("%s: its report cannot be had: %r", upstream.instance_id, error)
            self._note_failure(upstream, error)

    async def _detect_again(self, upstream: Upstream) -> None:
        """It was opened while its `/stats` failed. What a Toppings server has more to tell is asked soon."""
        await upstream.detect_kind()
        if upstream.kind is not Kind.UNKNOWN:
            logger.info("%s is known now (%s)", upstream.instance_id, upstream.kind)
            upstream.synced_at = None

    def _start_sync(self, upstream: Upstream) -> None:
        """Where it is due, and not going on already."""
        instance_id, now = upstream.instance_id, time.monotonic()
        is_due = upstream.synced_at is None or now - upstream.synced_at >= self._state.config.sync_interval_s
        if instance_id in self._syncs or (upstream.is_alive and not is_due):
            return
        task = start_once(f"bringing {instance_id} up to date", lambda: self._bring_up_to_date(upstream))
        self._syncs[instance_id] = task
        task.add_done_callback(lambda _: self._syncs.pop(instance_id, None))

    async def _bring_up_to_date(self, upstream: Upstream) -> None:
        try:
            if not upstream.is_alive:
                upstream.kind = Kind.UNKNOWN
                await upstream.detect_kind()
            upstream.synced_at = time.monotonic()  # a change that does not reach it meanwhile takes that back
            await self._admin.sync(upstream)
            if not upstream.is_alive:
                await self._open(upstream)
        except CALL_FAILURES as error:
            logger.info("%s: it cannot be brought up to date: %r", upstream.instance_id, error)
            upstream.synced_at = None
            self._note_failure(upstream, error)

    def _note_failure(self, upstream: Upstream, error: BaseException) -> None:
        if not is_out_of_files(error):
            self._state.note_failure(upstream)

    async def _open(self, upstream: Upstream) -> None:
        report = await upstream.ask_report()
        logger.info("%s is up (%s)", upstream.instance_id, upstream.kind)
        if report is None or report.perf_model is None:
            self._state.tell_of_assumed_costs(upstream)
        upstream.is_alive, upstream.num_failures, upstream.num_errors = True, 0, 0
        self._state.refresh_open(upstream)
        if report is not None:
            self._state.apply_report(upstream, report)

    async def _watch(self, upstream: Upstream) -> bool:
        instance_id = upstream.instance_id
        if not upstream.is_removed or self._state.flights.on(instance_id):
            await self.check(upstream)
            return True
        sync = self._syncs.get(instance_id)
        if sync is not None:
            sync.cancel()
        del self._watches[instance_id]
        self._state.remove_instance(instance_id)
        return False

    async def _rebalance(self) -> bool:
        rebalance(self._state)
        self._state.holding.look()
        return True

    async def _size(self) -> bool:
        """How many servers there should be."""
        sizing = self._state.dispatcher.sizing(time.monotonic())
        self._state.meters.desired_instances.set(await asyncio.to_thread(sizing))
        return True

    async def plan(self) -> bool:
        """Where adapters should be from now on. Finding it takes up to a second, in a thread of its own."""
        dispatcher = self._state.dispatcher
        plan = await asyncio.to_thread(dispatcher.planning(time.monotonic()))
        before, dispatcher.plan = dispatcher.plan, plan
        self._state.meters.placement_moves.inc(plan.num_moves_from(before))
        await self.orders.give(plan)
        return True


def rebalance(state: RouterState) -> None:
    """Ask the policy what should wait elsewhere, and send it there."""
    for flight, target_id in list(state.flights.to_move()):
        if state.upstreams[target_id].serves(flight.call.model):
            flight.move_to = target_id
            flight.interrupt()
