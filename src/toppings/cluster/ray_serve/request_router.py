"""Serve's request router: it asks one of our policies, over accounts of what is where."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util import metrics

from toppings.cluster.perf_model import PerfModel
from toppings.cluster.placement import NO_PLACEMENT, PlacementSettings, make_placement
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.ray_serve import homes  # as a module: Serve copies this one's globals, not modules
from toppings.cluster.ray_serve.accounts import ReplicaAccounts
from toppings.cluster.ray_serve.messages import Call
from toppings.cluster.report import ServerReport
from toppings.cluster.warm_up import warm_up

logger = logging.getLogger(__name__)


class PolicyRouter(RequestRouter):  # type: ignore[misc] # Ray is not typed here
    """Made by Serve in the front's process, and used from one event loop there."""

    def initialize_state(
        self,
        *,
        policy: str,
        perf_model: str,
        slo_tpt_ms: float | None = None,
        slo_ttft_ms: float | None = None,
        placement: str = NO_PLACEMENT,
        num_copies: int = 2,
        placement_interval_s: float = 2.0,
        sizes_fleet: bool = False,
        seed: int = 0,
    ) -> None:
        """`perf_model` is JSON: the costs of replicas that report none of their own. `sizes_fleet`: find out,
        as often as it plans, how many replicas the demand needs."""
        warm_up(policy)
        tpt_ms, ttft_ms = (math.inf if ms is None else ms for ms in (slo_tpt_ms, slo_ttft_ms))
        settings = PolicySettings(tpt_ms, seed, slo_ttft_ms=ttft_ms)
        placed = make_placement(placement, PlacementSettings(num_copies, tpt_ms))
        self._accounts = ReplicaAccounts(
            make_policy(policy, settings), PerfModel.from_json(perf_model), placed
        )
        self._has_homes, self._sizes_fleet = placed is not None, sizes_fleet
        self._looks_every_s = placement_interval_s
        self._looking: asyncio.Task[None] | None = None
        self._calls: dict[str, Call] = {}  # by Serve's own id of the request
        self._slo_at_risk = metrics.Counter(
            "toppings_slo_at_risk", description="Requests that no replica could take within the objective."
        )

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        reports = {name_of(r.replica_id): read_stats(r.routing_stats) for r in replicas}
        self._accounts.set_replicas(reports)
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._accounts.drop_replica(name_of(replica_id))
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The policy's choice, then all others for the case that Serve finds that one full or gone."""
        call = call_of(pending_request)
        if pending_request is None or call is None:
            return [candidate_replicas]
        if self._looking is None and (self._has_homes or self._sizes_fleet):
            self._looking = asyncio.create_task(self._look_ahead())  # the event loop is here now
        by_name = {name_of(replica.replica_id): replica for replica in candidate_replicas}
        try:
            choice = self._accounts.place(call, by_name.keys(), time.monotonic())
        except Exception:  # Serve would ask again at once and for ever
            logger.exception("request %s: the policy failed; the shortest queue gets it", call.request_id)
            choice = None
        if choice is None:
            return [candidate_replicas]
        self._calls[pending_request.metadata.internal_request_id] = call
        call.sent_to.append(choice.instance_id)  # before it answers: it may never do
        if choice.breaks_slo:
            self._slo_at_risk.inc()
        chosen = by_name.pop(choice.instance_id)
        return [[chosen], list(by_name.values())]

    async def _look_ahead(self) -> None:
        """Where adapters should be, and on how many replicas, again and again."""
        while True:
            await asyncio.sleep(self._looks_every_s)
            try:
                if self._has_homes:
                    plan = await asyncio.to_thread(self._accounts.planning(time.monotonic()))
                    homes.new_homes.tell(self._accounts.obey(plan))
                if self._sizes_fleet:
                    num = await asyncio.to_thread(self._accounts.sizing(time.monotonic()))
                    homes.wanted_replicas.tell(num)
            except Exception:
                logger.exception("adapters and replicas stay as they are: no plan could be made")

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        call = call_of(pending_request)
        if call is not None:
            self._accounts.confirm(call, name_of(replica_id))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        call = self._calls.pop(internal_request_id, None)
        if call is not None:
            self._accounts.end(call.request_id, name_of(replica_id))


def name_of(replica_id: ReplicaID) -> str:
    name: str = replica_id.unique_id
    return name


def call_of(pending_request: PendingRequest | None) -> Call | None:
    """None for what is no request for tokens."""
    args = pending_request.args if pending_request is not None else []
    return args[0] if args and isinstance(args[0], Call) else None


def read_stats(stats: Mapping[str, Any]) -> ServerReport | None:
    """None where the replica has not reported yet."""
    return msgspec.convert(stats, ServerReport) if stats else None
