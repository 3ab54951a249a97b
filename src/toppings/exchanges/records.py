"""The files that a server or a router keeps of its requests and changes while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from toppings.exchanges.audit_log import AuditLog
from toppings.exchanges.exchange import Exchange, Observer
from toppings.exchanges.request_log import RequestLog
from toppings.log_files import JsonLines
from toppings.settings import OFF


@dataclass(frozen=True)
class Records:
    """`requests` is None where none are kept; `audit` may write nowhere. `dropped`: by files' names, how many
    records each has lost. `observers` are to be told of every exchange that is over."""

    requests: RequestLog | None
    audit: AuditLog
    dropped: dict[str, Callable[[], int]] = field(default_factory=dict)
    observers: list[Observer] = field(default_factory=list)


@contextmanager
def keeping_files(
    directory: Path,
    *,
    request_log: float,
    audit_log: str,
    max_log_bytes: int,
    current: Callable[[], Exchange | None],
) -> Iterator[Records]:
    """`requests.jsonl` and `audit.jsonl` in `directory`, as far as the settings of these names ask for them,
    until the context ends. `current`: the exchange on whose behalf something is done."""
    requests = JsonLines(str(directory / "requests.jsonl") if request_log else "", max_log_bytes)
    audits = JsonLines(str(directory / "audit.jsonl") if audit_log != OFF else "", max_log_bytes)
    records = Records(
        RequestLog(requests, request_log) if requests.is_on else None, AuditLog(audits, current)
    )
    for name, lines in (("requests.jsonl", requests), ("audit.jsonl", audits)):
        if lines.is_on:
            records.dropped[name] = partial(getattr, lines, "num_dropped")
    if records.requests is not None:
        records.observers.append(records.requests.note)
    if audits.is_on:
        records.observers.append(records.audit.note_exchange)
    try:
        yield records
    finally:
        requests.close()
        audits.close()
