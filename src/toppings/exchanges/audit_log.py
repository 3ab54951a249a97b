"""A line for every change that outlasts a request: adapters that come and go, pins, keys, a router's servers;
and for those that were asked for by who may not."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from toppings.bad_input import shown
from toppings.exchanges.exchange import UNCOUNTED, Exchange
from toppings.log_files import JsonLines
from toppings.tenants.account import Bucket
from toppings.tenants.file import TenantsFile

MAX_CHARS = 500
"""Of a text in a line."""
DENIED = (401, 403)
CHANGING_PATHS = ("/adapters", "/instances", "/v1/load_", "/v1/unload_", "/load_", "/unload_")
"""How the routes begin that change what outlasts a request."""
DENIED_PER_MINUTE = 60
"""Lines of what was denied: whoever has no key must not push out what was done."""


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
        self._lines, self._current, self._clock = lines or JsonLines(""), current, clock
        self._denied = Bucket(clock())
        self._num_untold = 0

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
        self._write(action, outcome, self._current(), what)

    def note_exchange(self, exchange: Exchange) -> None:
        """One that is over: a change that was denied has a line. Used from one event loop only."""
        is_change = exchange.method not in UNCOUNTED and exchange.path.startswith(CHANGING_PATHS)
        if not is_change or exchange.status not in DENIED:
            return
        now = self._clock()
        if self._denied.level(DENIED_PER_MINUTE, now) < 1:
            self._num_untold += 1
            return
        self._denied.spend(1, DENIED_PER_MINUTE, now)
        what: dict[str, object] = {"status": exchange.status, "error": exchange.error}
        if self._num_untold:
            what["untold"], self._num_untold = self._num_untold, 0
        self._write(f"{exchange.method} {exchange.path}", "denied", exchange, what)

    def note_tenants(self, before: TenantsFile, now: TenantsFile) -> None:
        """The tenants file has changed: which keys and tenants came, went or are others. Keys go by their
        ids."""
        old, new = ({key.id: key for key in file.keys} for file in (before, now))
        for key_id in sorted(new.keys() - old.keys()):
            self.write("add key", "done", key=key_id, of=new[key_id].tenant)
        for key_id in sorted(old.keys() - new.keys()):
            self.write("revoke key", "done", key=key_id, of=old[key_id].tenant)
        for key_id in sorted(old.keys() & new.keys()):
            was, entry = asdict(old[key_id]), asdict(new[key_id])
            if parts := [name for name in entry if entry[name] != was[name]]:
                self.write("change key", "done", key=key_id, of=entry["tenant"], changed=parts)
        for name in sorted(before.tenants.keys() | now.tenants.keys()):
            if before.tenants.get(name) != now.tenants.get(name):
                self.write("change tenant", "done", of=name, is_there=name in now.tenants)

    def _write(self, action: str, outcome: str, exchange: Exchange | None, what: dict[str, object]) -> None:
        record: dict[str, object] = {"at": round(time.time(), 3), "action": action, **what}
        if exchange is not None:
            asking = {"tenant": exchange.tenant, "key": exchange.key, "client": exchange.client}
            record |= {"request_id": exchange.request_id, **asking}
        record["outcome"] = outcome
        self._lines.write({k: shown(v, MAX_CHARS) if isinstance(v, str) else v for k, v in record.items()})
