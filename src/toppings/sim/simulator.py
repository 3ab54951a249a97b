"""The event loop: requests of a trace through routers to servers, on a virtual clock.

Handlers return new events; only the loop has the clock and the queue. Of events at one instant, arrivals
come first, then ends of steps, then reports and rebalancing; a request that arrives as a step ends is in
the next one, and requests that arrive together at an idle server are in one step.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heapify, heappop, heappush, heapreplace

from toppings.bad_input import RequestError
from toppings.cluster.batch_class import Held
from toppings.cluster.snapshot import RequestSnapshot
from toppings.sim.arrivals import Arrivals
from toppings.sim.fleet import make_instances, make_routers
from toppings.sim.records import NEVER, InstanceTotals, Records, SimResult
from toppings.sim.request import SimRequest
from toppings.sim.run import Run
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.trace import Trace

NUM_PROGRESS_CALLS = 100
STEP_END, REPORT, KILL, PLAN, REBALANCE, END_OF_TIME = range(6)
"""Kinds of events; at one instant, in this order."""

NEVER_NS = 1 << 62

Event = tuple[int, int, int, int]
"""Instant, kind, the instance's row, version: plain, since there are millions. An end of steps is void where
the instance's version has moved on. Arrivals are known from the start and need no queue."""


@contextmanager
def _no_collector() -> Iterator[None]:
    """The loop makes no cycles; looking for some takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Simulator:
    """One run over one trace. Raises ValueError where an adapter's rank makes it larger than any server's
    pool.
    """

    def __init__(self, config: SimConfig, trace: Trace) -> None:
        self.config, self.trace = config, trace
        self.arrivals = Arrivals(config, trace)
        self.instances = make_instances(config, trace, self.arrivals)
        self._ids = [f"instance-{i}" for i in range(config.num_instances)]
        self._rows = {instance_id: row for row, instance_id in enumerate(self._ids)}
        self.dispatchers = make_routers(config, self.arrivals, self._ids)
        self._held: list[Held[SimRequest]] = [Held() for _ in self.dispatchers]
        self._held_snapshots: dict[SimRequest, RequestSnapshot] = {}
        self.records = Records(self.arrivals.nums_to_generate)
        self._versions = [0] * config.num_instances
        self._num_arrived = 0
        self._num_present = 0  # arrived, neither ended nor rejected
        self._num_breaking = 0
        self._dead: set[int] = set()
        self._handlers: list[Callable[[Event], Sequence[Event]]] = [
            self._end_step,
            self._report,
            self._kill,
            self._plan,
            self._rebalance,
        ]

    def run(
        self, *, until_s: float = float("inf"), on_progress: Callable[[int], None] | None = None
    ) -> SimResult:
        """Play the trace, to the end of its last request or until an instant of virtual time.

        `on_progress` is now and then given the number of requests that have arrived.
        """
        with _no_collector():
            last_at = self._loop(min(until_s * NS_PER_S, NEVER_NS - 1), on_progress)
            return self._result(last_at)

    def _loop(self, until: float, on_progress: Callable[[int], None] | None) -> int:
        """When the last event was."""
        queue, arrivals = self._first_events(), [*self.arrivals.at_ns, NEVER_NS]
        handlers, versions = self._handlers, self._versions
        progress_every = len(self.trace) // NUM_PROGRESS_CALLS + 1
        last_at = index = 0
        next_arrival = arrivals[0]
        while True:
            event = queue[0]
            at, kind, row, version = event
            if next_arrival <= at:
                if next_arrival > until:
                    return last_at
                last_at = next_arrival
                for new in self._arrive(last_at, index):
                    heappush(queue, new)
                if on_progress is not None and index % progress_every == 0:
                    on_progress(index)
                index += 1
                next_arrival = arrivals[index]
                continue
            if at > until:
                return last_at
            last_at = at
            if kind == STEP_END and version != versions[row]:
                heappop(queue)
                continue
            events = handlers[kind](event)
            if not events:
                heappop(queue)
                continue
            heapreplace(queue, events[0])
            for new in events[1:]:
                heappush(queue, new)

    def _first_events(self) -> list[Event]:
        queue = [(NEVER_NS, END_OF_TIME, 0, 0)]
        if self.arrivals.at_ns:
            queue += [(0, REPORT, row, 0) for row in range(len(self.instances))]
            if self.dispatchers[0].placement is not None:
                queue.append((0, PLAN, 0, 0))
            if 0 < (kill_at := round(self.config.kill_at_s * NS_PER_S)) <= self.arrivals.at_ns[-1]:
                queue.append((kill_at, KILL, len(self.instances) - 1, 0))
            moves = self.dispatchers[0].policy.migrates and len(self.instances) > 1
            if moves or self.config.batch_tenants:
                queue.append((0, REBALANCE, 0, 0))
        heapify(queue)
        return queue

    # --- handlers ---

    def _arrive(self, now: int, index: int) -> Sequence[Event]:
        request = self.arrivals.request(index)
        response_tokens = self.dispatchers[request.router].lengths.expected()
        snapshot = self.arrivals.snapshot(request, response_tokens)
        self._num_arrived += 1
        self._num_present += 1
        return self._place(request, snapshot, now)

    def _place(self, request: SimRequest, snapshot: RequestSnapshot, now: int) -> list[Event]:
        """A batch request is held where there is no room for it, or others are held."""
        held, tenant = self._held[request.router], request.tenant
        is_behind = request.is_batch and held.has(tenant, request.adapter_id)
        events = None if is_behind else self._try(request, snapshot, now)
        if events is None:
            self._held_snapshots[request] = snapshot
            held.add(request, tenant, request.adapter_id, request.weight)
        return events or []

    def _try(self, request: SimRequest, snapshot: RequestSnapshot, now: int) -> list[Event] | None:
        """None where there is no room for it, and it is to wait for some."""
        choice = self.dispatchers[request.router].place(snapshot, now)
        assert choice is not None, "an instance is open"
        if choice.breaks_slo and request.is_batch:
            return None
        self._num_breaking += choice.breaks_slo
        return self._send(request, choice.row, now, now)

    def _look(self, now: int) -> list[Event]:
        """There may be room for what is held."""
        events: list[Event] = []

        def place(request: SimRequest) -> bool:
            new = self._try(request, self._held_snapshots[request], now)
            if new is None:
                return False
            del self._held_snapshots[request]
            events.extend(new)
            return True

        for held in self._held:
            held.look(place)
        return events

    def _end_step(self, event: Event) -> Sequence[Event]:
        now, _, row, _ = event
        instance, dispatchers = self.instances[row], self.dispatchers
        events: list[Event] = []
        if instance.run is not None:
            started, ended = instance.end()
            for request in started:
                self.records.first_token_at[request.index] = now
                dispatchers[request.router].started(request.request_id)
            for request in ended:
                self.records.ended_at[request.index] = now
                dispatchers[request.router].ended(request.request_id, request.num_to_generate, now=now)
            self._num_present -= len(ended)
            if ended:
                events = self._look(now)
        for request in instance.begin(now):
            self._reject(request)
        if instance.run is not None:
            return [self._end_event(row, instance.run), *events]
        wake_at = instance.wake_at()
        return events if wake_at is None else [self._look_event(row, wake_at), *events]

    def _report(self, event: Event) -> Sequence[Event]:
        now, _, row, _ = event
        if row in self._dead:
            return []
        report = self.instances[row].report(now)
        for dispatcher in self.dispatchers:
            dispatcher.report(self._ids[row], report)
        return [*self._again(event, self.config.report_interval_s), *self._look(now)]

    def _kill(self, event: Event) -> Sequence[Event]:
        """The instance dies as it stands: requests without a token are placed anew, all others are lost."""
        now, _, row, _ = event
        instance, instance_id = self.instances[row], self._ids[row]
        self._dead.add(row)
        self._versions[row] += 1
        instance.run = None
        events: list[Event] = []
        for dispatcher in self.dispatchers:
            dispatcher.fleet.set_open(instance_id, False)
        for request in instance.requests():
            dispatcher = self.dispatchers[request.router]
            snapshot = dispatcher.fleet.request(instance_id, request.request_id)
            if self.records.first_token_at[request.index] == NEVER:
                events += self._place(self.arrivals.request(request.index), snapshot, now)
            else:
                self._reject(request)
        return events

    def _plan(self, event: Event) -> Sequence[Event]:
        now = event[0]
        for dispatcher in self.dispatchers:
            plan = dispatcher.planning(now)()
            self.records.num_moves.append(plan.num_moves_from(dispatcher.plan))
            dispatcher.plan = plan
        return self._again(event, self.config.placement_interval_s)

    def _rebalance(self, event: Event) -> Sequence[Event]:
        """Requests that wait on a server move, and those that are held may find room. One whose prefill has
        begun is past moving, unlike for the policy.
        """
        events: list[Event] = []
        now = event[0]
        for dispatcher in self.dispatchers:
            for move in dispatcher.moves():
                source, target = self._rows[move.source_id], self._rows[move.target_id]
                request = self._waiting(source, move.request_id)
                if request is not None:
                    self.instances[source].withdraw(request)
                    dispatcher.sent(dispatcher.fleet.request(move.source_id, move.request_id), move.target_id)
                    events += self._disturb(source, now + 1)
                    events += self._send(request, target, now, now + 1)
        return [*events, *self._again(event, self.config.migration_interval_s), *self._look(now)]

    # --- what handlers share ---

    def _send(self, request: SimRequest, row: int, now: int, before: int) -> list[Event]:
        """Queue it there; steps begin there, or those under way are cut at the first end from `before` on.

        A step that ends at the instant of an arrival has yet to end; at that of a rebalancing it has ended.
        """
        instance = self.instances[row]
        try:
            instance.add(request, now)
        except RequestError:
            self._reject(request)
            return []
        self.records.rows[request.index] = row
        return [self._look_event(row, now)] if instance.run is None else self._disturb(row, before)

    def _disturb(self, row: int, at: int) -> list[Event]:
        """What waits there has changed: the steps under way end with the first to end then or later."""
        run = self.instances[row].run
        return [self._end_event(row, run)] if run is not None and run.cut(at) else []

    def _look_event(self, row: int, at: int) -> Event:
        """An idle instance looks at those that wait: once all that arrive at that instant are there."""
        self._versions[row] += 1
        return at, STEP_END, row, self._versions[row]

    def _end_event(self, row: int, run: Run) -> Event:
        version = self._versions[row] = self._versions[row] + 1
        return run.end_at, STEP_END, row, version

    def _reject(self, request: SimRequest) -> None:
        self.records.is_rejected[request.index] = True
        self._num_present -= 1
        self.dispatchers[request.router].ended(request.request_id)

    def _waiting(self, row: int, request_id: str) -> SimRequest | None:
        for request in self.instances[row].scheduler.waiting:
            if request.request_id == request_id and not request.output_token_ids:
                assert isinstance(request, SimRequest)
                return request
        return None

    def _again(self, event: Event, interval_s: float) -> list[Event]:
        """The same event later, as long as anything else is to come."""
        is_over = not self._num_present and self._num_arrived == len(self.arrivals.at_ns)
        at, kind, row, version = event
        return [] if is_over else [(at + round(interval_s * NS_PER_S), kind, row, version)]

    # --- the end ---

    def _result(self, last_at: int) -> SimResult:
        """Raises AssertionError where a request or time was lost or made up."""
        for instance in self.instances:
            instance.check_integrity()
        for dispatcher in self.dispatchers:
            dispatcher.fleet.check_integrity()
        present = sum(len(i.requests()) for row, i in enumerate(self.instances) if row not in self._dead)
        present += sum(map(len, self._held))
        assert present == self._num_present, f"{present} requests are there, {self._num_present} were counted"
        return self.records.result(
            self.config,
            self.trace,
            arrivals_ns=self.arrivals.at_ns,
            num_arrived=self._num_arrived,
            num_present=present,
            num_breaking=self._num_breaking,
            wall_time=last_at,
            totals=[InstanceTotals.of(instance, last_at) for instance in self.instances],
        )
