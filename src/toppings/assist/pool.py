"""The worker processes: started, watched, restarted, ended."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from toppings.assist.channel import Channel
from toppings.assist.cores import WorkerCores
from toppings.assist.product import Form, GroupWeights, Slice
from toppings.assist.worker import WorkerSettings, rows_at
from toppings.process_state import is_stopped

NUM_SLOTS = 64
NUDGE_AFTER_S = 0.0005
"""A worker that has not answered for so long may be asleep: it gets a byte in its pipe."""
SHARED_NICE = 1
"""Workers on shared cores stand back a little, so that running requests keep their pace."""
FIRST_RESTART_DELAY_S = 0.25
MAX_RESTART_DELAY_S = 30.0
EXIT_TIMEOUT_S = 2.0
START_TIMEOUT_S = 60.0
"""A worker that is not ready by then hangs, and is replaced."""

_SPINS_PER_LOOK = 200

log = logging.getLogger(__name__)


class NoWorkersError(RuntimeError):
    """No worker process can be had."""


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """`arena_fd`, `arena_bytes`: the host store's memory, elements of `dtype`. `max_input_bytes` and
    `max_output_bytes` bound what one worker can hold at a time. `deadline_s`: a slice not done by then is
    computed by the engine and its worker replaced; `start_timeout_s`: a worker not ready by then is replaced,
    too. `num_slots`: requests that a channel's ring holds.
    `is_ordered`: a device announces requests, and no byte in the pipe comes with them, so that workers watch
    for them even on cores that others need."""

    cores: WorkerCores
    arena_fd: int
    arena_bytes: int
    dtype: torch.dtype
    max_input_bytes: int
    max_output_bytes: int
    deadline_s: float = 1.0
    start_timeout_s: float = START_TIMEOUT_S
    num_slots: int = NUM_SLOTS
    is_ordered: bool = False


@dataclass(frozen=True, slots=True)
class Ticket:
    """A slice that was handed to a worker: where its result [rows, columns] will stand until `recycle`."""

    worker: "Worker"
    number: int
    result: Tensor


class Worker:
    """One process with its channel and its pipe. A process that dies is replaced by a new Worker."""

    def __init__(self, settings: PoolSettings, core: int) -> None:
        self.core = core
        self._dtype = settings.dtype
        self._deadline_s = settings.deadline_s
        self._is_core_shared = _sleeps_between_requests(settings)
        self.channel = Channel.create(
            num_slots=settings.num_slots,
            input_bytes=settings.max_input_bytes,
            output_bytes=settings.max_output_bytes,
        )
        self.bytes = torch.frombuffer(self.channel.buffer, dtype=torch.uint8)
        wake_fd, self._nudge_fd = os.pipe()
        os.set_blocking(self._nudge_fd, False)
        self._process = _spawn(_worker_settings(settings, core, self.channel, wake_fd))
        self._start_by = time.monotonic() + settings.start_timeout_s
        os.close(wake_fd)
        self._is_closed = False
        self._lock = threading.Lock()  # whose file the pipe's number is: a closed one may be somebody else's
        self.num_rows_sent = 0  # since the last `recycle`

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def is_ready(self) -> bool:
        return not self._is_closed and self.channel.is_ready

    @property
    def is_lost(self) -> bool:
        """It is gone, or hangs in its start; one that hangs later lets a deadline pass (`wait`)."""
        if not self.is_alive:
            return True
        return not self.channel.is_ready and (time.monotonic() > self._start_by or is_stopped(self.pid))

    def how_it_ended(self) -> str:
        """Of one that is lost."""
        code = self._process.poll()
        if code is None:
            return "hung in its start"
        return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def recycle(self) -> None:
        """No result so far is needed any more."""
        self.channel.recycle()
        self.num_rows_sent = 0

    def nudge(self) -> None:
        """Wakes the worker if it sleeps. A full pipe already holds wake-ups; a broken one has no reader."""
        with self._lock, suppress(BlockingIOError, BrokenPipeError):
            if not self._is_closed:
                os.write(self._nudge_fd, b"!")

    def try_post(self, form: Form, weights: GroupWeights, x: Tensor) -> Ticket | None:
        """Copies x [rows, in] and asks for its product. None where the channel is full."""
        ticket = self.prepare(form, weights, x)
        if ticket is not None:
            self.channel.announce(ticket.number)
            if self._is_core_shared:
                self.nudge()  # it does not spin
        return ticket

    def prepare(self, form: Form, weights: GroupWeights, x: Tensor) -> Ticket | None:
        """`try_post`, but for the announcement: that is to come after the copy of x, which is made in the
        order of the device's stream where x is on a device."""
        num_rows, num_columns = x.shape[0], weights.num_columns(form)
        item_bytes = self._dtype.itemsize
        room = self.channel.try_reserve(
            num_rows * weights.num_in * item_bytes, num_rows * num_columns * item_bytes
        )
        if room is None:
            return None
        rows_at(self.bytes, room[0], num_rows, weights.num_in, self._dtype).copy_(x, non_blocking=True)
        self.num_rows_sent += num_rows
        number = self.channel.post(Slice(form, num_rows, *room, weights).to_words())
        return Ticket(self, number, rows_at(self.bytes, room[1], num_rows, num_columns, self._dtype))

    def wait(self, number: int) -> bool:
        """True when the result is there; False where the worker failed, died or let the deadline pass."""
        channel, started_at, is_nudged = self.channel, time.monotonic(), False
        while not self._spin(number):
            waited_s = time.monotonic() - started_at
            if waited_s > self._deadline_s or (waited_s > NUDGE_AFTER_S and not self.is_alive):
                return channel.done >= number
            if not is_nudged and waited_s > NUDGE_AFTER_S:
                self.nudge()
                is_nudged = True
        return True

    def _spin(self, number: int) -> bool:
        channel, is_core_shared = self.channel, self._is_core_shared
        for _ in range(_SPINS_PER_LOOK):
            if channel.done >= number:
                return True
            if is_core_shared:
                os.sched_yield()
        return False

    def close(self, *, by_force: bool = False) -> None:
        """Ends the process and takes its resources back; by closing its pipe, unless `by_force`."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            os.close(self._nudge_fd)
        if by_force:
            self._process.send_signal(signal.SIGKILL)
        self.channel.set_active(False)
        try:
            self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.channel.close()


class WorkerPool:
    """One worker per core. To be made and used in a thread that lives as long as the engine: the kernel kills
    workers when the thread that started them ends. Workers start in the background; `workers_ready` grows.

    Fewer where there are no more processes or memory to be had. Raises NoWorkersError where there is none."""

    def __init__(self, settings: PoolSettings) -> None:
        log.info("%s", settings.cores)
        self.settings = settings
        self.num_restarts = 0
        self._workers = _start_workers(settings)
        self._restart_delay_s = FIRST_RESTART_DELAY_S
        self._restart_after = time.monotonic()
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def workers(self) -> list[Worker]:
        """All, ready or not."""
        return list(self._workers)

    @property
    def workers_ready(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.is_ready]

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until all workers have started; those that have not by then are given up. Raises NoWorkersError
        where none has."""
        stop_at = time.monotonic() + timeout_s
        while len(self.workers_ready) < len(self._workers):
            self.restart_dead()
            if time.monotonic() > stop_at:
                self._give_up_late_ones(timeout_s)
                return
            time.sleep(0.005)

    def _give_up_late_ones(self, timeout_s: float) -> None:
        ready = self.workers_ready
        if not ready:
            raise NoWorkersError(f"no LoRA worker is ready after {timeout_s:g} s")
        log.warning(
            "%d of %d LoRA workers are ready after %g s; the others are given up",
            *(len(ready), len(self._workers), timeout_s),
        )
        for worker in self._workers:
            if worker not in ready:
                worker.close(by_force=True)
        self._workers = ready

    @contextmanager
    def session(self) -> Iterator[list[Worker]]:
        """The ready workers, awake: those with a core of their own watch for requests until the end."""
        self.restart_dead()
        workers = self.workers_ready
        for worker in workers:
            worker.recycle()
            worker.channel.set_active(True)
            worker.nudge()
        try:
            yield workers
        finally:
            for worker in workers:
                worker.channel.set_active(False)

    def retire(self, worker: Worker) -> None:
        """A worker that failed: it ends at once, so that it writes no more; `restart_dead` replaces it."""
        log.warning("the LoRA worker %d on core %d failed; it will be replaced", worker.pid, worker.core)
        worker.close(by_force=True)

    def restart_dead(self) -> None:
        """Replaces workers that are gone or hang in their start; ever later while new ones keep dying."""
        dead = [i for i, worker in enumerate(self._workers) if worker.is_lost]
        if all(worker.is_ready for worker in self._workers) and not dead:
            self._restart_delay_s = FIRST_RESTART_DELAY_S
        if not dead or self._is_closed or time.monotonic() < self._restart_after:
            return
        self._restart_after = time.monotonic() + self._restart_delay_s
        self._restart_delay_s = min(2 * self._restart_delay_s, MAX_RESTART_DELAY_S)
        for i in dead:
            self._replace(i)

    def _replace(self, index: int) -> None:
        old = self._workers[index]
        if not old.is_closed:  # else it was told when it failed
            log.warning(
                "the LoRA worker %d on core %d %s; it is replaced", old.pid, old.core, old.how_it_ended()
            )
        old.close(by_force=True)
        try:
            self._workers[index] = Worker(self.settings, old.core)
            self.num_restarts += 1
        except OSError as error:  # no process or memory to be had just now
            log.warning("no LoRA worker can be started on core %d: %s", old.core, error)

    def close(self) -> None:
        self._is_closed = True
        for worker in self._workers:
            worker.close()


