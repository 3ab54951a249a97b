"""What is written down of requests and changes while a server runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from toppings.config import Config
from toppings.exchanges.records import keeping_files
from toppings.server.exchange import current_exchange
from toppings.server.state import ServerState
from toppings.server.traces import RequestTraces
from toppings.tracing import open_tracing


@contextmanager
def keeping_records(app: FastAPI, config: Config, directory: Path) -> Iterator[None]:
    """`requests.jsonl` and `audit.jsonl` in `directory`, and traces, as far as the settings ask for them; and
    what is kept at hand of requests whose clients left.

    Raises ConfigError where traces cannot be sent.
    """
    state: ServerState = app.state.toppings
    app.state.observers.append(state.left.note)
    tracing = open_tracing(config.server.otlp_traces_endpoint, "toppings")
    traces = RequestTraces(tracing) if tracing.is_on else None
    if traces is not None:
        app.state.observers.append(traces.note)
        state.metrics.logs["traces"] = partial(getattr, traces, "num_dropped")
    with keeping_files(
        directory,
        request_log=config.server.request_log,
        audit_log=config.server.audit_log,
        max_log_bytes=config.engine.max_log_bytes,
        current=current_exchange.get,
    ) as records:
        app.state.observers += records.observers
        state.metrics.logs |= records.dropped
        state.audit = records.audit
        state.book.on_change = state.audit.note_tenants
        try:
            yield
        finally:
            if traces is not None:
                traces.close()
            tracing.close()
