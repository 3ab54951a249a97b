"""What is written down of requests and changes while a server runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI

from toppings.config import Config
from toppings.log_files import JsonLines
from toppings.server.audit_log import AuditLog
from toppings.server.request_log import RequestLog
from toppings.server.state import ServerState


@contextmanager
def keeping_records(app: FastAPI, config: Config, directory: Path) -> Iterator[None]:
    """`requests.jsonl` and `audit.jsonl` in `directory`, as far as the settings ask for them."""
    state: ServerState = app.state.toppings
    server, max_bytes = config.server, config.engine.max_log_bytes
    requests = JsonLines(str(directory / "requests.jsonl") if server.request_log else "", max_bytes)
    audits = JsonLines(str(directory / "audit.jsonl") if server.audit_log == "on" else "", max_bytes)
    if requests.is_on:
        app.state.observers.append(RequestLog(requests, server.request_log).note)
    state.audit = AuditLog(audits)
    state.book.on_change = state.audit.note_tenants
    try:
        yield
    finally:
        requests.close()
        audits.close()
