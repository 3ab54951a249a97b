"""A line for every change that outlasts a request: adapters that come and go, pins, keys."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from toppings.bad_input import shown
from toppings.log_files import JsonLines
from toppings.server.exchange import current_exchange
from toppings.tenants.file import TenantsFile

MAX_REASON_CHARS = 500


class AuditLog:
    """Writes to `lines`; by default nowhere. May be used from any thread."""

    def __init__(self, lines: JsonLines | None = None) -> None:
        self._lines = lines or JsonLines("")

    @contextmanager
    def change(self, action: str, **what: object) -> Iterator[None]:
        """What is done within is told when it is over: done, or why not."""
        try:
            yield
        except Exception as error:
            self.write(action, "failed", error=shown(error, MAX_REASON_CHARS), **what)
            raise
        self.write(action, "done", **what)

    def write(self, action: str, outcome: str, **what: object) -> None:
        """Who has asked for it is that of the current exchange, where there is one."""
        record: dict[str, object] = {"at": round(time.time(), 3), "action": action, **what}
        if (exchange := current_exchange.get()) is not None:
            asking = {"tenant": exchange.tenant, "client": exchange.client}
            record |= {"request_id": exchange.request_id, **asking}
        self._lines.write({**record, "outcome": outcome})

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

    def close(self) -> None:
        self._lines.close()
