"""The host store's room: who lies where in its arena, who leaves for whom, what moves to join fragments."""

import threading

from toppings.adapters.allocator import Block, RangeAllocator, plan_compaction
from toppings.adapters.arena import HostArena
from toppings.adapters.eviction import EvictionPolicy
from toppings.adapters.host_entry import EntryState, HostEntry
from toppings.adapters.layout import AdapterLayout

EVICTION_BATCH_SHARE = 64
"""A full store evicts up to 1/64 of its capacity at once."""
PLACED = (EntryState.READING, EntryState.READY, EntryState.MOVING)


class HostRoom:
    """`entries` by adapter id, with or without a place; `changed`: those that have come or gone. All of it is
    guarded by `wake`, which whoever calls holds, but for `move`."""

    def __init__(self, arena: HostArena, policy: EvictionPolicy, wake: threading.Condition) -> None:
        self.allocator = RangeAllocator(arena.size_bytes)
        self.entries: dict[int, HostEntry] = {}
        self.changed: set[int] = set()
        self.num_evictions = 0
        self._arena = arena
        self._policy = policy
        self._wake = wake

    def try_place(self, entry: HostEntry, layout: AdapterLayout, sizes: list[int]) -> bool:
        if self.allocator.num_free < layout.num_bytes and not self._evict_for(layout.num_bytes):
            return False
        offsets = self.allocator.try_allocate_all(sizes)
        if offsets is not None:
            entry.place(layout, offsets)
        return offsets is not None

    def _evict_for(self, needed: int) -> bool:
        """Frees `needed` bytes, and a few more, so that thousands of small entries are not ranked often."""
        victims = [e for e in self.entries.values() if e.is_idle and not e.is_wanted]
        if self.allocator.num_free + sum(v.layout.num_bytes for v in victims) < needed:
            return False
        victims.sort(key=lambda e: self._policy.worth(e.adapter_id), reverse=True)
        self.free(victims.pop(), was_evicted=True)
        while self.allocator.num_free < needed:
            self.free(victims.pop(), was_evicted=True)
        spare = max(needed, self.allocator.capacity // EVICTION_BATCH_SHARE)
        while victims and self.allocator.num_free + victims[-1].layout.num_bytes <= spare:
            self.free(victims.pop(), was_evicted=True)
        return True

    def free(self, entry: HostEntry, *, was_evicted: bool) -> None:
        assert entry.is_idle
        self.allocator.free_all(entry.offsets, entry.sizes())
        self._policy.forget(entry.adapter_id, was_evicted=was_evicted)
        self.num_evictions += was_evicted
        self.changed.add(entry.adapter_id)
        del self.entries[entry.adapter_id]

    def plan_moves(self, needed: int) -> list[tuple[HostEntry, int, int]]:
        """(entry, layer, new offset) that open a hole of `needed` bytes; the entries are marked as moving."""
        if self.allocator.num_free < needed:
            return []
        ranges = sorted(
            (offset, size, entry.adapter_id, layer)
            for entry in self.entries.values()
            if entry.state in PLACED
            for layer, (offset, size) in enumerate(zip(entry.offsets, entry.sizes(), strict=True))
            if size
        )
        blocks = [Block(offset, size, self.entries[owner].is_idle) for offset, size, owner, _ in ranges]
        targets = plan_compaction(blocks, needed)
        moves = [
            (self.entries[owner], layer, target)
            for (offset, _, owner, layer), target in zip(ranges, targets, strict=True)
            if target != offset
        ]
        for entry, _, _ in moves:
            entry.state = EntryState.MOVING
        self.allocator.reset([(target, block.size) for target, block in zip(targets, blocks, strict=True)])
        return moves

    def move(self, moves: list[tuple[HostEntry, int, int]]) -> None:
        """Without the lock, since it may take long: nobody else touches entries that are moving."""
        for entry, layer, target in moves:
            self._arena.move(entry.offsets[layer], target, entry.layout.layer_bytes(layer))
            entry.offsets[layer] = target
        with self._wake:
            for entry, _, _ in moves:
                entry.state = EntryState.READY
            self._wake.notify_all()

    def check_integrity(self) -> None:
        """Entries and free ranges tile the arena."""
        placed = [e for e in self.entries.values() if e.state in PLACED]
        ranges = [(o, s) for e in placed for o, s in zip(e.offsets, e.sizes(), strict=True) if s]
        self.allocator.check_integrity(ranges)
