"""A simulated server's host memory, filled from a disk that reads one adapter after another."""

from collections.abc import Collection

from toppings.sim.settings import NS_PER_MS, SimConfig


class HostTier:
    """Bounded; the least recently asked for leaves first, but never one whose read is under way."""

    def __init__(self, config: SimConfig, adapter_bytes: list[int]) -> None:
        self._bytes = adapter_bytes
        self._capacity_bytes = config.host_store_bytes
        disk_ms = config.perf_model.load_ms(1.0, is_on_host=False) - config.perf_model.load_ms(
            1.0, is_on_host=True
        )
        self._ns_per_byte = disk_ms * NS_PER_MS
        self._ready_at: dict[int, int] = {}  # least recently asked for first
        self._used_bytes = 0
        self.num_reads = 0
        self._disk_free_ns = 0

    def is_ready(self, adapter_id: int, now_ns: int) -> bool:
        """Whether it can be copied to the device; if it is not there, its read begins where there is room.

        Raises ValueError for an adapter that is larger than the store.
        """
        ready_at = self._ready_at.pop(adapter_id, None)
        if ready_at is None:
            ready_at = self._begin_read(adapter_id, now_ns)
        if ready_at is None:
            return False
        self._ready_at[adapter_id] = ready_at
        return ready_at <= now_ns

    def _begin_read(self, adapter_id: int, now_ns: int) -> int | None:
        num_bytes = self._bytes[adapter_id]
        if num_bytes > self._capacity_bytes:
            raise ValueError(
                f"adapter {adapter_id} takes {num_bytes} bytes; the host store has {self._capacity_bytes}"
            )
        if not self._make_room(num_bytes, now_ns):
            return None
        self._used_bytes += num_bytes
        self.num_reads += 1
        self._disk_free_ns = max(now_ns, self._disk_free_ns) + round(num_bytes * self._ns_per_byte)
        return self._disk_free_ns

    def _make_room(self, num_bytes: int, now_ns: int) -> bool:
        """Room for so many bytes; nothing is changed where reads under way take too much."""
        missing = num_bytes - (self._capacity_bytes - self._used_bytes)
        victims = []
        for adapter_id, ready_at in self._ready_at.items():
            if missing <= 0:
                break
            if ready_at <= now_ns:
                victims.append(adapter_id)
                missing -= self._bytes[adapter_id]
        if missing > 0:
            return False
        for victim in victims:
            del self._ready_at[victim]
            self._used_bytes -= self._bytes[victim]
        return True

    def next_ready_ns(self, now_ns: int) -> int | None:
        """When the next read ends; None where none is under way."""
        if self._disk_free_ns <= now_ns:
            return None
        return min(ready_at for ready_at in self._ready_at.values() if ready_at > now_ns)

    def ids(self) -> Collection[int]:
        return self._ready_at.keys()
