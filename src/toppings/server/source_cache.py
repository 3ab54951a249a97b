"""Which adapters have come from sources, and which of them leave when all are too many bytes."""

import logging
from collections import OrderedDict
from collections.abc import Iterator

from toppings.adapters.registry import AdapterRecord, AdapterRegistry, Origin

logger = logging.getLogger(__name__)


class SourceCache:
    """Used from the server's event loop only. Those of an earlier run count as asked for when they came."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        records = [record for record in registry.list() if record.origin is Origin.SOURCE]
        self._held = OrderedDict(
            (record.name, record.num_bytes) for record in sorted(records, key=lambda each: each.created_at)
        )
        """Bytes, by name; least recently asked for first."""

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def touch(self, name: str) -> None:
        """It was asked for."""
        if name in self._held:
            self._held.move_to_end(name)

    def keep(self, record: AdapterRecord, max_bytes: int) -> list[str]:
        """Counts it; the names of those that have to leave for it, which are counted no longer."""
        self._forget_gone()
        self._held.pop(record.name, None)
        self._held[record.name] = record.num_bytes
        total, leaving = sum(self._held.values()), []
        for name in list(self._held):
            if total <= max_bytes or name == record.name:
                break
            other = self._registry.find_named(name)
            if other is not None and other.is_pinned:
                continue
            total -= self._held.pop(name)
            if other is not None and other.origin is Origin.SOURCE:
                leaving.append(name)
        return leaving

    def _forget_gone(self) -> None:
        """Those that were unloaded, or have given their name to an adapter that came otherwise."""
        for name in list(self._held):
            record = self._registry.find_named(name)
            if record is None or record.origin is not Origin.SOURCE:
                del self._held[name]
