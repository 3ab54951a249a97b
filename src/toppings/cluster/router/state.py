"""The router's knowledge: the fleet's accounts, the servers behind them, what is in flight. No HTTP here."""

import logging
import time
from collections import Counter
from itertools import count

import aiohttp
import numpy as np

from toppings.cluster.fleet import Fleet
from toppings.cluster.instances import BoolArray
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.router.calls import Call
from toppings.cluster.router.directory import AdapterDirectory
from toppings.cluster.router.flight import Flight, end_wait
from toppings.cluster.router.meters import Meters
from toppings.cluster.router.reports import Report
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.cluster.router.upstream import Upstream
from toppings.cluster.snapshot import Choice, InstanceSnapshot, RequestSnapshot
from toppings.cluster.warm_up import warm_up

logger = logging.getLogger(__name__)

ERRORS_BEFORE_COOLING = 3
COOLING_TIME_S = 5.0
MAX_RECENT_ADAPTERS = 64.0
MAX_MASKS = 10_000
MAX_FOREIGN = 1000
"""Requests of one rank that came another way and are counted at most: more than any server runs at once."""
RESPONSE_MEMORY = 1000
"""The mean response length weighs about the last so many responses."""


class RouterState:
    def __init__(self, config: RouterConfig, session: aiohttp.ClientSession) -> None:
        self.config, self.session = config, session
        self.policy = make_policy(
            config.policy, PolicySettings(config.slo_tpt_ms, config.seed, config.candidates)
        )
        warm_up(config.policy)
        self.fleet = Fleet()
        self.upstreams: dict[str, Upstream] = {}
        self.directory = AdapterDirectory(config.default_rank)
        self.flights: dict[str, Flight] = {}
        self.meters = Meters()
        self.mean_response_tokens = config.response_tokens
        self._num_responses = 1
        self._ids = count()
        self._masks: dict[str | None, BoolArray] = {}
        self._cooling: set[Upstream] = set()

    # --- instances ---

    def add_instance(self, instance: InstanceConfig) -> Upstream:
        """Raises ValueError where the id is taken."""
        model = load_perf_model(instance.perf_model or self.config.perf_model)
        snapshot = InstanceSnapshot(instance_id=instance.instance_id, perf_model=model, is_open=False)
        self.fleet.add_instance(snapshot)
        upstream = Upstream(instance, self.config, self.session)
        self.upstreams[instance.instance_id] = upstream
        self.models_changed()
        self.refresh_open(upstream)
        return upstream

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance that has no request of ours."""
        self.fleet.remove_instance(instance_id)
        del self.upstreams[instance_id]
        self.meters.forget(instance_id)
        self.models_changed()

    def refresh_open(self, upstream: Upstream) -> None:
        """To be called after `is_alive` or `is_draining` changed."""
        upstream.is_silent = upstream.is_silent and not upstream.is_alive
        is_open = upstream.is_alive and not upstream.is_draining
        self.fleet.set_open(upstream.instance_id, is_open)
        self.meters.is_up.labels(upstream.instance_id).set(is_open)

    def models_changed(self) -> None:
        self._masks.clear()

    def note_failure(self, upstream: Upstream, *, is_gone: bool = False, is_silent: bool = False) -> None:
        """The server did not answer; after enough failures in a row, or if nobody listens, it is down.

        What waits there for its first token then goes elsewhere. One of which nothing at all is heard also
        ends its streams, unless they go on within `health_timeout_s`, and the changes of its adapters.
        """
        upstream.num_failures += 1
        if upstream.is_alive and (is_gone or upstream.num_failures >= self.config.unhealthy_after):
            logger.warning("%s is down", upstream.instance_id)
            upstream.is_alive = False
            self.refresh_open(upstream)
            for flight in list(upstream.flights.values()):
                flight.interrupt()
        if not upstream.is_alive and (is_gone or is_silent):
            upstream.is_silent = True
            for flight in upstream.flights.values():
                flight.hurry(self.idle_limit_s(upstream))
            for wait in upstream.waits:
                end_wait(wait)

    def idle_limit_s(self, upstream: Upstream) -> float:
        """How long a stream may say nothing."""
        limit_s = self.config.idle_timeout_s
        return min(limit_s, self.config.health_timeout_s) if upstream.is_silent else limit_s

    def note_status(self, upstream: Upstream, status: int) -> None:
        """It answered. One that fails with 5xx in a row is passed over for a while, if there are others."""
        upstream.num_failures = 0
        upstream.num_errors = upstream.num_errors + 1 if status >= 500 else 0
        if upstream.num_errors >= ERRORS_BEFORE_COOLING:
            upstream.cooling_until = time.monotonic() + COOLING_TIME_S
            self._cooling.add(upstream)

    def apply_report(self, upstream: Upstream, report: Report, own_ranks: Counter[int]) -> None:
        """Take over what the server told; `own_ranks` is what we had there when it was asked.

        Requests that it has beyond ours came by another way: they count as running ones.
        """
        instance_id = upstream.instance_id
        self.fleet.set_limits(
            instance_id,
            kv_tokens_total=report.kv_tokens_total,
            kv_tokens_used=report.kv_tokens_used,
            max_num_seqs=report.max_num_seqs,
            max_adapters=report.max_adapters,
        )
        if report.perf_model is not None and not upstream.config.perf_model:
            self.fleet.set_perf_model(instance_id, report.perf_model)
        on_device = set(report.on_device)
        if report.ranks is None:
            on_device |= upstream.recent_adapters.keys()
        self.fleet.set_adapters(instance_id, on_device=on_device, on_host=set(report.on_host))
        self._set_foreign(upstream, self._foreign_ranks(report, own_ranks | upstream.ranks))

    def _foreign_ranks(self, report: Report, own: Counter[int]) -> Counter[int]:
        if report.ranks is not None:
            return report.ranks - own
        known = [self.directory.get(name).rank for name in report.adapters_in_use]
        rank = round(sum(known) / len(known)) if known else 0
        return Counter({rank: max(0, report.num_requests - own.total())})

    def _set_foreign(self, upstream: Upstream, ranks: Counter[int]) -> None:
        """Only what changed is touched; of a rank at most `MAX_FOREIGN` are counted."""
        instance_id, present = upstream.instance_id, upstream.foreign
        for rank in {*ranks, *present}:
            had, wanted = present.pop(rank, 0), min(ranks[rank], MAX_FOREIGN)
            for i in range(wanted, had):
                self.fleet.finish(instance_id, f"foreign {rank} {i}")
            for i in range(had, wanted):
                adapter = f"foreign {rank}" if rank else None
                request = RequestSnapshot(f"foreign {rank} {i}", adapter, rank, 0, 1.0)
                self.fleet.enqueue(instance_id, request)
                self.fleet.start(instance_id, request.request_id)
            if wanted:
                present[rank] = wanted

    # --- requests ---

    def make_flight(self, call: Call) -> Flight:
        info = self.directory.get(call.model) if call.model and self.is_adapter(call.model) else None
        response_tokens = max(1.0, min(call.max_tokens or np.inf, self.mean_response_tokens))
        request = RequestSnapshot(
            request_id=str(next(self._ids)),
            adapter=call.model if info else None,
            rank=info.rank if info else 0,
            prompt_tokens=call.prompt_tokens,
            response_tokens=response_tokens,
            adapter_bytes=info.num_bytes if info else 0,
        )
        return Flight(call, request)

    def is_adapter(self, model: str) -> bool:
        """Whether a server lists it with a parent, or none lists it: it may then be known by another name."""
        cards = [u.cards.by_name[model] for u in self.upstreams.values() if u.cards and model in u.cards]
        return not cards or any(card.parent for card in cards)

    def is_known(self, model: str | None) -> bool:
        return any(upstream.serves(model) for upstream in self.upstreams.values()) or not self.upstreams

    def place(self, flight: Flight, tried: set[str]) -> Choice | None:
        """Where the request goes now; None where no open instance that was not tried serves its model."""
        started_at = time.perf_counter()
        target, flight.move_to = flight.move_to, None
        mask = self._serving(flight.call)
        if tried:
            mask = mask & np.array([instance_id not in tried for instance_id in self.fleet.ids])
        if target in self.upstreams:
            mask = mask & np.array([instance_id == target for instance_id in self.fleet.ids])
        if self._cooling:
            warm = self._warm()
            if (mask & warm & self.fleet.is_open).any():
                mask = mask & warm
        choice = self.policy.choose(flight.request, self.fleet.among(mask))
        self.meters.decision_seconds.observe(time.perf_counter() - started_at)
        return choice

    def _warm(self) -> BoolArray:
        """The servers that do not cool after a row of errors [N]."""
        now = time.monotonic()
        self._cooling = {u for u in self._cooling if u.cooling_until > now}
        return np.array([u not in self._cooling for u in self.upstreams.values()], dtype=np.bool_)

    def _serving(self, call: Call) -> BoolArray:
        model = None if call.path.startswith("/generate") and not self.is_known(call.model) else call.model
        mask = self._masks.get(model)
        if mask is None:
            if len(self._masks) >= MAX_MASKS:
                self._masks.clear()
            mask = np.array([upstream.serves(model) for upstream in self.upstreams.values()], dtype=np.bool_)
            self._masks[model] = mask
        return mask

    def begin(self, flight: Flight, instance_id: str) -> None:
        """The request is sent there. One that does not stream never shows its start: it counts as running."""
        flight.instance_id = instance_id
        request = flight.request
        upstream = self.upstreams[instance_id]
        self.flights[request.request_id] = upstream.flights[request.request_id] = flight
        upstream.ranks[request.rank] += 1
        self.fleet.enqueue(instance_id, request)
        if not flight.call.is_stream:
            self.fleet.start(instance_id, request.request_id)
        if request.adapter is not None:
            upstream.touch_adapter(request.adapter, MAX_RECENT_ADAPTERS)
            self.fleet.add_adapter(instance_id, request.adapter)
        self.meters.sent.labels(instance_id).inc()
        self.meters.in_flight.labels(instance_id).inc()

    def end(self, flight: Flight) -> None:
        """The request has left the instance, however it went."""
        request, upstream = flight.request, self.upstreams[flight.instance_id]
        del self.flights[request.request_id], upstream.flights[request.request_id]
        upstream.ranks[request.rank] -= 1
        if not upstream.ranks[request.rank]:
            del upstream.ranks[request.rank]
        self.fleet.finish(flight.instance_id, request.request_id)
        self.meters.in_flight.labels(flight.instance_id).dec()
        flight.instance_id = ""

    def note_first_byte(self, flight: Flight) -> None:
        self.meters.first_byte_seconds.observe(time.monotonic() - flight.received_at)

    def note_response(self, num_tokens: int) -> None:
        self._num_responses = min(self._num_responses + 1, RESPONSE_MEMORY)
        self.mean_response_tokens += (num_tokens - self.mean_response_tokens) / self._num_responses
