"""Names of adapter ids, which never change, also of generations that have gone while they still drain."""

from toppings.adapters.errors import AdapterNotFound
from toppings.adapters.latest import Latest
from toppings.adapters.registry import AdapterRegistry

MAX_NAMES = 1 << 14
"""Ids come and go for as long as a server lives."""


class RecentNames:
    """Of the ids that were asked for last; used from one thread."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._names: Latest[int, str] = Latest(MAX_NAMES)

    def note(self, adapter_id: int, name: str) -> None:
        self._names[adapter_id] = name

    def of(self, adapter_id: int) -> str | None:
        """None where it is not registered, and was not noted lately."""
        if adapter_id not in self._names:
            try:
                self.note(adapter_id, self._registry.get_by_id(adapter_id).name)
            except AdapterNotFound:
                return None
        return self._names[adapter_id]
