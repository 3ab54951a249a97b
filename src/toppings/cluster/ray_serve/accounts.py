"""The dispatcher of Serve's request router: which replicas there are, and where a request went in the end, is
what Serve says. No Ray here.
"""

from collections.abc import Callable, Mapping, Set

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.perf_model import PerfModel
from toppings.cluster.placement import Placement, Plan, Untold
from toppings.cluster.policies import Policy
from toppings.cluster.ray_serve.homes import MAX_ORDERS, Homes, by_adapter
from toppings.cluster.ray_serve.messages import Call, origin_of
from toppings.cluster.report import ServerReport
from toppings.cluster.snapshot import Choice, InstanceSnapshot


class ReplicaAccounts:
    """One per request router. Replicas are known by their ids, requests by theirs."""

    def __init__(self, policy: Policy, perf_model: PerfModel, placement: Placement | None = None) -> None:
        self._own_origin = ""
        self._dispatcher = Dispatcher(
            policy, is_own=lambda each: origin_of(each) == self._own_origin, placement=placement
        )
        self.fleet = self._dispatcher.fleet
        self._perf_model = perf_model
        self._untold = Untold()
        self._reports: dict[str, ServerReport] = {}

    def set_replicas(self, reports: Mapping[str, ServerReport | None]) -> None:
        """These replicas are there, with what they reported last (None: nothing yet)."""
        for replica_id in [each for each in self.fleet.ids if each not in reports]:
            self.drop_replica(replica_id)
        for replica_id, report in reports.items():
            if replica_id not in self.fleet.ids:
                snapshot = InstanceSnapshot(instance_id=replica_id, perf_model=self._perf_model)
                self._dispatcher.add_instance(snapshot)
            if report is not None and report != self._reports.get(replica_id):
                self._reports[replica_id] = report
                self._dispatcher.report(replica_id, report)

    def drop_replica(self, replica_id: str) -> None:
        """It has died or is being stopped, and its requests end with it."""
        if replica_id in self.fleet.ids:
            self._dispatcher.remove_instance(replica_id)
        self._reports.pop(replica_id, None)

    def place(self, call: Call, candidates: Set[str], now: float) -> Choice | None:
        """Where a request goes, booked there at once, so that the next one sees it; None without candidates.

        Replicas on which it has failed are passed over while there are others.
        """
        self._own_origin = call.origin
        among = self.fleet.rows_in(candidates)
        return self._dispatcher.place(call.snapshot, now, among=among, avoiding=call.avoid)

    # --- what is found out from time to time; a plan only where there is a placement ---

    def planning(self, now: float) -> Callable[[], Plan]:
        """What finds the next plan; it may be called in another thread."""
        return self._dispatcher.planning(now)

    def obey(self, plan: Plan) -> Homes:
        """Requests follow it from now on; the homes to be told of: up to `MAX_ORDERS` that plans have added
        and that replicas do not hold the adapter at, in host memory or on the device."""
        self._untold.note(plan)
        self._dispatcher.plan = plan
        return by_adapter(self._untold.take(MAX_ORDERS, self._is_missing))

    def _is_missing(self, adapter: str, replica_id: str) -> bool:
        fleet = self.fleet
        if replica_id not in fleet.ids:
            return False
        [row] = fleet.rows_of([replica_id])
        return adapter not in fleet.on_device[row] and adapter not in fleet.on_host[row]

    def sizing(self, now: float) -> Callable[[], int]:
        """What finds how many replicas the demand needs; with or without a placement, and in any thread."""
        return self._dispatcher.sizing(now)

    # --- requests ---

    def confirm(self, call: Call, replica_id: str) -> None:
        """Serve has sent the request there, which need not be where it was placed."""
        if replica_id in self.fleet.ids:
            self._dispatcher.sent(call.snapshot, replica_id)
        else:
            self._dispatcher.ended(call.request_id)

    def end(self, request_id: str, replica_id: str) -> None:
        """It has ended there, however; nothing happens where it is booked elsewhere by now."""
        if self._dispatcher.place_of(request_id) == replica_id:
            self._dispatcher.ended(request_id)
