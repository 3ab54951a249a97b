"""Where every adapter is, and how it gets to the device: what the engine's loop talks to.

    prefetch -> host store reads it -> try_acquire: room on the device, load begins -> READY, in use
                                                                              release -> idle, may leave

A request is admitted when its adapter is wholly in host memory, so that no forward ever waits for a disk; the
copy to the device may have begun before that.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from toppings.adapters.capacity import Capacity
from toppings.adapters.device_memory import make_loader, make_pool
from toppings.adapters.device_tier import DeviceTier, LoadTimes
from toppings.adapters.errors import AdapterError
from toppings.adapters.eviction import make_policy
from toppings.adapters.hits import Hits
from toppings.adapters.host_entry import HostEntry
from toppings.adapters.host_store import HostStore
from toppings.adapters.known_records import KnownRecords
from toppings.adapters.load_cost import tokens_per_byte
from toppings.adapters.loader import LoadHandle
from toppings.adapters.modes import LoadingMode
from toppings.adapters.parts import CutSource
from toppings.adapters.pins import Pins
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.adapters.statuses import Statuses
from toppings.adapters.vocabulary import Vocabulary
from toppings.config import EngineConfig
from toppings.core import Admission
from toppings.messages import AdapterStatus

if TYPE_CHECKING:
    from toppings.adapters.mirror import Lead

logger = logging.getLogger(__name__)

PIN_WINDOW = 16  # adapters that are read ahead while many are to be pinned
PRELOAD_POLL_S = 0.0005


class AdapterManager:
    """Single-threaded towards the engine's loop; only `start`, `preload_all` and `close` ever block."""

    def __init__(
        self,
        registry: AdapterRegistry,
        config: EngineConfig,
        mode: LoadingMode,
        lead: "Lead | None" = None,
    ) -> None:
        """`lead`: of a model that is split over several processes, of which this is the first."""
        self._registry = registry
        self._mode = mode
        self._cut = None if lead is None else CutSource(registry, lead.parts)
        self.pool = make_pool(registry, config, mode, lead)
        self.shapes = registry.shapes if lead is None else lead.parts.shapes  # on this device
        self._tokens_per_byte = tokens_per_byte(registry.shapes, config.device, config.link_gbps)
        self.loader = make_loader(self.pool, config, lead)
        self.host = HostStore(
            config.host_store_bytes,
            self._cut or registry,
            make_policy(config.eviction),
            on_progress=self.loader.notify,
        )
        self._capacity = Capacity(self.pool.capacity_bytes, self.host.capacity_bytes)
        if config.device == "cuda":
            self.host.arena.lock_pages()
        self._tier = DeviceTier(self.pool, self.host, self.loader, make_policy(config.eviction))
        self._pins = Pins()
        self._records = KnownRecords(registry, self._cut)
        self._hits = Hits()
        self._statuses = Statuses(self._tier, self.host, self._hits, self._pins)
        self.leaving: set[int] = set()
        """Adapters that are to be removed as soon as nobody needs them."""

    # --- for the scheduler ---

    def prefetch(self, adapter_id: int) -> None:
        """A request for it was queued: begin to read it from disk if need be."""
        if not self.holds(adapter_id) and not self._records.is_removed(adapter_id):
            self.host.prefetch(adapter_id)

    def read_ahead(self, adapter_id: int) -> None:
        """`prefetch` for whom no request waits yet. Raises AdapterError where it is unknown."""
        self._records.get(adapter_id)
        self.prefetch(adapter_id)

    def holds(self, adapter_id: int) -> bool:
        """True where it has its room on the device already, whether its load is done or not."""
        return adapter_id in self._tier.residents

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        """READY: in use by one request more, which computes `num_tokens`, until `release`; its load is under
        way or done.

        LOADING: not in host memory yet; ask again. NO_ROOM: the pool is full of adapters in use or loading.
        Raises AdapterError: it was removed, cannot be read (a later request tries again) or can never fit.
        """
        self.poll()
        resident = self._tier.residents.get(adapter_id)
        if resident is None:
            admission = self._place(adapter_id, num_tokens)
            if admission is not Admission.READY:
                return admission
            resident = self._tier.residents[adapter_id]
        if resident.load.error is not None:
            raise resident.load.error
        if resident.is_loading and not resident.entry.is_ready:
            return Admission.LOADING
        self._hits.note(resident)
        self._tier.acquire(resident)
        return Admission.READY

    def may_acquire(self, adapter_id: int) -> bool:
        """False where `try_acquire` would say LOADING or NO_ROOM now; changes nothing, and reads no disk."""
        resident = self._tier.residents.get(adapter_id)
        if resident is not None:
            return resident.load.error is not None or not resident.is_loading or resident.entry.is_ready
        entry = self.host.find(adapter_id)
        if entry is None or entry.error is not None:
            return True  # it is to be asked for (again)
        return entry.has_room and self._tier.may_fit(entry.layout.num_bytes)

    def _place(self, adapter_id: int, num_tokens: int = 1) -> Admission:
        """Finds room on the device and begins the load; READY where that worked."""
        record = self._records.get(adapter_id)
        self._check_fits(record)
        entry = self.host.request(adapter_id)
        if not entry.has_room:
            return Admission.LOADING
        resident = self._tier.place(entry, lambda layout: self._mode.load_order(layout, num_tokens))
        if resident is None:
            return Admission.NO_ROOM if entry.is_ready else Admission.LOADING
        if self._mode.pins_all:
            self._pin(record)
        resident.is_pinned = adapter_id in self._pins
        return Admission.READY

    def release(self, adapter_id: int) -> None:
        """One request less that uses it."""
        self._tier.release(self._tier.residents[adapter_id])
        self._requeue_pin(adapter_id)

    def load_tokens(self, adapter_id: int) -> float:
        """What the load of an adapter that has its room costs, in tokens of prompts."""
        layout = self._tier.residents[adapter_id].entry.layout
        measured = self._mode.load_tokens(layout)
        return layout.num_bytes * self._tokens_per_byte if measured is None else measured

    def victims_for(self, adapter_id: int) -> list[int]:
        """Adapters in use, least valuable first, no more than needed, whose end would make room for it.

        Empty where it needs no more room than idle adapters and loads under way will leave.
        """
        return self._tier.victims_for(self._records.get(adapter_id).num_bytes)

    # --- for the model runner ---

    def can_fold(self, adapter_id: int) -> bool:
        """It is on the device, is to stay registered, and is A and B alone, on every token: what it adds can
        be added to the base model's weights."""
        resident = self._tier.residents.get(adapter_id)
        if resident is None or resident.is_loading or adapter_id in self.leaving:
            return False
        is_plain = not resident.load.layout.has_extras and not self.invocation_tokens_of(adapter_id)
        return is_plain and resident.load.error is None

    def set_folded(self, adapter_id: int, is_folded: bool) -> None:
        """Of an adapter on the device: it stays there while it is folded into the base model's weights."""
        resident = self._tier.residents[adapter_id]
        resident.is_folded = is_folded
        self._tier.update(resident)

    def slot_of(self, adapter_id: int) -> int:
        return self._tier.residents[adapter_id].slot

    def load_of(self, adapter_id: int) -> LoadHandle | None:
        """Its load, or None where that is done."""
        resident = self._tier.residents[adapter_id]
        return resident.load if resident.is_loading and not resident.load.done else None

    def host_entry_of(self, adapter_id: int) -> HostEntry:
        """Where its weights are in host memory; they stay there until a `poll` finds the load done."""
        return self._tier.residents[adapter_id].entry

    def has_failed(self, adapter_id: int) -> bool:
        """True where its load broke off: requests that use it cannot go on."""
        resident = self._tier.residents.get(adapter_id)
        return resident is not None and resident.load.error is not None

    # --- what is known of an adapter ---

    def rank_of(self, adapter_id: int) -> int:
        return self._records.get(adapter_id).rank

    def step_rank_of(self, adapter_id: int) -> int:
        return self._records.get(adapter_id).step_rank

    def invocation_tokens_of(self, adapter_id: int) -> tuple[int, ...]:
        """Empty but for an activated LoRA. Raises AdapterError."""
        return self._records.get(adapter_id).invocation_tokens

    def vocabulary_of(self, adapter_id: int) -> Vocabulary | None:
        """Its own, where it has one. Raises AdapterError."""
        return self._records.get(adapter_id).vocabulary

    def tier_of(self, adapter_id: int) -> str:
        """What a request that arrives now finds: "device", "host" or "disk". Raises AdapterError."""
        self._records.get(adapter_id)
        resident = self._tier.residents.get(adapter_id)
        if resident is not None:
            return resident.tier if self.load_of(adapter_id) is not None else "device"
        entry = self.host.find(adapter_id)
        return "host" if entry is not None and entry.ready_at is not None else "disk"

    def size_of(self, adapter_id: int) -> int:
        """Bytes, on host and device alike."""
        return self._records.get(adapter_id).num_bytes

    def targeted_groups(self, adapter_id: int) -> list[int]:
        """Of each layer, how many projection groups an adapter that is on the device changes."""
        return self._tier.residents[adapter_id].load.layout.targeted_groups()

    def load_times(self, adapter_id: int) -> LoadTimes:
        """Of an adapter that is on the device."""
        return self._tier.residents[adapter_id].load_times()

    def _check_fits(self, record: AdapterRecord) -> None:
        self._capacity.check(record.name, record.num_bytes, self._pins.bytes_beside(record.adapter_id))

    # --- pins ---

    def start(self) -> None:
        """Loads what is to be on the device from the start: all adapters, or those pinned in the registry.

        Raises AdapterError where the mode needs all of them and they do not fit or cannot be read.
        """
        if self._mode.pins_all:
            self.preload_all(self._registry.live_ids())
            return
        for adapter_id in self._registry.live_ids(is_pinned=True):
            try:
                self.set_pinned(adapter_id, True)
            except AdapterError as error:
                logger.warning("an adapter is not pinned: %s", error)

    def set_pinned(self, adapter_id: int, is_pinned: bool) -> None:
        """Loads the adapter as soon as there is room and keeps it on the device, or lets it be evicted again.

        Raises AdapterError where it can never fit, or is unknown.
        """
        record = self._records.get(adapter_id)
        if is_pinned:
            self._check_fits(record)
            self._pin(record)
            if not self.holds(adapter_id):
                self._pins.pending[adapter_id] = None
                self.prefetch(adapter_id)
        else:
            self._unpin(adapter_id)
        self._update_pin(adapter_id)

    def _pin(self, record: AdapterRecord) -> None:
        if self._pins.add(record.adapter_id, record.num_bytes):
            self._statuses.note_changed(record.adapter_id)

    def _unpin(self, adapter_id: int) -> None:
        self._statuses.note_changed(adapter_id)
        self._pins.remove(adapter_id)

    def _update_pin(self, adapter_id: int) -> None:
        resident = self._tier.residents.get(adapter_id)
        if resident is not None:
            resident.is_pinned = adapter_id in self._pins
            self._tier.update(resident)

    def preload_all(self, adapter_ids: Iterable[int]) -> None:
        """Loads and pins these adapters, and returns when they are on the device. Raises AdapterError."""
        records = [self._records.get(adapter_id) for adapter_id in adapter_ids]
        self._capacity.check_all(records, self.pool.num_slots)
        for record in records:
            self._pin(record)
        waiting = [record.adapter_id for record in records]
        while waiting:
            self._tier.poll()
            window = waiting[:PIN_WINDOW]
            not_placed = [adapter_id for adapter_id in window if not self._place_pinned(adapter_id)]
            waiting = not_placed + waiting[PIN_WINDOW:]
            if len(not_placed) == len(window):
                time.sleep(PRELOAD_POLL_S)
        self._tier.wait_for_loads()

    def _place_pinned(self, adapter_id: int) -> bool:
        """True once it has its room. No request waits for it, so that the first one finds it warm."""
        if not self.holds(adapter_id) and self._place(adapter_id) is not Admission.READY:
            return False
        self._tier.residents[adapter_id].is_fresh = False
        return True

    def poll(self) -> None:
        """Takes note of loads that landed and places pinned adapters; part of every `try_acquire`."""
        for adapter_id in self._tier.poll():
            self._requeue_pin(adapter_id)
        for adapter_id in list(self._pins.pending)[:PIN_WINDOW]:
            try:
                if self._place_pinned(adapter_id):
                    del self._pins.pending[adapter_id]
            except AdapterError as error:
                logger.warning(
                    "adapter %s is pinned and cannot be loaded: %s; its next request tries again",
                    *(adapter_id, error),
                )
                del self._pins.pending[adapter_id]

    def _requeue_pin(self, adapter_id: int) -> None:
        """A pinned adapter whose load failed is loaded again once its last user has gone."""
        if adapter_id in self._pins and not self.holds(adapter_id):
            self._pins.pending[adapter_id] = None

    def check(self) -> None:
        """Raises EngineLostError where adapters are read or loaded no more."""
        self.loader.check()
        self.host.check()

    # --- removal ---

    def request_removal(self, adapter_id: int) -> None:
        """It is to go; requests that were accepted before may acquire it until `is_removed` says True."""
        self.leaving.add(adapter_id)
        self._unpin(adapter_id)
        self._update_pin(adapter_id)

    def is_removed(self, adapter_id: int) -> bool:
        """Frees its host and device memory unless it is in use or being copied; to be asked until True.

        From then on `try_acquire` refuses it. Whoever wants requests that still wait for it to be served asks
        when there are none left.
        """
        self.poll()
        if not (self._tier.try_drop(adapter_id) and self.host.try_remove(adapter_id)):
            return False
        self.leaving.discard(adapter_id)
        self._records.remove(adapter_id)
        self._hits.forget(adapter_id)
        return True

    # --- what others are told ---

    def status(self, num_waiting: Mapping[int, int]) -> list[AdapterStatus]:
        """Every adapter that is on host or device or has waiting requests (`num_waiting`, by adapter id)."""
        self.poll()
        return self._statuses.all(num_waiting)

    def changes(self, num_waiting: Mapping[int, int]) -> list[AdapterStatus]:
        """Of `status` what may have changed since the last call, and adapters that have left it: what it
        costs does not grow with the number of adapters."""
        self.poll()
        return self._statuses.changes(num_waiting)

    def counters(self) -> dict[str, float]:
        """Hits and misses count acquired requests: host hits and misses add up to the device misses."""
        compactions = {"pool_compactions": self.pool.num_compactions}
        return {**self._hits.counters, **self._tier.counters, **self.host.counters, **compactions}

    def check_integrity(self) -> None:
        """All tiers are consistent, and the pins are where they are said to be."""
        self.poll()
        self._tier.check_integrity()
        self.host.check_integrity()
        self._pins.check_integrity()
        assert all(r.is_pinned == (a in self._pins) for a, r in self._tier.residents.items())

    def close(self) -> None:
        """Ends the threads; loads under way fail."""
        self.loader.close()
        self.host.close()