def _start_workers(settings: PoolSettings) -> list[Worker]:
    workers: list[Worker] = []
    for core in settings.cores.cores:
        try:
            workers.append(Worker(settings, core))
        except OSError as error:
            log.warning("no LoRA worker can be started on core %d: %s", core, error)
    if not workers:
        raise NoWorkersError("no LoRA worker can be started")
    return workers


def _sleeps_between_requests(settings: PoolSettings) -> bool:
    return settings.cores.is_shared and not settings.is_ordered


def _worker_settings(settings: PoolSettings, core: int, channel: Channel, wake_fd: int) -> WorkerSettings:
    return WorkerSettings(
        channel_fd=channel.fd,
        wake_fd=wake_fd,
        arena_fd=settings.arena_fd,
        arena_bytes=settings.arena_bytes,
        dtype=str(settings.dtype).removeprefix("torch."),
        core=core,
        is_core_shared=_sleeps_between_requests(settings),
        nice=SHARED_NICE if settings.cores.is_shared else 0,
        parent_pid=os.getpid(),
    )


def _spawn(settings: WorkerSettings) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",  # also where a library asks for its own threads
    }
    return subprocess.Popen(
        [sys.executable, "-m", "toppings.assist.worker", settings.to_json()],
        pass_fds=(settings.channel_fd, settings.wake_fd, settings.arena_fd),
        env=environment,
        stdin=subprocess.DEVNULL,
    )
