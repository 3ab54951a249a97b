"""Who was told no, and what tenants had, for Prometheus; and records that were lost."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from toppings.exchanges.denied import DENIED
from toppings.exchanges.exchange import Exchange

MAX_TENANTS, OTHER_TENANTS = 1024, "_other"
"""Names that have counters of their own: without keys a client may name tenants as it likes."""


class ExchangeCounts:
    """Counters named `prefix` and what they count; `limits` are those that may say no (`rejected_by`)."""

    def __init__(self, registry: CollectorRegistry, prefix: str, limits: Iterable[str]) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(prefix + name, help_text, labels, registry=registry)

        self._rejected = counter("rejected", "Answers 429, by whose limit.", "reason")
        self._denied = counter("denied", "Answers 401 and 403.", "status")
        self._tenant_requests = counter("tenant_requests", "Requests for tokens.", "tenant")
        self._tenant_rejected = counter("tenant_rejected", "Answers 429.", "tenant")
        self._tenant_tokens = counter("tenant_tokens", "Tokens, by kind.", "tenant", "kind")
        self._tenants: set[str] = set()
        for limit in limits:
            self._rejected.labels(limit)
        for status in DENIED:
            self._denied.labels(status)

    def note(self, exchange: Exchange) -> None:
        """An exchange that is over."""
        if exchange.status in DENIED:
            self._denied.labels(exchange.status).inc()
        if exchange.rejected_by:
            self._rejected.labels(exchange.rejected_by).inc()
        num_tokens = exchange.num_tokens
        if not exchange.tenant or (num_tokens is None and not exchange.rejected_by):
            return
        if len(self._tenants) < MAX_TENANTS:
            self._tenants.add(exchange.tenant)
        tenant = exchange.tenant if exchange.tenant in self._tenants else OTHER_TENANTS
        self._tenant_requests.labels(tenant).inc()
        if exchange.rejected_by:
            self._tenant_rejected.labels(tenant).inc()
        for kind, number in zip(("prompt", "generation"), num_tokens or (0, 0), strict=True):
            self._tenant_tokens.labels(tenant, kind).inc(number)


class LogsCollector(Collector):
    """Records that were dropped, by their file's name, as the metric `name`."""

    def __init__(self, name: str, dropped: Mapping[str, Callable[[], int]]) -> None:
        self._name, self._dropped = name, dropped

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, "Records that were not written, by file.", labels=["file"])
        for name, num_dropped in sorted(self._dropped.items()):
            family.add_metric([name], num_dropped())
        yield family
