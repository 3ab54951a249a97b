"""The adapters that have room on the device: their loads, who uses them, and who leaves for whom.

place -> loading -> idle <-> in use
                    idle -> evicted or dropped
"""

from collections.abc import Callable
from dataclasses import dataclass

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.eviction import EvictionPolicy, least_valuable
from toppings.adapters.host_entry import HostEntry
from toppings.adapters.host_store import HostStore
from toppings.adapters.layout import AdapterLayout, LoadOrder
from toppings.adapters.loader import Loader, LoadHandle


@dataclass(frozen=True)
class LoadTimes:
    """Of the load that brought an adapter to the device; instants are of `time.perf_counter`.

    `tier`: where it was before, "host" or "disk"; `copies`: of each layer, as far as it has landed.
    """

    tier: str
    read_ms: float  # disk to host, 0 where it was on the host
    copy_ms: float  # host to device, so far
    read_at: float | None
    host_ready_at: float
    copies: list[tuple[float, float] | None]


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter with its room on the device. `entry` is pinned on the host while the load copies from it."""

    adapter_id: int
    slot: int
    load: LoadHandle
    entry: HostEntry
    tier: str  # where it came from, "host" or "disk"
    num_running: int = 0
    is_loading: bool = True
    is_pinned: bool = False
    is_fresh: bool = True  # no request has used it yet
    is_folded: bool = False  # into the base model's weights, in part at least: others need it to be here

    @property
    def num_bytes(self) -> int:
        return self.load.num_bytes

    @property
    def num_layers_ready(self) -> int:
        """On the device; a load that is over is not asked again."""
        has_landed = not self.is_loading and self.load.error is None
        return self.load.num_layers if has_landed else self.load.num_layers_ready

    @property
    def is_idle(self) -> bool:
        """It may be evicted."""
        return not (self.is_used or self.is_loading or self.is_pinned)

    @property
    def is_used(self) -> bool:
        """By requests, whoever's they are."""
        return bool(self.num_running or self.is_folded)

    def load_times(self) -> LoadTimes:
        return LoadTimes(
            tier=self.tier,
            read_ms=self.entry.read_ms if self.tier == "disk" else 0.0,
            copy_ms=self.load.copy_ms,
            read_at=self.entry.read_at if self.tier == "disk" else None,
            host_ready_at=self.entry.ready_at or self.load.started_at,
            copies=self.load.copies(),
        )


