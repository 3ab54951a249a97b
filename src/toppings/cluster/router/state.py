"""The router's knowledge: the fleet's accounts, the servers behind them, what is in flight. No HTTP here."""

import logging
import time
import uuid
from collections import Counter

import aiohttp
import numpy as np

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.instances import BoolArray
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.placement import PlacementSettings, make_placement
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.report import ServerReport
from toppings.cluster.router.calls import TOKEN_PATHS, Call
from toppings.cluster.router.decisions import Decisions
from toppings.cluster.router.directory import AdapterDirectory
from toppings.cluster.router.exchange import Exchange
from toppings.cluster.router.flight import Flight, Flights, end_wait
from toppings.cluster.router.holding import Holding
from toppings.cluster.router.meters import Meters
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.cluster.router.upstream import Upstream
from toppings.cluster.snapshot import Choice, InstanceSnapshot
from toppings.cluster.warm_up import warm_up
from toppings.dashboard.recent import Recent
from toppings.exchanges.audit_log import AuditLog
from toppings.exchanges.exchange import Observer
from toppings.exchanges.request_log import RequestLog
from toppings.settings import OFF
from toppings.tenants.account import Place
from toppings.tracing import Tracing

logger = logging.getLogger(__name__)

ERRORS_BEFORE_COOLING = 3
COOLING_TIME_S = 5.0
MAX_MASKS = 10_000


