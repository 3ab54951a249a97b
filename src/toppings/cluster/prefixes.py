"""Which servers were sent which beginnings of prompts lately: what their caches may still hold.

A prompt is a chain of blocks, each named by what it and all before it hold, its adapter among them, as the
blocks of a server's cache are. Of each server as many are remembered as its cache holds tokens of; those that
were not sent for longest leave first, and of one prompt the last ones before those that they continue.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from toppings.cluster.instances import IntArray
from toppings.cluster.perf_model import FloatArray

FEW = 16
"""Servers that are written one by one faster than all at once."""
MAX_BLOCKS = 1_000_000
"""Of all servers together; a block is some 200 bytes of memory."""


class PrefixIndex:
    """Servers have numbers, so that the holders of a block are the bits of one integer, and to look for a
    prompt's blocks costs the same with any number of servers.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._held: dict[str, dict[Hashable, None]] = {}  # by server, longest unused first
        self._holders: dict[Hashable, int] = {}
        self._order: IntArray = np.zeros(0, dtype=np.int64)
        self._num_numbers = 0

    def set_instances(self, instance_ids: Sequence[str]) -> None:
        """These are the servers, in the order of rows; others are forgotten."""
        for gone in self._numbers.keys() - set(instance_ids):
            self.forget(gone)
            del self._numbers[gone]
        taken = set(self._numbers.values())
        free = (number for number in range(len(instance_ids)) if number not in taken)
        for instance_id in instance_ids:
            if instance_id not in self._numbers:
                self._numbers[instance_id] = next(free)
        self._order = np.array([self._numbers[each] for each in instance_ids], dtype=np.int64)
        self._num_numbers = max(self._numbers.values(), default=-1) + 1

    def forget(self, instance_id: str) -> None:
        """Its cache is empty, or it is gone."""
        for name in self._held.pop(instance_id, ()):
            self._drop(name, 1 << self._numbers[instance_id])

    def num_blocks(self, instance_id: str) -> int:
        return len(self._held.get(instance_id, ()))

    def depths(self, blocks: Sequence[Hashable]) -> FloatArray | None:
        """How many of a prompt's blocks, counted from its first, each server was sent [N]; None where none
        was.
        """
        holders = self._holders
        mask = holders.get(blocks[0], 0) if blocks else 0
        if not mask:
            return None
        depths, depth = np.zeros(self._num_numbers), 0
        for name in blocks:
            here = holders.get(name, 0) & mask
            if here != mask:
                self._fill(depths, mask & ~here, depth)
                mask = here
                if not mask:
                    break
            depth += 1
        self._fill(depths, mask, depth)
        in_order: FloatArray = depths[self._order]
        return in_order

    def _fill(self, depths: FloatArray, mask: int, depth: int) -> None:
        """Of the servers in the mask."""
        if mask.bit_count() > FEW:
            octets = np.frombuffer(mask.to_bytes((self._num_numbers + 7) // 8, "little"), dtype=np.uint8)
            depths[np.unpackbits(octets, count=self._num_numbers, bitorder="little").view(np.bool_)] = depth
            return
        while mask:
            lowest = mask & -mask
            depths[lowest.bit_length() - 1] = depth
            mask ^= lowest

    def note(self, instance_id: str, blocks: Sequence[Hashable], num_cached: float) -> None:
        """A prompt was sent there; the cache holds `num_cached` blocks."""
        bit, held = 1 << self._numbers[instance_id], self._held.setdefault(instance_id, {})
        holders = self._holders
        for name in reversed(blocks):
            if held.pop(name, self) is self:
                holders[name] = holders.get(name, 0) | bit
            held[name] = None
        num_most = min(num_cached, MAX_BLOCKS // len(self._numbers))
        while len(held) > num_most:
            oldest = next(iter(held))
            del held[oldest]
            self._drop(oldest, bit)

    def _drop(self, name: Hashable, bit: int) -> None:
        left = self._holders[name] & ~bit
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]

    def check_integrity(self) -> None:
        """AssertionError where the two views of who holds what differ."""
        recounted: dict[Hashable, int] = {}
        for instance_id, held in self._held.items():
            for name in held:
                recounted[name] = recounted.get(name, 0) | 1 << self._numbers[instance_id]
        assert recounted == self._holders
