"""What the registry says of the adapters that an engine uses, at hand without a look-up."""

from toppings.adapters.errors import AdapterError, StateError
from toppings.adapters.latest import Latest
from toppings.adapters.parts import CutSource
from toppings.adapters.registry import AdapterRecord, AdapterRegistry

MAX_CACHED_RECORDS = 16384


class KnownRecords:
    """`cut`: of a model that is split over several processes."""

    def __init__(self, registry: AdapterRegistry, cut: CutSource | None) -> None:
        self._registry = registry
        self._cut = cut
        self._removed: Latest[int, None] = Latest(MAX_CACHED_RECORDS)
        self._records: Latest[int, AdapterRecord] = Latest(MAX_CACHED_RECORDS)

    def get(self, adapter_id: int) -> AdapterRecord:
        """Raises AdapterError where it was removed or never registered, or cannot be looked up now."""
        if adapter_id in self._removed:
            raise AdapterError(f"adapter {adapter_id} was removed")
        record = self._records.get(adapter_id)
        if record is None:
            try:
                record = self._registry.get_by_id(adapter_id)
            except StateError as error:
                raise AdapterError(f"adapter {adapter_id} cannot be looked up: {error}") from error
            if self._cut is not None:
                record = self._cut.device_record(record)
        self._records[adapter_id] = record  # those in use stay at hand
        return record

    def remove(self, adapter_id: int) -> None:
        """From now on `get` refuses it."""
        self._removed[adapter_id] = None
        self._records.pop(adapter_id, None)

    def is_removed(self, adapter_id: int) -> bool:
        return adapter_id in self._removed
