"""What is written down of requests and changes while a router runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toppings.cluster.router.exchange import current_exchange
from toppings.cluster.router.state import RouterState
from toppings.exchanges.records import keeping_files
from toppings.tenants.book import TenantBook


@contextmanager
def keeping_records(state: RouterState, book: TenantBook, directory: Path | None) -> Iterator[None]:
    """`requests.jsonl` and `audit.jsonl` in `directory`, as the settings ask for them; None: nowhere."""
    if directory is None:
        yield
        return
    config = state.config
    with keeping_files(
        directory,
        request_log=config.request_log,
        audit_log=config.audit_log,
        max_log_bytes=config.max_log_bytes,
        current=current_exchange.get,
    ) as records:
        state.observers += records.observers
        state.meters.logs |= records.dropped
        state.audit, state.request_log = records.audit, records.requests
        book.on_change = state.audit.note_tenants
        yield
