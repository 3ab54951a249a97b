"""Rows to the workers and results back in the order of a CUDA stream, the host never waiting.

    stream   x ── rows out ── PUBLISHED = n ── base product ── wait DONE >= n ── result in ── y += …
    worker                        sees n, computes, DONE = n

The host writes a request into the ring when it queues this, long before the device announces it. A channel's
areas are used again from group to group: the next rows go out after this group's waits, so the worker has
read the last ones, and it is asked for the next result after the last one has been taken in.

What a stream waits for must come. An attendant, a thread that lives until the forward is over, wakes
workers that sleep and ends those that died or hang; then it answers in their place, out of the same memory,
until the device is through.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from toppings.assist.channel import Channel
from toppings.assist.exchange import AssistStats, Piece
from toppings.assist.pool import NUDGE_AFTER_S, Worker, WorkerPool
from toppings.assist.worker import compute_next

NUM_STREAM_SLOTS = 4096
"""Requests of a whole forward stand in the ring of a channel."""
GROUP_SLOTS = 256
"""What one projection group takes of them at most, or else the device waits for its weights."""
MAX_STREAM_ROWS = 512
"""Rows of a projection group that one worker may get: its areas, which are page-locked, hold as many. Longer
prompts hide their loads behind their own products."""
LOOK_S = 0.0005
CLOSE_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class StreamOps(Protocol):
    """What the current stream can do with words of the host's memory; addresses are the host's."""

    def lock(self, address: int, num_bytes: int) -> None:
        """Page-locks memory and maps it for the device. Raises RuntimeError."""

    def unlock(self, address: int) -> None: ...

    def write(self, address: int, value: int) -> None:
        """Queues: the 8-byte word becomes `value`, visible after all that was queued before."""

    def wait(self, address: int, value: int) -> None:
        """Queues: what follows waits until the 8-byte word is at least `value`."""

    def mark(self) -> Callable[[], bool]:
        """Tells, without blocking and on any thread, whether what was queued so far is over."""


class StreamExchange:
    """`host_arena`: the host store's memory, flat, of the model's dtype."""

    is_ordered = True

    def __init__(
        self, workers: WorkerPool, host_arena: Tensor, ops: StreamOps, *, deadline_s: float = 1.0
    ) -> None:
        self._pool = workers
        self._host_arena = host_arena
        self._ops = ops
        self._deadline_s = deadline_s
        self._locked: dict[int, Channel] = {}  # by address; a channel in here stays mapped
        self._attendant: Attendant | None = None
        self._num_recomputed = 0

    @property
    def num_recomputed(self) -> int:
        return self._num_recomputed + (self._attendant.stats.num_recomputed if self._attendant else 0)

    @contextmanager
    def session(self, stats: AssistStats) -> Iterator[list[Worker]]:
        """No worker where the last forward is not over, as after one that failed."""
        if self._attendant is not None and self._attendant.is_alive():
            yield []
            return
        self._num_recomputed, self._attendant = self.num_recomputed, None
        workers = [worker for worker in self._pool.workers_ready if worker.channel.is_drained]
        self.lock()
        for worker in workers:
            worker.recycle()
            worker.channel.set_active(True)
            worker.nudge()
        attendant = self._attendant = Attendant(workers, self._host_arena, stats, self._deadline_s)
        attendant.start()
        try:
            yield workers
        finally:
            attendant.end_after(self._ops.mark())

    def begin_group(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.channel.reuse_areas()
            worker.num_rows_sent = 0

    def has_room(self, workers: list[Worker], num_rows: int) -> bool:
        return bool(workers) and all(
            worker.channel.num_free_slots >= GROUP_SLOTS
            and worker.num_rows_sent + num_rows <= MAX_STREAM_ROWS
            for worker in workers
        )

    def post(self, worker: Worker, piece: Piece, x: Tensor) -> None:
        piece.ticket = worker.prepare(piece.form, piece.weights, x[piece.start : piece.stop])
        assert piece.ticket is not None, "a step's rows fit the areas"
        self._ops.write(worker.channel.published_address, piece.ticket.number)

    def take(self, piece: Piece, x: Tensor) -> Tensor:
        assert piece.ticket is not None
        self._ops.wait(piece.ticket.worker.channel.done_address, piece.ticket.number)
        return piece.ticket.result.to(x.device, non_blocking=True)

    def lock(self) -> None:
        """Page-locks all workers' channels, which takes long the first time. Nothing is under way: those of
        workers that are gone can be let go. Raises RuntimeError."""
        self._lock(self._pool.workers)

    def _lock(self, workers: list[Worker]) -> None:
        channels = {worker.channel.address: worker.channel for worker in workers}
        for address in self._locked.keys() - channels.keys():
            self._ops.unlock(address)
            del self._locked[address]
        for address in channels.keys() - self._locked.keys():
            self._ops.lock(address, len(channels[address].buffer))
            self._locked[address] = channels[address]

    def close(self) -> None:
        """Waits for the forward under way, if any; what a device that hangs still uses stays locked."""
        if self._attendant is not None:
            self._attendant.join(CLOSE_TIMEOUT_S)
            if self._attendant.is_alive():
                log.error("the device is not through with a forward after %s s", CLOSE_TIMEOUT_S)
                return
        self._lock([])


class Attendant(threading.Thread):
    """Sees to it that every request which the device announces is answered."""

    def __init__(
        self, workers: list[Worker], host_arena: Tensor, stats: AssistStats, deadline_s: float
    ) -> None:
        super().__init__(name="LoRA attendant", daemon=True)
        self.stats = stats
        self._workers = list(workers)
        self._host_arena = host_arena
        self._deadline_s = deadline_s
        self._is_over: Callable[[], bool] = lambda: False
        self._replaced: set[int] = set()  # pids
        self._asked: dict[int, tuple[int, float]] = {}  # by pid: since when it has been asked for what

    def end_after(self, is_over: Callable[[], bool]) -> None:
        """The forward is queued; `is_over` tells when the device is through with it."""
        self._is_over = is_over

    @torch.inference_mode()
    def run(self) -> None:
        """Until the device is through, or cannot be asked any more: whatever else fails, it is answered."""
        while not self._ask(self._is_over):
            for worker in self._workers:
                if worker.channel.has_request:
                    self._try_attend(worker)
            time.sleep(LOOK_S)
        for worker in self._workers:
            worker.channel.set_active(False)

    def _ask(self, is_over: Callable[[], bool]) -> bool:
        try:
            return is_over()
        except Exception as error:
            self._note(error)
            return True

    def _try_attend(self, worker: Worker) -> None:
        try:
            self._attend(worker)
        except Exception as error:
            self._note(error)
            self._replaced.add(worker.pid)  # it is answered here from now on

    def _note(self, error: Exception) -> None:
        """The step is to fail."""
        log.error("the LoRA attendant: %r", error, exc_info=error)
        self.stats.error = error

    def _attend(self, worker: Worker) -> None:
        if worker.pid not in self._replaced:
            now, number = time.monotonic(), worker.channel.done
            asked_for, since = self._asked.get(worker.pid, (-1, now))
            if asked_for != number:
                self._asked[worker.pid] = number, now
                return
            waited_s = now - since
            if waited_s > NUDGE_AFTER_S:
                worker.nudge()
            if waited_s <= self._deadline_s and (waited_s <= NUDGE_AFTER_S or worker.is_alive):
                return
            log.warning("the LoRA worker %d on core %d failed; it will be replaced", worker.pid, worker.core)
            worker.close(by_force=True)  # it writes no more
            self._replaced.add(worker.pid)
        while worker.channel.has_request:
            self._answer(worker)

    def _answer(self, worker: Worker) -> None:
        self.stats.num_recomputed += 1
        try:
            compute_next(worker.channel, worker.bytes, self._host_arena)
        except Exception as error:  # the stream must go on
            self._note(error)
        worker.channel.finish()
