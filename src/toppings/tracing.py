"""Traces in OpenTelemetry's form, sent to a collector where one is configured.

Of the SDK nothing is imported until then. What samples, and how long spans wait for the next batch, are its
own settings (`OTEL_TRACES_SAMPLER`, `OTEL_BSP_...`, `OTEL_EXPORTER_OTLP_HEADERS`); by default all requests
are traced whose callers do not say otherwise in `traceparent`. A collector that is slow or away costs spans,
which are dropped, and no request.
"""

import os
import threading
import time
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from toppings.settings import ConfigError

Attributes = Mapping[str, str | int | float | bool | list[str]]
PARENT_HEADERS = ("traceparent", "tracestate")
PATH = "/v1/traces"
MAX_PARENT_CHARS = 512
"""Of a header that names the caller's span: longer ones are nobody's."""
FLUSH_S = 3.0
"""How long the last spans may take to leave."""


class Span:
    """One span that is under way; of one that is not traced nothing is kept. Times are in ns of Unix time."""

    def __init__(self, tracer: Any = None, span: Any = None) -> None:
        self._tracer, self._span = tracer, span

    @property
    def is_recording(self) -> bool:
        return self._span is not None and self._span.is_recording()

    def set(self, **attributes: Any) -> None:
        """Dots in names are written as `__`."""
        if self.is_recording:
            for name, value in attributes.items():
                self._span.set_attribute(name.replace("__", "."), value)

    def fail(self, reason: str) -> None:
        if self.is_recording:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, reason))

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Whoever gets these headers continues the trace below this span."""
        if self._span is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            for name in PARENT_HEADERS:
                headers.pop(name, None)
            TraceContextTextMapPropagator().inject(headers, self._context())

    def begin(self, name: str, start_ns: int | None = None, attributes: Attributes | None = None) -> "Span":
        """A part of it, that another process does."""
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT
        if self._span is None:
            return self
        return Span(
            self._tracer,
            self._tracer.start_span(name, self._context(), kind, attributes, start_time=start_ns),
        )

    def add(self, name: str, start_ns: int, end_ns: int, attributes: Attributes | None = None) -> None:
        """A part of it that is over."""
        if self.is_recording:
            part = self._tracer.start_span(
                name, self._context(), attributes=attributes, start_time=min(start_ns, end_ns)
            )
            part.end(end_ns)

    def end(self, end_ns: int | None = None) -> None:
        if self._span is not None:
            self._span.end(end_ns)

    def _context(self) -> Any:
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self._span)


class Tracing:
    """Makes spans; with a `tracer`, and a `provider` that sends them, else none that are kept."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("toppings")

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def serve(self, name: str, headers: Mapping[str, str], start_ns: int, attributes: Attributes) -> Span:
        """The span of a request that came with `headers`, whose names are in lower case."""
        if self._tracer is None:
            return Span()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        kept = {key: value for key, value in headers.items() if len(value) <= MAX_PARENT_CHARS}
        context = TraceContextTextMapPropagator().extract(kept)
        kind = SpanKind.SERVER
        started = self._tracer.start_span(name, context, kind, attributes, start_time=start_ns)
        return Span(self._tracer, started)

    def close(self) -> None:
        """Sends what is left, for so long and no longer."""
        if self._provider is not None:
            thread = threading.Thread(target=self._provider.shutdown, name="toppings-traces", daemon=True)
            thread.start()
            thread.join(FLUSH_S)


def open_tracing(endpoint: str, service: str) -> Tracing:
    """To the OTLP receiver at `endpoint` over HTTP, until it is closed; off where that is empty. `service`:
    who this is, unless `OTEL_SERVICE_NAME` says.

    Raises ConfigError for what is no URL, or where the packages are missing.
    """
    return Tracing(_provider(endpoint, service) if endpoint else None)


def check_endpoint(endpoint: str) -> str:
    """As it is sent to: without a path, with OTLP's own. Raises ConfigError for what is no URL."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"otlp_traces_endpoint is {endpoint!r}; it must be like http://localhost:4318{PATH}"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + PATH


def _provider(endpoint: str, service: str) -> Any:
    url = check_endpoint(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry; install it with: pip install 'toppings[otel]'"
        ) from error
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


def unix_ns(instant: float) -> int:
    """Of an instant of `time.perf_counter`."""
    return time.time_ns() - int((time.perf_counter() - instant) * 1e9)
