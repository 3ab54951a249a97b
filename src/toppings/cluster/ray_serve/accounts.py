"""What the request router knows of the replicas: their last reports, and what it has sent them since.

No Ray and no clock here: the fleet's accounts, kept from reports, placements and ends.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import PerfModel
from toppings.cluster.policies import Policy
from toppings.cluster.ray_serve.messages import Call, RequestEntry, RoutingStats, origin_of
from toppings.cluster.snapshot import Choice, InstanceSnapshot, RequestSnapshot


@dataclass(slots=True)
class Booking:
    """A request that is on a replica, as far as is known here."""

    replica_id: str
    request: RequestSnapshot
    num_generated: int = 0


class ReplicaAccounts:
    """One per request router. Replicas are known by their ids, requests by theirs."""

    def __init__(self, policy: Policy, perf_model: PerfModel) -> None:
        self.fleet = Fleet()
        self._policy, self._perf_model = policy, perf_model
        self._bookings: dict[str, Booking] = {}
        self._reports: dict[str, RoutingStats] = {}
        self._own_origin = ""

    # --- replicas ---

    def set_replicas(self, reports: Mapping[str, RoutingStats | None]) -> None:
        """These replicas are there, with what they reported last (None: nothing yet)."""
        for replica_id in [each for each in self.fleet.ids if each not in reports]:
            self.drop_replica(replica_id)
        for replica_id, report in reports.items():
            if replica_id not in self.fleet.ids:
                self.fleet.add_instance(InstanceSnapshot(instance_id=replica_id, perf_model=self._perf_model))
            if report is not None and report != self._reports.get(replica_id):
                self._reports[replica_id] = report
                self._apply(replica_id, report)

    def drop_replica(self, replica_id: str) -> None:
        """It has died or is being stopped, and its requests end with it."""
        if replica_id in self.fleet.ids:
            self.fleet.remove_instance(replica_id)
        self._reports.pop(replica_id, None)
        self._bookings = {k: b for k, b in self._bookings.items() if b.replica_id != replica_id}

    def _apply(self, replica_id: str, report: RoutingStats) -> None:
        self.fleet.set_limits(
            replica_id,
            kv_tokens_total=report.kv_tokens_total or math.inf,
            kv_tokens_used=report.kv_tokens_used,
            max_num_seqs=report.max_num_seqs or math.inf,
            max_adapters=report.max_adapters or math.inf,
        )
        bookings = (each for each in self._bookings.values() if each.replica_id == replica_id)
        sent = {each.request.adapter for each in bookings if each.request.adapter is not None}
        self.fleet.set_adapters(replica_id, on_device={*report.on_device, *sent}, on_host=set(report.on_host))
        if report.perf_model is not None:
            self.fleet.set_perf_model(replica_id, PerfModel.from_json(report.perf_model))
        told = {entry.request_id: entry for entry in report.requests}
        self._end_foreign(replica_id, told.keys())
        for entry in report.requests:
            self._note(replica_id, entry)

    def _end_foreign(self, replica_id: str, told: Set[str]) -> None:
        """Others' requests end when their replica tells of them no longer; ours when Serve says so."""
        there = [k for k, booking in self._bookings.items() if booking.replica_id == replica_id]
        for request_id in there:
            if request_id not in told and origin_of(request_id) != self._own_origin:
                self.end(request_id, replica_id)

    def _note(self, replica_id: str, entry: RequestEntry) -> None:
        booking = self._bookings.get(entry.request_id)
        if booking is None and origin_of(entry.request_id) != self._own_origin:
            request = RequestSnapshot(entry.request_id, entry.adapter, entry.rank, entry.prompt_tokens, 1.0)
            booking = self._book(request, replica_id)
        if booking is None or booking.replica_id != replica_id:
            return  # it has ended here meanwhile, or is elsewhere by now
        num_new = entry.num_generated - booking.num_generated
        if num_new <= 0:
            return
        if booking.num_generated == 0:
            self.fleet.start(replica_id, entry.request_id)
        self.fleet.grow(replica_id, entry.request_id, num_new)
        booking.num_generated = entry.num_generated

    # --- requests ---

    def place(self, call: Call, candidates: Set[str]) -> Choice | None:
        """Where a request goes, booked there at once, so that the next one sees it; None without candidates.

        Replicas on which it has failed are passed over while there are others.
        """
        self._own_origin = call.origin
        self.cancel(call.request_id)
        wanted = (candidates - call.avoid) or candidates
        mask = np.array([replica_id in wanted for replica_id in self.fleet.ids], dtype=np.bool_)
        choice = self._policy.choose(call.snapshot, self.fleet.among(mask))
        if choice is not None:
            self._book(call.snapshot, choice.instance_id)
        return choice

    def confirm(self, call: Call, replica_id: str) -> None:
        """Serve has sent the request there, which need not be where it was placed."""
        booking = self._bookings.get(call.request_id)
        if booking is None or booking.replica_id != replica_id:
            self.cancel(call.request_id)
            if replica_id in self.fleet.ids:
                self._book(call.snapshot, replica_id)

    def cancel(self, request_id: str) -> None:
        booking = self._bookings.get(request_id)
        if booking is not None:
            self.end(request_id, booking.replica_id)

    def end(self, request_id: str, replica_id: str) -> None:
        """It has ended there, however; nothing happens where it is booked elsewhere by now."""
        booking = self._bookings.get(request_id)
        if booking is not None and booking.replica_id == replica_id:
            del self._bookings[request_id]
            self.fleet.finish(replica_id, request_id)

    def _book(self, request: RequestSnapshot, replica_id: str) -> Booking:
        self.fleet.enqueue(replica_id, request)
        if request.adapter is not None:
            self.fleet.add_adapter(replica_id, request.adapter)
        booking = self._bookings[request.request_id] = Booking(replica_id, request)
        return booking
