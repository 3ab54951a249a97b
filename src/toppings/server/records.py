"""What is written down of requests and changes while a server runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from toppings.config import Config
from toppings.log_files import JsonLines
from toppings.server.audit_log import AuditLog
from toppings.server.request_log import RequestLog
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
    server, max_bytes = config.server, config.engine.max_log_bytes
    tracing = open_tracing(server.otlp_traces_endpoint, "toppings")
    traces = RequestTraces(tracing) if tracing.is_on else None
    if traces is not None:
        app.state.observers.append(traces.note)
        state.metrics.logs["traces"] = partial(getattr, traces, "num_dropped")
    requests = JsonLines(str(directory / "requests.jsonl") if server.request_log else "", max_bytes)
    audits = JsonLines(str(directory / "audit.jsonl") if server.audit_log == "on" else "", max_bytes)
    if requests.is_on:
        app.state.observers.append(RequestLog(requests, server.request_log).note)
    for name, lines in (("requests.jsonl", requests), ("audit.jsonl", audits)):
        if lines.is_on:
            state.metrics.logs[name] = partial(getattr, lines, "num_dropped")
    state.audit = AuditLog(audits)
    state.book.on_change = state.audit.note_tenants
    try:
        yield
    finally:
        if traces is not None:
            traces.close()
        tracing.close()
        requests.close()
        audits.close()
