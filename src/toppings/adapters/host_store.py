"""Adapters in host memory: a bounded arena, filled from disk by a thread, least valuable evicted.

    request/prefetch -> queued -> reading -> ready -> evicted or removed
                        (no room yet) (room taken; layers become ready one by one)

An entry stays where it is while it is pinned (somebody copies or computes from it) or being read. One that
was asked for lately and not fetched yet is not evicted for another, lest two that wait undo each other's
reads. Only the reader thread takes room, evicts and moves; callers never wait for it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from toppings.adapters.arena import Bytes, HostArena
from toppings.adapters.capacity import check_host
from toppings.adapters.errors import AdapterError, StateError
from toppings.adapters.eviction import EvictionPolicy
from toppings.adapters.host_entry import EntryState, HostEntry
from toppings.adapters.host_room import HostRoom
from toppings.adapters.latest import Latest
from toppings.adapters.layout import BLOCK_ALIGNMENT_BYTES, AdapterLayout
from toppings.adapters.packed import PackedFileError
from toppings.vital import VitalThread

logger = logging.getLogger(__name__)

RETRY_S = 0.05
"""How often a read that found no room looks whether entries are still wanted."""

MAX_TOLD = 1024
"""Adapters whose failure is remembered as told."""
CLOSE_TIMEOUT_S = 5.0
"""How long the layer that is being read at the end may take."""


class PackedReader(Protocol):
    """An open packed adapter (a `PackedAdapter`)."""

    @property
    def layout(self) -> AdapterLayout: ...

    def read_layer(self, layer: int, into: Bytes) -> None: ...

    def close(self) -> None: ...


class PackedSource(Protocol):
    """Where packed adapters come from (the registry)."""

    def open_packed(self, adapter_id: int) -> PackedReader: ...

    def rebuild(self, adapter_id: int) -> None: ...


class HostStore:
    """At most `capacity_bytes` of adapters. `on_progress` is called by the reader thread after each layer."""

    def __init__(
        self,
        capacity_bytes: int,
        source: PackedSource,
        policy: EvictionPolicy,
        *,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        if capacity_bytes < BLOCK_ALIGNMENT_BYTES:
            raise ValueError(
                f"host store of {capacity_bytes} bytes; it must have at least {BLOCK_ALIGNMENT_BYTES}"
            )
        capacity = capacity_bytes // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES
        self.arena = HostArena(capacity)
        self._source = source
        self._policy = policy
        self._on_progress = on_progress
        self._queue: deque[HostEntry] = deque()
        self._wake = threading.Condition()  # reentrant; guards all of the above
        self._room = HostRoom(self.arena, policy, self._wake)
        self._is_closed = False
        self._told: Latest[int, str] = Latest(
            MAX_TOLD
        )  # why an adapter could not be read, by id; the reader thread's own
        self._counters = {"adapter_reads": 0, "adapter_read_bytes": 0, "read_errors": 0}
        self._thread = VitalThread(self._run, "adapter-reader")
        self._thread.start()

    @property
    def capacity_bytes(self) -> int:
        return self.arena.size_bytes

    @property
    def used_bytes(self) -> int:
        return self.capacity_bytes - self._room.allocator.num_free

    @property
    def counters(self) -> dict[str, int]:
        return {"host_evictions": self._room.num_evictions, **self._counters}

    # --- for callers: none of these waits for the reader ---

    def find(self, adapter_id: int) -> HostEntry | None:
        return self._room.entries.get(adapter_id)

    def ready_ids(self) -> list[int]:
        """Adapters that are wholly in host memory."""
        with self._wake:
            return [e.adapter_id for e in self._room.entries.values() if e.state in _RESIDENT]

    def holds(self, adapter_id: int) -> bool:
        """It is wholly in host memory."""
        entry = self._room.entries.get(adapter_id)
        return entry is not None and entry.state in _RESIDENT

    def take_changed(self) -> set[int]:
        """Adapters that have come or gone since the last call."""
        with self._wake:
            changed, self._room.changed = self._room.changed, set()
            return changed

    def prefetch(self, adapter_id: int) -> None:
        """Queues a read if the adapter is not here, also where its last one failed."""
        with self._wake:
            entry = self._room.entries.get(adapter_id)
            if entry is not None and entry.error is not None:
                del self._room.entries[adapter_id]
            self.request(adapter_id)

    def request(self, adapter_id: int) -> HostEntry:
        """The adapter's entry, whose read is queued if there was none; it is kept for `WANTED_S` from now.

        Raises AdapterError where its last read failed; the request after that tries again.
        """
        with self._wake:
            entry = self._room.entries.get(adapter_id)
            if entry is None:
                entry = self._room.entries[adapter_id] = HostEntry(adapter_id, self.arena)
                self._queue.append(entry)
                self._wake.notify_all()
            entry.wanted_at = time.perf_counter()
            if entry.error is not None:
                del self._room.entries[adapter_id]
                raise entry.error
            return entry

    def try_pin(self, entry: HostEntry) -> bool:
        """Keeps the entry in its place until `unpin`; False where it has none just now."""
        with self._wake:
            if not entry.has_room or self._room.entries.get(entry.adapter_id) is not entry:
                return False
            entry.num_pins += 1
            entry.was_fetched = True
            if entry.is_ready:
                self._policy.touch(entry.adapter_id, entry.layout.num_bytes)
            return True

    def unpin(self, entry: HostEntry) -> None:
        with self._wake:
            assert entry.num_pins > 0
            entry.num_pins -= 1
            self._wake.notify_all()

    def try_remove(self, adapter_id: int) -> bool:
        """True once the adapter is gone; False while it is used, read or moved: ask again."""
        with self._wake:
            entry = self._room.entries.get(adapter_id)
            if entry is None:
                return True
            if entry.state in (EntryState.QUEUED, EntryState.FAILED):
                del self._room.entries[adapter_id]
                return True
            if not entry.is_idle:
                return False
            self._room.free(entry, was_evicted=False)
            return True

    def check(self) -> None:
        """Raises EngineLostError where nothing will be read any more."""
        self._thread.check()

    def close(self) -> None:
        """Ends the thread, unless a disk hangs: its memory then stays."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self.arena.close()

    def check_integrity(self) -> None:
        """Entries and free ranges tile the arena, and the states agree with the room taken."""
        with self._wake:
            # While entries move, the allocator is ahead of their offsets.
            self._wake.wait_for(
                lambda: all(e.state is not EntryState.MOVING for e in self._room.entries.values())
            )
            self._room.check_integrity()
            queued = [e for e in self._room.entries.values() if e.state is EntryState.QUEUED]
            assert all(e.num_pins == 0 for e in queued)

    # --- the reader thread ---

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._read(entry)
            except Exception as error:
                self._fail(entry, error)
            self._on_progress()

    def _next(self) -> HostEntry | None:
        """The next entry to read, or None when the store is closed."""
        with self._wake:
            while True:
                self._wake.wait_for(lambda: self._is_closed or bool(self._queue))
                if self._is_closed:
                    return None
                entry = self._queue.popleft()
                if self._room.entries.get(entry.adapter_id) is entry:
                    return entry

    def _read(self, entry: HostEntry) -> None:
        started_at = time.perf_counter()
        packed = self._source.open_packed(entry.adapter_id)
        try:
            waited_at = time.perf_counter()
            if not self._make_room(entry, packed.layout):
                return
            for offset, size in zip(entry.offsets, entry.sizes(), strict=True):
                self.arena.use(offset, size)
            entry.read_at = time.perf_counter()
            started_at += entry.read_at - waited_at  # waiting for room is not reading
            for layer in range(packed.layout.num_layers):
                packed = self._read_layer(entry, packed, layer)
                if self._is_closed:
                    return
                entry.num_layers_ready = layer + 1
                self._on_progress()
        finally:
            packed.close()
        self._finish(entry, (time.perf_counter() - started_at) * 1e3)

    def _read_layer(self, entry: HostEntry, packed: PackedReader, layer: int) -> PackedReader:
        """Reads one layer; a damaged file is made again, with the same content, and read on from there."""
        try:
            packed.read_layer(layer, entry.layer_view(layer))
        except PackedFileError as error:
            logger.warning("%s; making it again", error)
            self._source.rebuild(entry.adapter_id)
            packed.close()
            packed = self._source.open_packed(entry.adapter_id)
            packed.read_layer(layer, entry.layer_view(layer))
        return packed

    def _finish(self, entry: HostEntry, read_ms: float) -> None:
        self._told.pop(entry.adapter_id, None)
        with self._wake:
            entry.read_ms = read_ms
            entry.ready_at = time.perf_counter()
            entry.state = EntryState.READY
            self._room.changed.add(entry.adapter_id)
            self._policy.touch(entry.adapter_id, entry.layout.num_bytes)
            self._counters["adapter_reads"] += 1
            self._counters["adapter_read_bytes"] += entry.layout.num_bytes

    def _fail(self, entry: HostEntry, error: Exception) -> None:
        is_expected = isinstance(error, AdapterError | StateError)
        if self._told.get(entry.adapter_id) != str(error):  # each request tries again: once is enough
            logger.warning("adapter %s cannot be read: %s", entry.adapter_id, error, exc_info=not is_expected)
        self._told[entry.adapter_id] = str(error)
        with self._wake:
            if entry.state is EntryState.READING:
                self._room.allocator.free_all(entry.offsets, entry.sizes())
            entry.state = EntryState.FAILED
            entry.error = error if isinstance(error, AdapterError) else AdapterError(f"read failed: {error}")
            self._counters["read_errors"] += 1

    def _make_room(self, entry: HostEntry, layout: AdapterLayout) -> bool:
        """Places the entry, waiting until enough others may leave; False where nobody wants it any more."""
        check_host(entry.adapter_id, layout.num_bytes, self.capacity_bytes)
        sizes = [layout.layer_bytes(layer) for layer in range(layout.num_layers)]
        while True:
            with self._wake:
                if self._is_closed or self._room.entries.get(entry.adapter_id) is not entry:
                    return False
                if self._room.try_place(entry, layout, sizes):
                    return True
                moves = self._room.plan_moves(layout.num_bytes)
                if not moves and not entry.is_wanted:
                    del self._room.entries[entry.adapter_id]
                    return False
                if not moves:
                    self._wake.wait(RETRY_S)
            self._room.move(moves)


_RESIDENT = (EntryState.READY, EntryState.MOVING)
