"""What others are told of every adapter: where it is, and who uses or waits for it."""

from collections.abc import Mapping

from toppings.adapters.device_tier import DeviceTier
from toppings.adapters.hits import Hits
from toppings.adapters.host_store import HostStore
from toppings.adapters.pins import Pins
from toppings.messages import AdapterStatus


class Statuses:
    """`num_waiting`: requests that wait for each adapter, by its id."""

    def __init__(self, tier: DeviceTier, host: HostStore, hits: Hits, pins: Pins) -> None:
        self._tier, self._host, self._hits, self._pins = tier, host, hits, pins
        self._changed: set[int] = set()  # what `changes` is to tell, beside what the tiers know

    def note_changed(self, adapter_id: int) -> None:
        """Something of it has changed that no tier knows."""
        self._changed.add(adapter_id)

    def all(self, num_waiting: Mapping[int, int]) -> list[AdapterStatus]:
        """Every adapter that is on host or device or has waiting requests."""
        ids = {*self._host.ready_ids(), *self._tier.residents, *num_waiting}
        statuses = (self._status(adapter_id, num_waiting) for adapter_id in sorted(ids))
        return [status for status in statuses if status.is_anywhere]  # not where nothing has landed yet

    def changes(self, num_waiting: Mapping[int, int]) -> list[AdapterStatus]:
        """Of all what may have changed since the last call, and adapters that have left: what it costs does
        not grow with the number of adapters."""
        ids = {*self._changed, *self._tier.take_changed(), *self._host.take_changed(), *num_waiting}
        self._changed = set(num_waiting)
        return [self._status(adapter_id, num_waiting) for adapter_id in ids]

    def _status(self, adapter_id: int, num_waiting: Mapping[int, int]) -> AdapterStatus:
        resident = self._tier.residents.get(adapter_id)
        return AdapterStatus(
            adapter_id=adapter_id,
            is_on_host=self._host.holds(adapter_id),
            device_layers=resident.num_layers_ready if resident is not None else 0,
            num_layers=self._tier.pool.num_layers,
            num_running=resident.num_running if resident is not None else 0,
            num_waiting=num_waiting.get(adapter_id, 0),
            num_hits=self._hits.of(adapter_id),
            is_pinned=adapter_id in self._pins,
            is_folded=resident is not None and resident.is_folded,
        )
