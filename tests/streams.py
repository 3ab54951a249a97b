"""Streams, events and memory of a device that is not there: who reads and writes what, and in which order.

Every stream is a line of numbered operations. What has happened before an operation for certain is known from
its stream's own line, from events that it waited for, and from what the host had seen to be over when it
queued it. Two accesses to the same place, one of them a write, neither of which is certain to come first, are
a race, and `Device.check` raises it.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Clock = dict[str, int]
"""By stream, the operations that are over."""


def merge(into: Clock, other: Clock) -> None:
    for name, count in other.items():
        into[name] = max(into.get(name, 0), count)


@dataclass
class FakeStream:
    device: "Device"
    name: str
    clock: Clock = field(default_factory=dict)

    def advance(self) -> Clock:
        """One more operation is queued; what is over when it is."""
        self.device.touch()
        merge(self.clock, self.device.host_clock)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def wait_event(self, event: "FakeEvent") -> None:
        self.device.touch()
        merge(self.clock, event.clock)

    def synchronize(self) -> None:
        self.device.touch()
        merge(self.device.host_clock, self.clock)


@dataclass
class FakeEvent:
    device: "Device"
    clock: Clock = field(default_factory=dict)
    is_over: bool = False

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = (stream or self.device.current_stream()).advance()

    def query(self) -> bool:
        self.device.touch()
        is_over = self.is_over or self.device.is_idle
        if is_over:
            merge(self.device.host_clock, self.clock)
        return is_over

    def synchronize(self) -> None:
        self.is_over = True
        self.query()

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1.0


@dataclass(frozen=True)
class Access:
    start: int
    stop: int
    is_write: bool
    stream: str
    before: Clock
    what: str

    @property
    def number(self) -> int:
        return self.before[self.stream]

    def races_with(self, later: "Access") -> bool:
        overlap = self.start < later.stop and later.start < self.stop
        is_known = later.before.get(self.stream, 0) >= self.number
        return overlap and (self.is_write or later.is_write) and not is_known


class Device:
    """Stands in for `torch.cuda`. `is_idle`: whatever was queued is over, as far as queries say. From call
    number `fails_from` on, its context is lost: every call raises what CUDA then raises."""

    def __init__(self, *, fails_from: int | None = None) -> None:
        self.is_idle = False
        self.fails_from = fails_from
        self.num_calls = 0
        self.threads_on_device: set[str] = set()
        self.host_clock: Clock = {}
        self.accesses: list[Access] = []
        self._names = itertools.count()
        self._compute = FakeStream(self, "compute")
        self._current = threading.local()

    def touch(self) -> None:
        self.num_calls += 1
        if self.fails_from is not None and self.num_calls >= self.fails_from:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def Stream(self) -> FakeStream:
        return FakeStream(self, f"stream {next(self._names)}")

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def set_device(self, device: "Device") -> None:
        self.threads_on_device.add(threading.current_thread().name)

    def current_stream(self) -> FakeStream:
        stream: FakeStream = getattr(self._current, "stream", self._compute)
        return stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def access(self, start: int, stop: int, what: str, *, is_write: bool) -> None:
        """Work on the current stream reads or writes bytes [start, stop)."""
        stream = self.current_stream()
        self.accesses.append(Access(start, stop, is_write, stream.name, stream.advance(), what))

    def check(self) -> None:
        for earlier, later in itertools.combinations(self.accesses, 2):
            assert not earlier.races_with(later), f"{later.what} may overtake {earlier.what}"


@dataclass(frozen=True)
class Memory:
    """Part of a device's memory, as much of a tensor as loader and pool need; items of `itemsize` bytes."""

    device: Device
    start: int
    stop: int
    itemsize: int = 1

    def view(self, dtype: Any) -> "Memory":
        return Memory(self.device, self.start, self.stop)

    def __getitem__(self, part: slice) -> "Memory":
        return Memory(
            self.device, self.start + part.start * self.itemsize, self.start + part.stop * self.itemsize
        )

    def __setitem__(self, part: slice, value: Any) -> None:
        self[part].copy_(value)

    def copy_(self, source: Any, non_blocking: bool = False) -> None:
        self.device.access(self.start, self.stop, f"the copy to {self.start}", is_write=True)

    def clone(self) -> "Memory":
        self.device.access(self.start, self.stop, f"the move of {self.start}", is_write=False)
        return self
