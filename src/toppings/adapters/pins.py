"""Adapters that are to stay on the device."""


class Pins:
    """`pending`: those that are not on the device yet, first to last."""

    def __init__(self) -> None:
        self.pending: dict[int, None] = {}
        self._bytes: dict[int, int] = {}
        self._total_bytes = 0

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._bytes

    def bytes_beside(self, adapter_id: int) -> int:
        """Of all others."""
        return self._total_bytes - self._bytes.get(adapter_id, 0)

    def add(self, adapter_id: int, num_bytes: int) -> bool:
        """False where it is pinned already."""
        if adapter_id in self._bytes:
            return False
        self._bytes[adapter_id] = num_bytes
        self._total_bytes += num_bytes
        return True

    def remove(self, adapter_id: int) -> None:
        self._total_bytes -= self._bytes.pop(adapter_id, 0)
        self.pending.pop(adapter_id, None)

    def check_integrity(self) -> None:
        assert sum(self._bytes.values()) == self._total_bytes
