"""Ranges of a flat arena, handed out and taken back: best fit with coalescing, and compaction's plan.

Units are the caller's (bytes on the host, elements on the device); it keeps its sizes aligned.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Block:
    """A range in use; `is_movable` is False while somebody reads or writes it."""

    offset: int
    size: int
    is_movable: bool


class RangeAllocator:
    """Free ranges of `[0, capacity)`, kept sorted by offset and by (size, offset)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reset(())

    def reset(self, ranges_in_use: Sequence[tuple[int, int]]) -> None:
        """Everything is free but these (offset, size), which are sorted and disjoint."""
        self._offsets: list[int] = []
        self._sizes: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self.num_free = 0
        cursor = 0
        for offset, size in (*ranges_in_use, (self.capacity, 0)):
            assert offset >= cursor, "ranges overlap"
            if offset > cursor:
                self._insert(cursor, offset - cursor)
            cursor = offset + size

    @property
    def largest_free(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    def try_allocate(self, size: int) -> int | None:
        """The offset of a range of `size` > 0 out of the smallest hole that has it, or None."""
        assert size > 0
        i = bisect_left(self._by_size, (size, 0))
        if i == len(self._by_size):
            return None
        hole_size, offset = self._by_size[i]
        self._delete(offset)
        if hole_size > size:
            self._insert(offset + size, hole_size - size)
        return offset

    def try_allocate_all(self, sizes: Sequence[int]) -> list[int] | None:
        """One offset per size (-1 for size 0), or None and nothing allocated."""
        offsets: list[int] = []
        for size in sizes:
            offset = self.try_allocate(size) if size else -1
            if offset is None:
                self.free_all(offsets, sizes[: len(offsets)])
                return None
            offsets.append(offset)
        return offsets

    def free(self, offset: int, size: int) -> None:
        i = bisect_left(self._offsets, offset)
        if i < len(self._offsets):
            next_offset = self._offsets[i]
            assert offset + size <= next_offset, "range is already free"
            if offset + size == next_offset:
                size += self._delete(next_offset)
        if i > 0:
            previous = self._offsets[i - 1]
            assert previous + self._sizes[previous] <= offset, "range is already free"
            if previous + self._sizes[previous] == offset:
                size += self._delete(previous)
                offset = previous
        self._insert(offset, size)

    def free_all(self, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        for offset, size in zip(offsets, sizes, strict=True):
            if size:
                self.free(offset, size)

    def check_integrity(self, ranges_in_use: Sequence[tuple[int, int]]) -> None:
        """Free ranges and those in use (sorted by offset) tile the arena; no two free ones touch."""
        holes = [(offset, self._sizes[offset]) for offset in self._offsets]
        assert sorted((size, offset) for offset, size in holes) == self._by_size
        assert sum(size for _, size in holes) == self.num_free
        assert all(a[0] + a[1] < b[0] for a, b in pairwise(holes)), "free ranges touch"
        cursor = 0
        for offset, size in sorted([*holes, *ranges_in_use]):
            assert offset == cursor, f"gap or overlap at {cursor}"
            assert size > 0
            cursor = offset + size
        assert cursor == self.capacity

    def _insert(self, offset: int, size: int) -> None:
        insort(self._offsets, offset)
        insort(self._by_size, (size, offset))
        self._sizes[offset] = size
        self.num_free += size

    def _delete(self, offset: int) -> int:
        size = self._sizes.pop(offset)
        del self._offsets[bisect_left(self._offsets, offset)]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        self.num_free -= size
        return size


def plan_compaction(blocks: Sequence[Block], needed: int) -> list[int]:
    """New offsets of `blocks` (sorted by offset), slid towards 0 until a hole of `needed` has opened.

    Carried out in order, no move overwrites a block that has yet to move. Blocks that may not move stay, and
    holes in front of them may remain: with none of those, everything free becomes one hole if need be.
    """
    offsets = [block.offset for block in blocks]
    cursor = 0
    for i, block in enumerate(blocks):
        if block.offset - cursor >= needed:
            break
        if block.is_movable:
            offsets[i] = cursor
        cursor = offsets[i] + block.size
    return offsets
