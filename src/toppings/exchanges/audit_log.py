"""A line for every change that outlasts a request: adapters that come and go, pins, keys, a router's servers;
and for those that were asked for by who may not."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from toppings.bad_input import shown
from toppings.exchanges.denied import DENIED, DeniedLines
from toppings.exchanges.exchange import UNCOUNTED, Exchange
from toppings.log_files import JsonLines
from toppings.tenants.file import TenantsFile

MAX_CHARS = 500
"""Of a text in a line."""
MAX_DENIED_ACTION_CHARS, MAX_DENIED_ERROR_CHARS = 100, 200
"""Of what was denied."""
CHANGING_PATHS = ("/adapters", "/instances", "/v1/load_", "/v1/unload_", "/load_", "/unload_")
"""How the routes begin that change what outlasts a request."""


class Change:
    """One that is under way; `failure`: why it was not done, where no exception says so."""

    failure = ""


class AuditLog:
    """Writes to `lines`; by default nowhere. May be used from any thread, but for `note_exchange`. `current`:
    the exchange on whose behalf something is done."""

    def __init__(
        self,
        lines: JsonLines | None = None,
        current: Callable[[], Exchange | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines, self._current = lines or JsonLines(""), current
        self._denied = DeniedLines(clock)

    @contextmanager
    def change(self, action: str, **what: object) -> Iterator[Change]:
        """What is done within is told when it is over: done, or why not."""
        change = Change()
        try:
            yield change
        except BaseException as error:
            self.write(action, "failed", error=str(error) or type(error).__name__, **what)
            raise
        failure = {"error": change.failure} if change.failure else {}
        self.write(action, "failed" if failure else "done", **failure, **what)

    def write(self, action: str, outcome: str, **what: object) -> None:
        """Who has asked for it is that of the current exchange, where there is one."""
        self._lines.write(_record(action, outcome, self._current(), what))

    def note_exchange(self, exchange: Exchange) -> None:
        """One that is over: a change that was denied has a line. Used from one event loop only."""
        is_change = exchange.method not in UNCOUNTED and exchange.path.startswith(CHANGING_PATHS)
        if not is_change or exchange.status not in DENIED:
            return
        if (untold := self._denied.tell()) is None:
            return
        action = _brief(f"{exchange.method} {exchange.path}", MAX_DENIED_ACTION_CHARS)
        error = _brief(exchange.error, MAX_DENIED_ERROR_CHARS)
        what = {"status": exchange.status, "error": error, **untold}
        self._lines.write(_record(action, "denied", exchange, what))

    def note_tenants(self, before: TenantsFile, now: TenantsFile) -> None:
        """The tenants file has changed: which keys and tenants came, went or are others. Keys go by their
        ids. However many, none is lost to the others."""
        exchange = self._current()
        told = _changes(before, now)
        self._lines.write(*(_record(action, "done", exchange, what) for action, what in told))


def _changes(before: TenantsFile, now: TenantsFile) -> Iterator[tuple[str, dict[str, object]]]:
    """What has been done to what."""
    old, new = ({key.id: key for key in file.keys} for file in (before, now))
    for key_id in sorted(new.keys() - old.keys()):
        yield "add key", {"key": key_id, "of": new[key_id].tenant}
    for key_id in sorted(old.keys() - new.keys()):
        yield "revoke key", {"key": key_id, "of": old[key_id].tenant}
    for key_id in sorted(old.keys() & new.keys()):
        was, entry = asdict(old[key_id]), asdict(new[key_id])
        if parts := [name for name in entry if entry[name] != was[name]]:
            yield "change key", {"key": key_id, "of": entry["tenant"], "changed": parts}
    for name in sorted(before.tenants.keys() | now.tenants.keys()):
        if before.tenants.get(name) != now.tenants.get(name):
            yield "change tenant", {"of": name, "is_there": name in now.tenants}


def _record(
    action: str, outcome: str, exchange: Exchange | None, what: Mapping[str, object]
) -> dict[str, object]:
    record: dict[str, object] = {"at": round(time.time(), 3), "action": action, **what}
    if exchange is not None:
        asking = {"tenant": exchange.tenant, "key": exchange.key, "client": exchange.client}
        record = {"request_id": exchange.request_id, **asking, **record}
    record["outcome"] = outcome
    return {k: shown(v, MAX_CHARS) if isinstance(v, str) else v for k, v in record.items()}


def _brief(text: str, max_chars: int) -> str:
    """Cut, and escaped before that: JSON writes a character in up to 12."""
    return shown(text.encode("unicode_escape").decode(), max_chars)
