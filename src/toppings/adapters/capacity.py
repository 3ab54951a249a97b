"""Whether adapters fit the memory that there is for them, before any is accepted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toppings.adapters.errors import AdapterError
from toppings.adapters.records import AdapterRecord

MAX_NAMES = 3  # of pinned adapters in a message


@dataclass(frozen=True)
class Capacity:
    """Bytes of the device pool and of the host store."""

    device_bytes: int
    host_bytes: int

    def check(self, name: str, num_bytes: int, held: int = 0, holders: str = "pinned adapters") -> None:
        """Raises AdapterError where an adapter can never be served while `holders` keep `held` bytes of the
        device pool."""
        if num_bytes > self.device_bytes - held:
            others = f", of which {held} belong to {holders}" if held else ""
            raise AdapterError(
                f"adapter {name!r} takes {num_bytes} bytes; the device pool has {self.device_bytes}{others} "
                "(device_pool_bytes)"
            )
        check_host(name, num_bytes, self.host_bytes)

    def check_beside(self, name: str, num_bytes: int, pinned: Sequence[AdapterRecord]) -> None:
        """As `check`, where `pinned` hold what is theirs."""
        self.check(name, num_bytes, sum(r.num_bytes for r in pinned), f"{_names(pinned)}, pinned")

    def check_all(self, records: Sequence[AdapterRecord], num_slots: int) -> None:
        """Raises AdapterError where the device pool, which has `num_slots`, cannot hold all at once."""
        needed = sum(record.num_bytes for record in records)
        if needed > self.device_bytes or len(records) > num_slots:
            raise AdapterError(
                f"{len(records)} adapters take {needed} bytes, but the device pool holds "
                f"{self.device_bytes} bytes (device_pool_bytes) and {num_slots} adapters; "
                "raise device_pool_bytes, register fewer, or use a mode that loads them when they are needed"
            )

    def check_pin(
        self, record: AdapterRecord, pinned: Sequence[AdapterRecord], others: Iterable[AdapterRecord]
    ) -> None:
        """Raises AdapterError where `record` cannot be pinned, too, or one of `others` could not be served
        then."""
        self.check_beside(record.name, record.num_bytes, pinned)
        left = self.device_bytes - record.num_bytes - sum(each.num_bytes for each in pinned)
        largest = max(others, key=lambda each: each.num_bytes, default=None)
        if largest is not None and largest.num_bytes > left:
            raise AdapterError(
                f"pinning {record.name!r} ({record.num_bytes} bytes) would leave {left} bytes of the device "
                f"pool, too few for adapter {largest.name!r} ({largest.num_bytes} bytes); unload one of "
                "the two or raise device_pool_bytes"
            )


def check_host(adapter: str | int, num_bytes: int, host_bytes: int) -> None:
    """Raises AdapterError where an adapter, by its name or id, is larger than the host store."""
    if num_bytes > host_bytes:
        raise AdapterError(
            f"adapter {adapter!r} takes {num_bytes} bytes; the host store has {host_bytes} (host_store_bytes)"
        )


def _names(records: Sequence[AdapterRecord]) -> str:
    names = ", ".join(repr(record.name) for record in records[:MAX_NAMES])
    return f"{names} and {len(records) - MAX_NAMES} more" if len(records) > MAX_NAMES else names
