"""The event loop: requests of a trace through routers to servers, on a virtual clock.

Handlers return new events; only the loop has the clock and the queue. Of events at one instant, arrivals
come first, then ends of steps, then reports and rebalancing; a request that arrives as a step ends is in
the next one, and requests that arrive together at an idle server are in one step.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush

from toppings.core import RequestError, SamplingParams
from toppings.sim.dispatch import Dispatcher
from toppings.sim.instance import Instance
from toppings.sim.records import InstanceTotals, Records, SimResult
from toppings.sim.request import SimRequest
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.trace import Trace

ANY = SamplingParams()
"""The scheduler reads no sampling parameters; how long a request runs stands in `SimRequest`."""

NUM_PROGRESS_CALLS = 100


ARRIVAL, STEP_END, REPORT, REBALANCE = range(4)
"""Kinds of events; at one instant, in this order."""

Event = tuple[int, int, int, int]
"""Instant, kind, target, version: plain, since there are millions. The target is the request's index or the
instance's row; an end of steps is void where the instance's version has moved on."""


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
        adapter_bytes = [config.adapter_bytes(rank) for rank in trace.ranks.tolist()]
        self.instances = [Instance(config, adapter_bytes) for _ in range(config.num_instances)]
        self.dispatchers = [
            Dispatcher(config, trace.adapter_names, adapter_bytes, i) for i in range(config.num_routers)
        ]
        self.records = Records(len(trace))
        self._arrivals_ns = [round(at * NS_PER_S) for at in trace.arrivals_s.tolist()]
        columns = (trace.adapters, trace.prompt_tokens, trace.response_tokens)
        self._adapters, self._prompts, self._responses = (column.tolist() for column in columns)
        self._ranks = trace.ranks.tolist()
        self._versions = [0] * config.num_instances
        self._num_arrived = 0
        self._num_present = 0  # arrived, neither ended nor rejected
        self._handlers: list[Callable[[Event], Iterable[Event]]] = [
            self._arrive,
            self._end_step,
            self._report,
            self._rebalance,
        ]

    def run(
        self, *, until_s: float = float("inf"), on_progress: Callable[[int], None] | None = None
    ) -> SimResult:
        """Play the trace, to the end of its last request or until an instant of virtual time.

        `on_progress` is now and then given the number of requests that have arrived.
        """
        with _no_collector():
            last_at = self._loop(until_s * NS_PER_S, on_progress)
        return self._result(last_at)

    def _loop(self, until: float, on_progress: Callable[[int], None] | None) -> int:
        """When the last event was."""
        queue = self._first_events()
        last_at = 0
        progress_every = len(self.trace) // NUM_PROGRESS_CALLS + 1
        handlers = self._handlers
        while queue and queue[0][0] <= until:
            event = heappop(queue)
            last_at, kind, target, _ = event
            for new in handlers[kind](event):
                heappush(queue, new)
            if kind == ARRIVAL and on_progress is not None and target % progress_every == 0:
                on_progress(target)
        return last_at

    def _first_events(self) -> list[Event]:
        if not self._arrivals_ns:
            return []
        queue = [(self._arrivals_ns[0], ARRIVAL, 0, 0)]
        queue += [(0, REPORT, row, 0) for row in range(len(self.instances))]
        if self.dispatchers[0].moves_requests and len(self.instances) > 1:
            queue.append((0, REBALANCE, 0, 0))
        return sorted(queue)

    # --- handlers ---

    def _arrive(self, event: Event) -> Iterable[Event]:
        now, _, index, _ = event
        request = self._request(index)
        row = self._router_of(request).choose(request, now)
        self._num_arrived += 1
        self._num_present += 1
        events = self._send(request, row, now, now)
        if index + 1 < len(self._arrivals_ns):
            events.append((self._arrivals_ns[index + 1], ARRIVAL, index + 1, 0))
        return events

    def _end_step(self, event: Event) -> Iterable[Event]:
        now, _, row, version = event
        if version != self._versions[row]:
            return ()
        instance = self.instances[row]
        if instance.run is not None:
            outcome = instance.end()
            for request in outcome.started:
                self.records.first_token_at[request.index] = now
                self._router_of(request).started(row, request)
            for request in outcome.ended:
                self.records.ended_at[request.index] = now
                self._num_present -= 1
                self._router_of(request).ended(row, request)
        return self._begin(row, now)

    def _report(self, event: Event) -> Iterable[Event]:
        now, _, row, _ = event
        instance = self.instances[row]
        changed = instance.placement.pop_changed()
        for dispatcher in self.dispatchers:
            dispatcher.report(row, instance, changed, now)
        return self._again(event, self.config.report_interval_s)

    def _rebalance(self, event: Event) -> Iterable[Event]:
        """Requests that wait on a server move. One whose prefill has begun is past that, unlike for the
        policy.
        """
        events: list[Event] = []
        now = event[0]
        for dispatcher in self.dispatchers:
            for move in dispatcher.moves():
                source, target = dispatcher.rows_of(move)
                request = self._waiting(source, move.request_id)
                if request is not None:
                    self.instances[source].withdraw(request)
                    dispatcher.move(request, source, target)
                    events += self._disturb(source, now + 1)
                    events += self._send(request, target, now, now + 1)
        return [*events, *self._again(event, self.config.migration_interval_s)]

    # --- what handlers share ---

    def _router_of(self, request: SimRequest) -> Dispatcher:
        return self.dispatchers[request.router]

    def _request(self, index: int) -> SimRequest:
        adapter, prompt = self._adapters[index], self._prompts[index]
        room = self.config.max_model_len - prompt
        return SimRequest(
            str(index),
            range(prompt),  # type: ignore[arg-type]  # its length is all that is ever asked
            ANY,
            adapter,
            float(index),  # the scheduler only compares arrivals; an engine never sees two at one instant
            index=index,
            router=index % len(self.dispatchers),
            rank=self._ranks[adapter],
            num_to_generate=max(1, min(self._responses[index], room)),
        )

    def _send(self, request: SimRequest, row: int, now: int, before: int) -> list[Event]:
        """Queue it there; steps begin there, or those under way are cut at the first end from `before` on.

        A step that ends at the instant of an arrival has yet to end; at that of a rebalancing it has ended.
        """
        instance = self.instances[row]
        try:
            instance.add(request, now)
        except RequestError:
            self._reject(row, request)
            return []
        self.records.sent(request, row)
        if instance.run is None:
            return [self._look_event(row, now)]
        return self._disturb(row, before)

    def _disturb(self, row: int, at: int) -> list[Event]:
        """What waits there has changed: the steps under way end with the first to end then or later."""
        run = self.instances[row].run
        return [self._end_event(row)] if run is not None and run.cut(at) else []

    def _begin(self, row: int, now: int) -> list[Event]:
        instance = self.instances[row]
        for request in instance.begin(now):
            self._reject(row, request)
        if instance.run is not None:
            return [self._end_event(row)]
        wake_at = instance.wake_at()
        return [] if wake_at is None else [self._look_event(row, wake_at)]

    def _look_event(self, row: int, at: int) -> Event:
        """An idle instance looks at those that wait: once all that arrive at that instant are there."""
        self._versions[row] += 1
        return at, STEP_END, row, self._versions[row]

    def _end_event(self, row: int) -> Event:
        run = self.instances[row].run
        assert run is not None
        self._versions[row] += 1
        return run.end_at, STEP_END, row, self._versions[row]

    def _reject(self, row: int, request: SimRequest) -> None:
        self.records.is_rejected[request.index] = True
        self._num_present -= 1
        self._router_of(request).rejected(row, request)

    def _waiting(self, row: int, request_id: str) -> SimRequest | None:
        for request in self.instances[row].scheduler.waiting:
            if request.request_id == request_id and not request.output_token_ids:
                assert isinstance(request, SimRequest)
                return request
        return None

    def _again(self, event: Event, interval_s: float) -> list[Event]:
        """The same event later, as long as anything else is to come."""
        is_over = not self._num_present and self._num_arrived == len(self._arrivals_ns)
        at, kind, target, version = event
        return [] if is_over else [(at + round(interval_s * NS_PER_S), kind, target, version)]

    # --- the end ---

    def _result(self, last_at: int) -> SimResult:
        """Raises AssertionError where a request or time was lost or made up."""
        for instance in self.instances:
            instance.check_integrity()
        for dispatcher in self.dispatchers:
            dispatcher.fleet.check_integrity()
        present = sum(len(i.scheduler.running) + len(i.scheduler.waiting) for i in self.instances)
        assert present == self._num_present, f"{present} requests are there, {self._num_present} were counted"
        return self.records.result(
            self.config,
            self.trace,
            arrivals_ns=self._arrivals_ns,
            num_arrived=self._num_arrived,
            num_present=present,
            num_breaking=sum(dispatcher.num_breaking for dispatcher in self.dispatchers),
            wall_time=last_at,
            totals=[InstanceTotals.of(instance, last_at) for instance in self.instances],
        )
