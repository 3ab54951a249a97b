"""Where requests go, and what is known of those on their way: the brain of the router, of Serve's request
router and of the simulated ones.

    of a request:   place (or sent) -> started -> grown ... -> ended
    of a server:    report

It does no I/O and has no clock: `now` is an argument, in whatever unit its owner counts time. What a change
costs does not grow with the number of requests; a report costs what it tells.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from toppings.cluster.batch_class import SpareTime
from toppings.cluster.fleet import Fleet
from toppings.cluster.instances import BoolArray, Instances
from toppings.cluster.lengths import RESPONSE_TOKENS, ResponseLengths
from toppings.cluster.placement import EMPTY_PLAN, Placement, Plan
from toppings.cluster.placement.demand import DemandMeter
from toppings.cluster.placement.sizing import desired_instances
from toppings.cluster.placement.steering import steer
from toppings.cluster.policies import Policy
from toppings.cluster.prefixes import PrefixIndex
from toppings.cluster.report import RequestEntry, ServerReport
from toppings.cluster.snapshot import Choice, InstanceSnapshot, Move, RequestSnapshot

LIMITS = ("kv_tokens_total", "max_num_seqs", "max_adapters", "adapter_bytes_total")
"""Of a server, that its reports tell."""
MAX_OTHERS = 1000
"""Requests of one rank that came another way and are counted at most: more than any server runs at once."""
MAX_RECENT_ADAPTERS = 64
"""Adapters that a server which does not tell is believed to hold."""


@dataclass(slots=True)
class _Knowledge:
    """Of one server: `others` are the ranks of requests that came another way, by id; `limits` and `model`
    (its performance model) what it told last.
    """

    keeps_model: bool = False
    model: Any = None
    limits: tuple[float | None, ...] = ()
    others: dict[str, int] = field(default_factory=dict)


class Dispatcher:
    """`is_own` says of a request's id whether requests like it are placed here: others are counted where a
    server tells of them. With a `snapshot_interval` it decides on copies of its accounts, made at multiples
    of that, and forgets what it sent since. With a `placement` requests go to their adapters' homes while
    these have room and keep the objective; whoever owns the dispatcher has it plan from time to time.
    `ticks_per_s`: of its instants.
    """

    def __init__(
        self,
        policy: Policy,
        instances: Iterable[InstanceSnapshot] = (),
        *,
        response_tokens: float = RESPONSE_TOKENS,
        snapshot_interval: float = 0,
        is_own: Callable[[str], bool] = lambda request_id: True,
        placement: Placement | None = None,
        ticks_per_s: float = 1.0,
    ) -> None:
        self.policy, self.fleet = policy, Fleet(instances)
        self.placement, self.plan = placement, None if placement is None else EMPTY_PLAN
        self._meter = DemandMeter(ticks_per_s)
        self._spare = SpareTime(policy.settings, ticks_per_s)
        self._prefixes = PrefixIndex()
        self._prefixes.set_instances(self.fleet.ids)
        self.lengths = ResponseLengths(response_tokens)
        self._is_own = is_own
        self._places: dict[str, str] = {}  # of each request on its way, the instance
        self._known = {instance_id: _Knowledge() for instance_id in self.fleet.ids}
        self._recent: dict[str, dict[str, None]] = {}  # of servers that do not tell: adapters sent there last
        self._avoided: dict[str, float] = {}
        self._snapshot_interval, self._snapshot_due_at = snapshot_interval, -math.inf
        self._snapshot: Instances = self.fleet

    # --- instances ---

    def add_instance(self, snapshot: InstanceSnapshot, *, keeps_model: bool = False) -> None:
        """`keeps_model`: its own word on its step costs does not count. Raises ValueError where there is one
        of that id.
        """
        self.fleet.add_instance(snapshot)
        self._prefixes.set_instances(self.fleet.ids)
        self._known[snapshot.instance_id] = _Knowledge(keeps_model)

    def remove_instance(self, instance_id: str) -> None:
        """Forget it and the requests that are there."""
        for request_id in self.fleet.request_ids(instance_id):
            self._places.pop(request_id, None)
        self.fleet.remove_instance(instance_id)
        self._prefixes.set_instances(self.fleet.ids)
        del self._known[instance_id]
        self._recent.pop(instance_id, None)
        self._avoided.pop(instance_id, None)
        self._spare.forget(instance_id)

    def forget_prefixes(self, instance_id: str) -> None:
        """Its cache is empty: it went down."""
        self._prefixes.forget(instance_id)

    def avoid(self, instance_id: str, until: float) -> None:
        """Until then it gets requests only where there is no other."""
        self._avoided[instance_id] = until

    # --- requests ---

    def place(
        self,
        request: RequestSnapshot,
        now: float,
        *,
        among: BoolArray | None = None,
        avoiding: Set[str] = frozenset(),
        within_slo: bool = False,
    ) -> Choice | None:
        """Where the request goes now, and counts from now on. None where none `among` [N] is open.

        Those in `avoiding` are passed over while there are others. `within_slo`: a choice that breaks the
        objectives is told, but nothing counts. So it always is for a batch request where there is no spare
        time (`batch_class.py`).
        """
        if request.request_id in self._places:
            self.ended(request.request_id)
        instances = self._view(now) if self._snapshot_interval else self.fleet
        if self._avoided:
            self._avoided = {each: until for each, until in self._avoided.items() if until > now}
            avoiding = avoiding | self._avoided.keys()
        if avoiding:
            others = ~self.fleet.rows_in(avoiding) & (True if among is None else among)
            among = others if (others & self.fleet.is_open).any() else among
        if not request.is_batch:
            self._meter.note(request, now)
        if among is not None:
            instances = instances.among(among)
        depths = self._prefixes.depths(request.blocks)
        if depths is not None:
            found = np.minimum(depths * request.block_tokens, request.prompt_tokens - 1).round()
            instances = instances.finding(found)
        if self.plan is None or request.adapter is None:
            choice = self.policy.choose(request, instances)
        else:
            homes = self.fleet.rows_of(self.plan.homes_of(request.adapter))
            choice = steer(request, instances, homes, self.policy)
        if choice is None:
            return None
        if request.is_batch:
            num_requests = float(instances.num_requests[choice.row])
            choice = replace(
                choice, breaks_slo=not self._spare.take(request.request_id, choice, num_requests, now)
            )
        if choice.breaks_slo and (within_slo or request.is_batch):
            return choice
        if request.is_batch:
            self._meter.note(request, now)
        request.cached_tokens = 0 if depths is None else int(instances.found_tokens[choice.row])
        self._book(request, choice.instance_id)
        return choice

    # --- placement ---

    def planning(self, now: float) -> Callable[[], Plan]:
        """What finds the next plan, over copies of demand and accounts: it may be called in another thread.
        The dispatcher must have a placement.
        """
        assert self.placement is not None
        demand = self._meter.demand(now).of_adapters()
        return partial(self.placement.plan, demand, self.fleet.frozen(), self.plan)

    def sizing(self, now: float) -> Callable[[], int]:
        """As `planning`: what finds how many servers the demand needs, by the policy's objective."""
        slo_tpt_ms = self.policy.settings.slo_tpt_ms
        return partial(desired_instances, self._meter.demand(now), self.fleet.frozen(), slo_tpt_ms)

    def _view(self, now: float) -> Instances:
        """The latest copy of the accounts."""
        if now >= self._snapshot_due_at:
            self._snapshot = self.fleet.frozen()
            self._snapshot_due_at = (now // self._snapshot_interval + 1) * self._snapshot_interval
        return self._snapshot

    def sent(self, request: RequestSnapshot, instance_id: str) -> None:
        """The request is there from now on, wherever it was before."""
        if self._places.get(request.request_id) != instance_id:
            self.ended(request.request_id)
            request.cached_tokens = 0
            self._book(request, instance_id)

    def _book(self, request: RequestSnapshot, instance_id: str) -> None:
        """It waits there, and its adapter is believed to be there soon."""
        adapter = request.adapter
        self._places[request.request_id] = instance_id
        row = self.fleet.enqueue(instance_id, request)
        if request.blocks:
            num_cached = float(self.fleet.kv_tokens_total[row]) / request.block_tokens
            self._prefixes.note(instance_id, request.blocks, num_cached)
        if adapter is None:
            return
        self.fleet.on_device[row].add(adapter)
        if self._recent and (recent := self._recent.get(instance_id)) is not None:
            recent.pop(adapter, None)
            recent[adapter] = None
            if len(recent) > MAX_RECENT_ADAPTERS:
                del recent[next(iter(recent))]

    def place_of(self, request_id: str) -> str | None:
        """The instance where it is; None where it is not on its way."""
        return self._places.get(request_id)

    def started(self, request_id: str) -> None:
        """It got its first token: it waits no longer."""
        self.fleet.start(self._places[request_id], request_id)

    def grown(self, request_id: str, num_tokens: int) -> None:
        """It generated so many more."""
        self.fleet.grow(self._places[request_id], request_id, num_tokens)

    def ended(self, request_id: str, num_tokens: int | None = None, *, now: float | None = None) -> None:
        """It has left, however; `num_tokens` is the length of a response that is whole. Where `now` is told,
        what a batch request has not used of its booking is free again."""
        instance_id = self._places.pop(request_id, None)
        if instance_id is not None:
            self.fleet.finish(instance_id, request_id)
            if now is not None:
                self._spare.ended(request_id, instance_id, now)
        if num_tokens is not None:
            self.lengths.note(num_tokens)

    def moves(self) -> list[Move]:
        """What of ours should wait elsewhere, by the policy; whoever moves a request tells by `sent`."""
        return [move for move in self.policy.migrations(self.fleet) if move.request_id in self._places]

    # --- what servers tell ---

    def own_ranks(self, instance_id: str) -> Counter[int]:
        """Of the requests there that were placed here: how many of each rank."""
        return Counter(self.fleet.ranks(instance_id)) - Counter(self._known[instance_id].others.values())

    def report(
        self,
        instance_id: str,
        report: ServerReport,
        *,
        own_then: Counter[int] | None = None,
        other_rank: int = 0,
    ) -> None:
        """Take over what a server told. Requests that it has beyond ours came by another way.

        `own_then` is `own_ranks` of when it was asked; `other_rank` that of others whose rank is not told.
        """
        self._note_limits(instance_id, report)
        if report.requests is None:
            others = self._others(instance_id, report, own_then, other_rank)
        else:
            others = self._note_requests(instance_id, report.requests) if report.requests else {}
        if others or self._known[instance_id].others:
            self._set_others(instance_id, others)
        self._note_adapters(instance_id, report)

    def _note_limits(self, instance_id: str, report: ServerReport) -> None:
        known = self._known[instance_id]
        self.fleet.set_limits(instance_id, kv_tokens_used=report.kv_tokens_used)
        limits = tuple(getattr(report, name) for name in LIMITS)
        if limits != known.limits:
            known.limits = limits
            told = [math.inf if limit is None else limit for limit in limits]
            self.fleet.set_limits(instance_id, **dict(zip(LIMITS, told, strict=True)))
        if report.perf_model != known.model and not known.keeps_model:
            known.model, model = report.perf_model, report.read_perf_model()
            if model is not None:
                self.fleet.set_perf_model(instance_id, model)

    def _note_adapters(self, instance_id: str, report: ServerReport) -> None:
        """It holds what it says, and soon what requests that are there need."""
        if report.on_host is not None:
            self.fleet.set_on_host(instance_id, report.on_host)
        if report.on_device is None:
            return
        on_device = set(report.on_device)
        on_device.update(self.fleet.adapters(instance_id))
        if report.requests is None:
            on_device.difference_update(map(_nameless, self._known[instance_id].others.values()))
            if report.running_ranks is None:
                on_device.update(self._recent.setdefault(instance_id, {}))
        self.fleet.set_on_device(instance_id, on_device)

    def _note_requests(self, instance_id: str, told: list[RequestEntry]) -> dict[str, RequestEntry]:
        """What ours have generated; those that are others'."""
        others: dict[str, RequestEntry] = {}
        for entry in told:
            place = self._places.get(entry.request_id)
            if place == instance_id:
                self.fleet.grow_to(instance_id, entry.request_id, entry.num_generated)
            elif place is None and not self._is_own(entry.request_id):
                others[entry.request_id] = entry
        return others

    def _others(
        self, instance_id: str, report: ServerReport, own_then: Counter[int] | None, other_rank: int
    ) -> dict[str, RequestEntry]:
        """As many as it tells of beyond ours, made up: they run, for adapters of their rank."""
        own, ranks = self.own_ranks(instance_id) | (own_then or Counter()), report.ranks
        counts = Counter({other_rank: report.num_requests - own.total()}) if ranks is None else ranks - own
        return {
            f"other {rank} {i}": RequestEntry(f"other {rank} {i}", _nameless(rank), rank, 0, 1)
            for rank, num in counts.items()
            for i in range(min(num, MAX_OTHERS))
        }

    def _set_others(self, instance_id: str, told: dict[str, RequestEntry]) -> None:
        """Others' requests end when their server tells of them no longer."""
        known = self._known[instance_id].others
        for request_id in known.keys() - told.keys():
            self.fleet.finish(instance_id, request_id)
            del known[request_id]
        for request_id, entry in told.items():
            if request_id not in known:
                request = RequestSnapshot(request_id, entry.adapter, entry.rank, entry.prompt_tokens, 1.0)
                self.fleet.enqueue(instance_id, request)
                known[request_id] = entry.rank
            self.fleet.grow_to(instance_id, request_id, entry.num_generated)


def _nameless(rank: int) -> str | None:
    """The adapter of a request of which nothing but the rank is known."""
    return f"other {rank}" if rank else None