class DeviceTier:
    """Called by the engine's loop only; `poll` takes note of what happened meanwhile."""

    def __init__(self, pool: DevicePool, host: HostStore, loader: Loader, policy: EvictionPolicy) -> None:
        self.pool = pool
        self.residents: dict[int, Resident] = {}
        self.counters = dict.fromkeys(
            ("device_evictions", "adapter_loads", "adapter_load_bytes", "load_errors"), 0
        )
        self._host = host
        self._loader = loader
        self._policy = policy
        self._loading: dict[int, Resident] = {}
        self._idle: dict[int, Resident] = {}
        self._changed: set[int] = set()

    def take_changed(self) -> set[int]:
        """Adapters of which something may have changed since the last call."""
        changed, self._changed = self._changed | self._loading.keys(), set()
        return changed

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    def place(self, entry: HostEntry, order: Callable[[AdapterLayout], LoadOrder]) -> Resident | None:
        """Begins the load of `entry`, evicting idle adapters if that makes room; None where it does not."""
        tier = "host" if entry.was_fetched else "disk"
        source = self._loader.part_of(entry)
        victims = self._choose_victims(source.layout.num_bytes)
        if victims is None or not self._host.try_pin(entry):
            return None
        for victim in victims:
            self.drop(self.residents[victim], was_evicted=True)
        slot = self.pool.try_place(source.layout)
        if slot is None:
            self._host.unpin(entry)
            return None
        item_bytes = self.pool.arena.itemsize
        layers = range(self.pool.num_layers)
        offsets_bytes = [self.pool.layer_offset(slot, layer) * item_bytes for layer in layers]
        load = self._loader.start(source, offsets_bytes, order(source.layout))
        resident = Resident(entry.adapter_id, slot, load, entry, tier)
        self.residents[entry.adapter_id] = self._loading[entry.adapter_id] = resident
        self._changed.add(entry.adapter_id)
        self._policy.touch(entry.adapter_id, resident.num_bytes)
        self.counters["adapter_loads"] += 1
        self.counters["adapter_load_bytes"] += resident.num_bytes
        return resident

    def _choose_victims(self, needed: int) -> list[int] | None:
        """Idle adapters that make room, none where there is enough; None where all of them would not do."""
        victims = self._choose([], needed)
        if victims is None:
            victims = self._choose(least_valuable(self._policy, self._idle), needed)
        return victims

    def _choose(
        self, candidates: list[int], needed: int, *, leaving: int = 0, slots: int = 0
    ) -> list[int] | None:
        """As many of `candidates`, first to last, as make room; None where all do not.

        `leaving` and `slots`: bytes and slots that will be free anyway.
        """
        room, num_slots = self.pool.free_bytes + leaving, self.pool.num_free_slots + slots
        for i, candidate in enumerate(candidates):
            if room >= needed and num_slots > 0:
                return candidates[:i]
            room += self.residents[candidate].num_bytes
            num_slots += 1
        return candidates if room >= needed and num_slots > 0 else None

    def may_fit(self, needed: int) -> bool:
        """False where there is no room and nobody to make it: adapters in use or loading fill the pool."""
        has_room = self.pool.free_bytes >= needed and self.pool.num_free_slots > 0
        return has_room or bool(self._idle)

    def victims_for(self, needed: int) -> list[int]:
        """Adapters in use, least valuable first, no more than needed, whose end would make room.

        Empty where idle adapters and loads under way will leave enough.
        """
        movable = [r for r in self.residents.values() if not r.is_pinned]
        leaving = [r.num_bytes for r in movable if not r.is_used]
        in_use = least_valuable(self._policy, (r.adapter_id for r in movable if r.is_used))
        victims = self._choose(in_use, needed, leaving=sum(leaving), slots=len(leaving))
        return in_use if victims is None else victims

    def acquire(self, resident: Resident) -> None:
        """One request more that uses it."""
        resident.is_fresh = False
        resident.num_running += 1
        self._policy.touch(resident.adapter_id, resident.num_bytes)
        self.update(resident)

    def release(self, resident: Resident) -> None:
        assert resident.num_running > 0
        resident.num_running -= 1
        self.update(resident)

    def update(self, resident: Resident) -> None:
        """To be called when who uses it or its pin has changed; a failed load leaves with its last user."""
        self._changed.add(resident.adapter_id)
        if resident.load.error is not None and not resident.is_used:
            self.drop(resident)
        elif resident.is_idle:
            self._idle[resident.adapter_id] = resident
        else:
            self._idle.pop(resident.adapter_id, None)

    def poll(self) -> list[int]:
        """Takes note of loads that landed or failed; the adapters of those that failed."""
        failed = []
        for resident in list(self._loading.values()):
            has_failed = resident.load.error is not None
            if not has_failed and not self._loader.is_over(resident.load):
                continue
            self._end_load(resident)
            if has_failed:
                failed.append(resident.adapter_id)
                self.counters["load_errors"] += 1
            else:
                self.pool.mark_loaded(resident.slot)
            self.update(resident)
        return failed

    def _end_load(self, resident: Resident) -> None:
        resident.is_loading = False
        del self._loading[resident.adapter_id]
        self._host.unpin(resident.entry)

    def try_drop(self, adapter_id: int) -> bool:
        """False where it is in use or being copied; else it is not here, now if not before."""
        resident = self.residents.get(adapter_id)
        if resident is not None:
            if resident.is_used or resident.is_loading:
                return False
            self.drop(resident)
        return True

    def drop(self, resident: Resident, *, was_evicted: bool = False) -> None:
        """Frees its room; nobody may use it, and a load under way is never cut off."""
        assert not resident.is_used
        if resident.is_loading:
            assert resident.load.error is not None
            self._end_load(resident)
        del self.residents[resident.adapter_id]
        self._changed.add(resident.adapter_id)
        self._idle.pop(resident.adapter_id, None)
        self.pool.free(resident.slot)
        self._policy.forget(resident.adapter_id, was_evicted=was_evicted)
        self.counters["device_evictions"] += was_evicted

    def wait_for_loads(self) -> None:
        """Blocks until all loads have landed. Raises AdapterError where one fails."""
        while self._loading:
            next(iter(self._loading.values())).load.wait_all()
            self.poll()

    def check_integrity(self) -> None:
        """Residents and pool tell the same story, and each resident is in the sets it belongs to."""
        self.pool.check_integrity()
        slots = [resident.slot for resident in self.residents.values()]
        assert len(set(slots)) == len(slots) == self.pool.num_slots - self.pool.num_free_slots
        assert sum(resident.num_bytes for resident in self.residents.values()) == self.pool.used_bytes
        for adapter_id, resident in self.residents.items():
            assert adapter_id == resident.adapter_id
            assert (adapter_id in self._loading) == resident.is_loading
            assert (adapter_id in self._idle) == (resident.is_idle and resident.load.error is None)
