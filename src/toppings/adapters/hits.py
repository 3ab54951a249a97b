"""How often requests found their adapter on the device, on the host, or on neither."""

from toppings.adapters.device_tier import Resident


class Hits:
    """`counters` count acquired requests: host hits and misses add up to the device misses."""

    def __init__(self) -> None:
        self.counters = dict.fromkeys(("device_hits", "device_misses", "host_hits", "host_misses"), 0)
        self._by_adapter: dict[int, int] = {}

    def note(self, resident: Resident) -> None:
        """A request is about to acquire it."""
        if resident.is_fresh or resident.is_loading:
            self.counters["device_misses"] += 1
            self.counters["host_hits" if resident.tier == "host" else "host_misses"] += 1
        else:
            self.counters["device_hits"] += 1
            self._by_adapter[resident.adapter_id] = self.of(resident.adapter_id) + 1

    def of(self, adapter_id: int) -> int:
        return self._by_adapter.get(adapter_id, 0)

    def forget(self, adapter_id: int) -> None:
        self._by_adapter.pop(adapter_id, None)