class RouterState:
    def __init__(self, config: RouterConfig, session: aiohttp.ClientSession) -> None:
        self.config, self.session = config, session
        self.tracing = Tracing()
        self.router_id = uuid.uuid4().hex
        settings = PolicySettings(config.slo_tpt_ms, config.seed, config.candidates, config.slo_ttft_ms)
        self.dispatcher = Dispatcher(
            make_policy(config.policy, settings),
            response_tokens=config.response_tokens,
            placement=make_placement(
                config.placement, PlacementSettings(config.num_copies, config.slo_tpt_ms)
            ),
        )
        warm_up(config.policy)
        self.fleet = self.dispatcher.fleet
        self.upstreams: dict[str, Upstream] = {}
        self.directory = AdapterDirectory(config.default_rank)
        self.meters = Meters()
        self.recent = Recent()
        self.decisions = Decisions(self.dispatcher)
        self.flights = Flights(self.dispatcher, self.meters, self.recent)
        self.holding = Holding(config, self.meters, self.place, self.flights.end)
        self.audit = AuditLog()
        self.request_log: RequestLog | None = None
        self.observers: list[Observer] = [self._note_exchange]
        self._masks: dict[str | None, BoolArray] = {}

    def _note_exchange(self, exchange: Exchange) -> None:
        """One that is over."""
        self.meters.note_exchange(exchange)
        if exchange.is_received:
            self.meters.ended.labels(exchange.outcome).inc()
            self.recent.note_end(exchange.outcome)

    # --- instances ---

    def add_instance(self, instance: InstanceConfig) -> Upstream:
        """Raises ValueError where the id is taken."""
        model = load_perf_model(instance.perf_model or self.config.perf_model)
        snapshot = InstanceSnapshot(instance_id=instance.instance_id, perf_model=model, is_open=False)
        self.dispatcher.add_instance(snapshot, keeps_model=bool(instance.perf_model))
        upstream = Upstream(instance, self.config, self.session, self.router_id)
        self.upstreams[instance.instance_id] = upstream
        self.models_changed()
        self.refresh_open(upstream)
        return upstream

    def tell_of_assumed_costs(self, upstream: Upstream) -> None:
        """A server that tells of no costs, and for which none are configured, is judged by another's."""
        if not upstream.config.perf_model and self.config.perf_model == RouterConfig().perf_model:
            logger.warning(
                "%s tells of no measured step times; it is judged by the published ones (Llama-2-7B, A100): "
                "measure with `toppings profile batches`",
                upstream.instance_id,
            )

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance that has no request of ours."""
        self.dispatcher.remove_instance(instance_id)
        del self.upstreams[instance_id]
        self.meters.forget(instance_id)
        self.flights.forget(instance_id)
        self.models_changed()

    def refresh_open(self, upstream: Upstream) -> None:
        """To be called after `is_alive` or `is_draining` changed."""
        upstream.is_silent = upstream.is_silent and not upstream.is_alive
        is_open = upstream.is_alive and not upstream.is_draining
        self.fleet.set_open(upstream.instance_id, is_open)
        self.meters.is_up.labels(upstream.instance_id).set(is_open)
        if is_open:
            self.holding.look_soon()

    def models_changed(self) -> None:
        self._masks.clear()

    def note_failure(self, upstream: Upstream, *, is_gone: bool = False, is_silent: bool = False) -> None:
        """The server did not answer; after enough failures in a row, or if nobody listens, it is down.

        What waits there for its first token then goes elsewhere. One of which nothing at all is heard also
        ends its streams, unless they go on within `health_timeout_s`, and the changes of its adapters.
        """
        upstream.num_failures += 1
        flights = self.flights.on(upstream.instance_id)
        if upstream.is_alive and (is_gone or upstream.num_failures >= self.config.unhealthy_after):
            logger.warning("%s is down", upstream.instance_id)
            upstream.is_alive = False
            self.dispatcher.forget_prefixes(upstream.instance_id)
            upstream.placed.clear()
            upstream.refused.clear()
            self.refresh_open(upstream)
            for flight in flights:
                flight.interrupt()
        if not upstream.is_alive and (is_gone or is_silent):
            upstream.is_silent = True
            for flight in flights:
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
            self.dispatcher.avoid(upstream.instance_id, time.monotonic() + COOLING_TIME_S)

    def apply_report(
        self, upstream: Upstream, report: ServerReport, own_ranks: Counter[int] | None = None
    ) -> None:
        """Take over what the server told; `own_ranks` is what we had there when it was asked."""
        known = [self.directory.get(name).rank for name in report.in_use]
        rank = round(sum(known) / len(known)) if known else 0
        self.dispatcher.report(upstream.instance_id, report, own_then=own_ranks, other_rank=rank)
        self.flights.note_left(upstream.instance_id, report.left)
        self.holding.look_soon()

    # --- requests ---

    def make_flight(self, call: Call, place: Place, exchange: Exchange, *, is_batch: bool = False) -> Flight:
        """Of the request `exchange`."""
        is_adapter = call.model and self.is_adapter(call.model)
        adapter = self.directory.get(call.model) if call.model and is_adapter else None
        flight = exchange.flight = self.flights.make(call, adapter, place, is_batch=is_batch)
        flight.client_id, flight.span = exchange.request_id, exchange.span
        flight.tells_why = self.request_log is not None and self.request_log.has(exchange.request_id)
        exchange.has_adapter = adapter is not None
        return flight

    def end(self, flight: Flight) -> None:
        """It has left its server, and with that left room."""
        self.flights.end(flight)
        self.holding.look_soon()

    def is_adapter(self, model: str) -> bool:
        """Whether a server lists it with a parent, or none lists it: it may then be known by another name."""
        cards = [u.cards.by_name[model] for u in self.upstreams.values() if u.cards and model in u.cards]
        return not cards or any(card.parent for card in cards)

    def is_known(self, model: str | None) -> bool:
        return any(upstream.serves(model) for upstream in self.upstreams.values()) or not self.upstreams

    def place(self, flight: Flight, *, is_held: bool = False) -> Choice | None:
        """Where the request goes now: where it is to move to, if that is open; None where no open instance
        that was not tried serves its model. Where it is to be within the objectives, it may get none.
        One that `is_held` is tried again and again: why it goes where it goes is not told.
        """
        mask = self._serving(flight.call)
        view = None if is_held else self.decisions.view(flight, mask)
        if flight.tried:
            mask = mask & ~self.fleet.rows_in(flight.tried)
        if flight.move_to in self.upstreams:
            target = mask & self.fleet.rows_in({flight.move_to})
            mask = target if (target & self.fleet.is_open).any() else mask
        refuses = self.config.slo_admission != OFF and flight.call.path not in TOKEN_PATHS
        choice = self.flights.place(flight, mask, within_slo=refuses, is_held=is_held)
        if view is not None and flight.instance_id:
            self.decisions.note(flight, view, choice)
        return choice

    def _serving(self, call: Call) -> BoolArray:
        model = None if call.path.startswith("/generate") and not self.is_known(call.model) else call.model
        mask = self._masks.get(model)
        if mask is None:
            if len(self._masks) >= MAX_MASKS:
                self._masks.clear()
            mask = np.array([upstream.serves(model) for upstream in self.upstreams.values()], dtype=np.bool_)
            self._masks[model] = mask
        return mask
