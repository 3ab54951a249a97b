"""A worker process: bound to one core, it computes slices out of a channel until its engine is gone.

Started by pool.py as `python -m toppings.assist.worker <settings in JSON>`.
"""

import ctypes
import json
import logging
import mmap
import os
import platform
import signal
import struct
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from toppings.assist.channel import Channel
from toppings.process_state import die_with_parent

if TYPE_CHECKING:
    from torch import Tensor, dtype

SPIN_S = 0.05
"""A worker that is told to watch, but is asked for nothing for so long, sleeps until a byte in its pipe."""

_SPINS_PER_LOOK = 1000
_SHORT_SLICE_NS = 100_000
"""The turn on a shared core that a worker asks for: who wakes with a short turn to take need not wait for the
end of another's."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # system call numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`wake_fd`: the pipe it sleeps on, closed when the engine ends; `arena_fd`: the host store's memory of
    `arena_bytes`; `core`: None leaves it unbound; `is_core_shared`: others need it too, so spinning
    yields."""

    channel_fd: int
    wake_fd: int
    arena_fd: int
    arena_bytes: int
    dtype: str
    core: int | None
    is_core_shared: bool
    nice: int
    parent_pid: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main(settings: WorkerSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine decides
    die_with_parent(settings.parent_pid)
    if settings.core is not None:
        os.sched_setaffinity(0, {settings.core})
    os.nice(settings.nice)
    if settings.is_core_shared:
        ask_for_short_turns(settings.nice)
    import torch

    torch.set_num_threads(1)
    channel = Channel(settings.channel_fd)
    arena = map_arena(settings.arena_fd, settings.arena_bytes, getattr(torch, settings.dtype))
    worker = Worker(channel, arena, settings)
    worker.warm_up()
    channel.mark_ready()
    with torch.inference_mode():
        worker.serve()
    os._exit(0)  # nothing to save, and the interpreter takes its time to tear torch down


class Worker:
    def __init__(self, channel: Channel, arena: "Tensor", settings: WorkerSettings) -> None:
        import torch

        self._channel = channel
        self._arena = arena
        self._wake_fd = settings.wake_fd
        self._is_core_shared = settings.is_core_shared
        self._bytes = torch.frombuffer(channel.buffer, dtype=torch.uint8)

    def serve(self) -> None:
        """Returns when the engine has closed its end of the pipe."""
        while self._sleep():
            while self._channel.has_request or self._spin():
                self._answer()

    def warm_up(self) -> None:
        """First products are slow: libraries are initialised and kernels compiled."""
        import torch

        from toppings.assist.product import Form, GroupWeights, compute

        weights = GroupWeights(8, (1,), (8,), (0,), (8,))
        for num_rows in (1, 64):
            x, out = torch.ones(2, num_rows, 8, dtype=self._arena.dtype).unbind()
            compute(Form.FULL, weights, x, out, torch.ones(16, dtype=self._arena.dtype))

    def _sleep(self) -> bool:
        """Until the engine writes to the pipe (True) or is gone (False)."""
        return bool(os.read(self._wake_fd, 4096))

    def _spin(self) -> bool:
        """Watches for a request while a session is on; False where it ends or nothing comes for `SPIN_S`.

        Not on a shared core: a spinning worker takes its share of the core from those it waits for, and has
        used it up when there is work. One that sleeps is put on the core as soon as it is woken.
        """
        stop_at = time.monotonic() + SPIN_S
        while self._channel.is_active and not self._is_core_shared and time.monotonic() < stop_at:
            for _ in range(_SPINS_PER_LOOK):
                if self._channel.has_request:
                    return True
        return False

    def _answer(self) -> None:
        try:
            compute_next(self._channel, self._bytes, self._arena)
        except Exception:
            log.exception("a slice could not be computed")
            os._exit(1)  # the engine computes it, and all that come before the next worker is there
        self._channel.finish()


def compute_next(channel: Channel, buffer: "Tensor", arena: "Tensor") -> None:
    """Computes the next request of a channel, whose memory `buffer` is (uint8, flat), with the weights of the
    host store's `arena`; to be finished by the caller."""
    from toppings.assist.product import Slice, compute

    request = Slice.from_words(channel.observe())
    weights, dtype = request.weights, arena.dtype
    x = rows_at(buffer, request.input_offset, request.num_rows, weights.num_in, dtype)
    num_columns = weights.num_columns(request.form)
    out = rows_at(buffer, request.output_offset, request.num_rows, num_columns, dtype)
    compute(request.form, weights, x, out, arena)


def rows_at(buffer: "Tensor", offset: int, num_rows: int, num_columns: int, dtype: "dtype") -> "Tensor":
    """A [rows, columns] view of `buffer` (uint8, flat), `offset` in bytes and a multiple of 64."""
    stop = offset + num_rows * num_columns * dtype.itemsize
    return buffer[offset:stop].view(dtype).view(num_rows, num_columns)


def map_arena(fd: int, num_bytes: int, dtype: "dtype") -> "Tensor":
    """The host store's memory, read-only: a flat tensor of `dtype`."""
    import torch

    memory = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors; nothing here writes to it
        return torch.frombuffer(memory, dtype=dtype, count=num_bytes // dtype.itemsize)


def ask_for_short_turns(nice: int) -> None:
    """Linux 6.12 and newer heed it (`man 2 sched_setattr`, `sched_runtime` of SCHED_OTHER); elsewhere nothing
    changes."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        size, policy, flags, priority, deadline, period = 48, 0, 0, 0, 0, 0
        turn = struct.pack("IIQiIQQQ", size, policy, flags, nice, priority, _SHORT_SLICE_NS, deadline, period)
        ctypes.CDLL(None, use_errno=True).syscall(number, 0, turn, 0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s lora worker: %(message)s")
    main(WorkerSettings(**json.loads(sys.argv[1])))
