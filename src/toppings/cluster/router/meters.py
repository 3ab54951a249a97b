"""The router's own Prometheus metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from toppings.exchanges.counts import ExchangeCounts, LogsCollector
from toppings.exchanges.exchange import CLIENT_GONE, Exchange
from toppings.exchanges.request_log import LOGGED_PATHS

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DECISION_BUCKETS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)


class Meters:
    """Every received request ends once, by the outcome that its line in the request log has."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.received = Counter("toppings_router_received", "Inference requests.", registry=self.registry)
        self.ended = Counter(
            "toppings_router_ended", "Inference requests by outcome.", ["outcome"], registry=self.registry
        )
        # Not `instance`: that label is Prometheus' own, of whom it asked, which is the router.
        self.sent = Counter(
            "toppings_router_sent", "Attempts, by server.", ["server"], registry=self.registry
        )
        self.retries = Counter(
            "toppings_router_retries",
            "Attempts that failed, by server.",
            ["server"],
            registry=self.registry,
        )
        self.moves = Counter("toppings_router_moves", "Waiting requests moved.", registry=self.registry)
        self.placement_moves = Counter(
            "toppings_router_placement_moves",
            "Homes that adapters were given instead of, or beside, others.",
            registry=self.registry,
        )
        self.desired_instances = Gauge(
            "toppings_router_desired_instances",
            "Servers that the demand needs within the objective.",
            registry=self.registry,
        )
        self.slo_at_risk = Counter(
            "toppings_router_slo_at_risk", "Requests no instance could take in time.", registry=self.registry
        )
        self.slo_refused = Counter(
            "toppings_router_slo_refused",
            "Requests answered 429 since no instance could take them within the objectives, by their class.",
            ["slo_class"],
            registry=self.registry,
        )
        self.held = Gauge(
            "toppings_router_held", "Batch requests that wait for room at a server.", registry=self.registry
        )
        self.decision_seconds = Histogram(
            "toppings_router_decision_seconds",
            "Time to choose an instance.",
            buckets=DECISION_BUCKETS,
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "toppings_router_first_byte_seconds",
            "Request to the first byte of its answer.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "toppings_router_in_flight", "Requests, by server.", ["server"], registry=self.registry
        )
        self.is_up = Gauge(
            "toppings_router_instance_up", "1 where requests are sent.", ["server"], registry=self.registry
        )

        self.refused = Counter(
            "toppings_router_refused",
            "Inference requests answered with an error, the router's or a server's, by status.",
            ["status"],
            registry=self.registry,
        )
        self._exchanges = ExchangeCounts(
            self.registry, "toppings_router_", ("tenant", "servers", "objectives")
        )
        self.logs: dict[str, Callable[[], int]] = {}
        """Files of records, and how many each has dropped."""
        self.registry.register(LogsCollector("toppings_router_log_dropped", self.logs))

    def note_exchange(self, exchange: Exchange) -> None:
        """One that is over: who was told no, and what tenants had."""
        self._exchanges.note(exchange)
        is_refused = exchange.status >= 400 and exchange.status != CLIENT_GONE
        if is_refused and exchange.method == "POST" and exchange.path in LOGGED_PATHS:
            self.refused.labels(exchange.status).inc()

    def forget(self, instance_id: str) -> None:
        for metric in (self.sent, self.retries, self.in_flight, self.is_up):
            metric.remove(instance_id)

    def render(self) -> bytes:
        return generate_latest(self.registry)
