"""`StreamOps` without a device: at once, never, or watched for races."""

import ctypes
import itertools
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.streams import Device, FakeEvent, FakeStream
from tests.waiting import PATIENCE_S
from toppings.assist.pool import Worker
from toppings.assist.product import Slice


def word_at(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


class EagerOps:
    """What is queued is done: a device that is never behind the host. Memory has to be locked."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.is_over = True

    def lock(self, address: int, num_bytes: int) -> None:
        assert address not in self.locked
        self.locked[address] = num_bytes

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def write(self, address: int, value: int) -> None:
        self._check(address)
        word_at(address).value = value

    def wait(self, address: int, value: int) -> None:
        self._check(address)
        stop_at = time.monotonic() + PATIENCE_S
        while word_at(address).value < value:
            assert time.monotonic() < stop_at, "the stream hangs"

    def mark(self) -> Callable[[], bool]:
        return lambda: self.is_over

    def _check(self, address: int) -> None:
        assert any(start <= address < start + n for start, n in self.locked.items())


class DeferredOps(EagerOps):
    """A device that does not begin until `run` is called. Waits and results are of no account."""

    def __init__(self) -> None:
        super().__init__()
        self.is_over = False
        self._queue: list[tuple[int, int]] = []

    def write(self, address: int, value: int) -> None:
        self._check(address)
        self._queue.append((address, value))

    def wait(self, address: int, value: int) -> None:
        self._check(address)

    def run(self) -> None:
        for address, value in self._queue:
            word_at(address).value = value


class WatchedOps(EagerOps):
    """Does what is queued at once, and tells `Device` what a device that is behind the host could do when:
    each worker is a line of operations of its own, tied to the stream by announcements and waits alone."""

    def __init__(self, workers: list[Worker], *, has_waits: bool = True) -> None:
        super().__init__()
        self.device = Device()
        self._has_waits = has_waits
        self._workers = {worker.channel.published_address: worker for worker in workers}
        self._lines: dict[int, FakeStream] = {a: self.device.Stream() for a in self._workers}
        self._done: dict[tuple[int, int], FakeEvent] = {}

    def write(self, address: int, value: int) -> None:
        worker, line = self._workers[address], self._lines[address]
        announced = FakeEvent(self.device)
        announced.record()
        line.wait_event(announced)
        channel = worker.channel
        start = channel._slot_start(value)
        request = Slice.from_words(channel._words[start : start + 32].tolist())
        columns = request.weights.num_columns(request.form)
        with self.device.stream(line):
            for offset, width, is_write in (
                (request.input_offset, request.weights.num_in, False),
                (request.output_offset, columns, True),
            ):
                first = channel.address + offset
                num_bytes = request.num_rows * width * self.item_bytes
                self.device.access(first, first + num_bytes, f"request {value}", is_write=is_write)
            done = self._done[channel.done_address, value] = FakeEvent(self.device)
            done.record()
        super().write(address, value)

    item_bytes = 4

    def wait(self, address: int, value: int) -> None:
        if self._has_waits:
            self.device.current_stream().wait_event(self._done[address, value])
        super().wait(address, value)


class WatchedTensors(TorchDispatchMode):
    """Tells a `WatchedOps`' device which operators read and write the workers' memory."""

    def __init__(self, ops: WatchedOps) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops = ops
        self._count = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.overloadpacket.__name__} {next(self._count)}"
        if not func.is_view:
            for i, tensor in enumerate(tree_leaves((args, kwargs or {}))):
                if isinstance(tensor, Tensor) and self._is_channel(tensor.data_ptr()):
                    self._ops.device.access(
                        tensor.data_ptr(),
                        tensor.data_ptr() + tensor.numel() * tensor.itemsize,
                        name,
                        is_write=i == 0 and func.overloadpacket.__name__.endswith("_"),
                    )
        return func(*args, **(kwargs or {}))

    def _is_channel(self, address: int) -> bool:
        return any(start <= address < start + n for start, n in self._ops.locked.items())
