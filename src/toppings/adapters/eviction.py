"""Which adapter leaves first, in host memory and on the device alike."""

from collections.abc import Iterable
from typing import Protocol

RELOAD_OVERHEAD_BYTES = 1 << 20
"""What starting a load costs, as bytes that could have travelled meanwhile (about 40 µs at 25 GB/s)."""


class EvictionPolicy(Protocol):
    """Keeps a worth per key; of the keys that may leave, the one with the least worth leaves first."""

    def touch(self, key: int, num_bytes: int) -> None:
        """The key was brought in or used."""

    def forget(self, key: int, *, was_evicted: bool) -> None:
        """The key is gone: `was_evicted` to make room, otherwise removed by its owner."""

    def worth(self, key: int) -> float: ...


class ValuePolicy:
    """GreedyDual-Size-Frequency (Cherkasova 1998): worth = age + uses * reload cost / size.

    The reload cost in bytes of link time is `num_bytes + RELOAD_OVERHEAD_BYTES`, so small adapters, which
    cost more per byte to bring back, stay longer. `age` is the worth of the last key that was
    evicted: what came or was used since starts above it, so that old popularity fades.
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._num_uses: dict[int, int] = {}
        self._worth: dict[int, float] = {}

    def touch(self, key: int, num_bytes: int) -> None:
        uses = self._num_uses[key] = self._num_uses.get(key, 0) + 1
        cost_per_byte = (num_bytes + RELOAD_OVERHEAD_BYTES) / max(num_bytes, 1)
        self._worth[key] = self._age + uses * cost_per_byte

    def forget(self, key: int, *, was_evicted: bool) -> None:
        self._num_uses.pop(key, None)
        worth = self._worth.pop(key, 0.0)
        if was_evicted:
            self._age = max(self._age, worth)

    def worth(self, key: int) -> float:
        return self._worth.get(key, 0.0)


class LruPolicy:
    """Least recently used leaves first."""

    def __init__(self) -> None:
        self._clock = 0
        self._used_at: dict[int, int] = {}

    def touch(self, key: int, num_bytes: int) -> None:
        self._clock += 1
        self._used_at[key] = self._clock

    def forget(self, key: int, *, was_evicted: bool) -> None:
        self._used_at.pop(key, None)

    def worth(self, key: int) -> float:
        return float(self._used_at.get(key, 0))


POLICIES: dict[str, type[ValuePolicy] | type[LruPolicy]] = {"value": ValuePolicy, "lru": LruPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """Raises ValueError for a name that is not in `POLICIES`."""
    if name not in POLICIES:
        raise ValueError(f"eviction policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()


def least_valuable(policy: EvictionPolicy, keys: Iterable[int]) -> list[int]:
    """`keys`, the one that should leave first in front."""
    return sorted(keys, key=policy.worth)
