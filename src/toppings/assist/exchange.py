"""How rows of a cold prefill reach the workers, and how their results come back into the forward."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from toppings.assist.pool import Ticket, Worker, WorkerPool
from toppings.assist.product import Form, GroupWeights, compute


@dataclass(slots=True)
class CpuWork:
    """What of one adapter's layer the CPU computed in a step: products, in slices, between two instants of
    `time.perf_counter`."""

    started_at: float
    ended_at: float = 0.0
    num_products: int = 0
    num_slices: int = 0


@dataclass(slots=True)
class AssistStats:
    """What a step did. `wait_s`: for loads; `worker_wait_s`: for workers' results, as far as this process
    waited. Products are (segment, layer, group); `num_recomputed`: slices that a worker should have computed
    and this process did. `cpu_work`: by adapter id and layer. `error`: why results are wrong, where they
    are."""

    wait_s: float = 0.0
    worker_wait_s: float = 0.0
    num_cpu_products: int = 0
    num_cold_products: int = 0
    num_recomputed: int = 0
    cpu_work: dict[tuple[int, int], CpuWork] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(slots=True)
class Piece:
    """Rows `[start, stop)` of the step, on their way to a product with weights of the adapter in `slot`."""

    start: int
    stop: int
    form: Form
    weights: GroupWeights
    slot: int
    ticket: Ticket | None = None  # None: no worker took it


class Exchange(Protocol):
    """`is_ordered`: the host queues a forward ahead of its device, which waits by itself for loads and
    results, and whatever is used again is so in that order; else the device is the host. `num_recomputed`:
    slices computed in place of workers that failed."""

    is_ordered: bool

    @property
    def num_recomputed(self) -> int: ...

    def session(self, stats: AssistStats) -> AbstractContextManager[list[Worker]]:
        """The workers that can be asked during one forward; some may leave the list meanwhile."""

    def begin_group(self, workers: list[Worker]) -> None:
        """All results so far have been taken."""

    def has_room(self, workers: list[Worker], num_rows: int) -> bool:
        """Pieces of a projection group, `num_rows` in all, would find room now, whoever gets them."""

    def post(self, worker: Worker, piece: Piece, x: Tensor) -> None:
        """Sends the piece's rows of x [T, in]."""

    def take(self, piece: Piece, x: Tensor) -> Tensor:
        """The piece's result [rows, columns], on x's device."""

    def close(self) -> None: ...


class HostExchange:
    """For a device that is the host."""

    is_ordered = False

    def __init__(self, workers: WorkerPool, host_arena: Tensor) -> None:
        """`host_arena`: the host store's memory, flat, of the model's dtype."""
        self._pool = workers
        self._host_arena = host_arena
        self._awake: list[Worker] = []
        self._stats = AssistStats()
        self.num_recomputed = 0

    @contextmanager
    def session(self, stats: AssistStats) -> Iterator[list[Worker]]:
        self._stats = stats
        with self._pool.session() as self._awake:
            yield self._awake

    def begin_group(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.recycle()

    def has_room(self, workers: list[Worker], num_rows: int) -> bool:
        return bool(workers)  # what finds none is computed in this process

    def post(self, worker: Worker, piece: Piece, x: Tensor) -> None:
        piece.ticket = worker.try_post(piece.form, piece.weights, x[piece.start : piece.stop])

    def take(self, piece: Piece, x: Tensor) -> Tensor:
        started_at = time.monotonic()
        ticket = piece.ticket
        is_done = ticket is not None and ticket.worker.wait(ticket.number)
        self._stats.worker_wait_s += time.monotonic() - started_at
        if ticket is not None and is_done:
            return ticket.result
        if ticket is not None:
            self._retire(ticket.worker)
        self._stats.num_recomputed += 1
        self.num_recomputed += 1
        rows = x[piece.start : piece.stop].contiguous()
        out = torch.empty(rows.shape[0], piece.weights.num_columns(piece.form), dtype=rows.dtype)
        compute(piece.form, piece.weights, rows, out, self._host_arena)
        return out

    def close(self) -> None:
        """Nothing is under way between forwards."""

    def _retire(self, worker: Worker) -> None:
        if worker in self._awake:
            self._awake.remove(worker)
            self._pool.retire(worker)
