"""One stand-in: continuous batching whose steps take what a performance model says. It has no clock.

A prefill interrupts decoding; adapters are loaded before the prefill that needs them and kept while there is
room (the least recently used that no request needs leaves). A request whose adapter finds no room is
overtaken.
"""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np

from toppings.cluster.batch_sums import BatchSums
from toppings.cluster.perf_model import PerfModel
from toppings.cluster.report import ServerReport
from toppings.cluster.snapshot import RequestSnapshot

MAX_NUM_SEQS = 64
DEVICE_ADAPTERS = 64  # room for as many, unless a server is told otherwise
KV_TOKENS = 40_000  # what 40 GB leave beside Llama-2-7B and its adapters


@dataclass(slots=True, eq=False)
class Job:
    """A request for `num_tokens` tokens; instants in ms. `last_step` is the decode step that ends it."""

    snapshot: RequestSnapshot
    num_tokens: int
    arrived_at: float
    first_token_at: float = 0.0
    ended_at: float = 0.0
    last_step: int = 0


@dataclass(slots=True)
class Server:
    """Between `start_step` and `end_step` a step is under way; `batch` is what it prefills.

    `rank_counts` counts the requests of each rank that ended here.
    """

    name: str
    model: PerfModel
    device_adapters: int = DEVICE_ADAPTERS
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[str, Job] = field(default_factory=dict)
    batch: list[Job] = field(default_factory=list)
    held: OrderedDict[str, None] = field(default_factory=OrderedDict)
    rank_counts: Counter[int] = field(default_factory=Counter)
    _is_prefill: bool = False
    _num_decodes: int = 0
    _sums: BatchSums = field(default_factory=BatchSums)
    _ends: list[tuple[int, str, Job]] = field(default_factory=list)

    @property
    def kv_tokens_used(self) -> int:
        return int(self._sums.context_tokens)

    def report(self, on_host: Set[str]) -> ServerReport:
        """What it tells a router; `on_host` are the adapters in its host memory."""
        running, waiting = self.running.values(), {*self.batch, *self.waiting} - {*self.running.values()}
        return ServerReport(
            num_running=len(running),
            num_waiting=len(waiting),
            running_ranks=[job.snapshot.rank for job in running],
            waiting_ranks=[job.snapshot.rank for job in waiting],
            kv_tokens_total=KV_TOKENS,
            kv_tokens_used=self.kv_tokens_used,
            max_num_seqs=MAX_NUM_SEQS,
            max_adapters=self.device_adapters,
            on_device=set(self.held),
            on_host=on_host,
        )

    def start_step(self) -> float | None:
        """The ms that the next step takes; None where there is nothing to do."""
        self.batch = self._take_waiting()
        self._is_prefill = bool(self.batch)
        if self._is_prefill:
            sums = BatchSums()
            for job in self.batch:
                tokens = job.snapshot.prompt_tokens
                sums.add(job.snapshot.rank, job.snapshot.adapter, tokens, tokens * (tokens + 1) / 2)
            loads = sum(self._load_ms(job.snapshot) for job in self.batch)
            return float(self.model.prefill.predict(np.array(sums.features()))) + loads
        if self.running:
            return float(self.model.decode.predict(np.array(self._sums.features())))
        return None

    def end_step(self) -> tuple[list[Job], list[Job]]:
        """The jobs that got a token, and those of them whose last it was."""
        if self._is_prefill:
            served = self.batch
            for job in served:
                self._admit(job)
        else:
            served = list(self.running.values())
            self._num_decodes += 1
            self._sums.context_tokens += len(served)
        ended = []
        while self._ends and self._ends[0][0] <= self._num_decodes:
            _, request_id, job = heapq.heappop(self._ends)
            if self.running.get(request_id) is job:  # else it was aborted
                self._leave(job)
                self.rank_counts[job.snapshot.rank] += 1
                ended.append(job)
        return served, ended

    def abort(self, job: Job) -> None:
        """Its client went away, or has it done elsewhere; no harm where it has ended."""
        if self.running.get(job.snapshot.request_id) is job:
            self._leave(job)
        for jobs in (self.waiting, self.batch):
            if job in jobs:
                jobs.remove(job)

    def _admit(self, job: Job) -> None:
        request = job.snapshot
        self.running[request.request_id] = job
        self._sums.add(request.rank, request.adapter, 1, request.prompt_tokens + 1)
        job.last_step = self._num_decodes + job.num_tokens - 1
        heapq.heappush(self._ends, (job.last_step, request.request_id, job))

    def _leave(self, job: Job) -> None:
        request = job.snapshot
        del self.running[request.request_id]
        num_done = self._num_decodes - job.last_step + job.num_tokens
        self._sums.remove(request.rank, request.adapter, 1, request.prompt_tokens + num_done)

    def _take_waiting(self) -> list[Job]:
        """The oldest requests for which there are sequences and room for their adapters."""
        batch: list[Job] = []
        if not self.waiting or len(self.running) == MAX_NUM_SEQS:
            return batch
        needed = {job.snapshot.adapter for job in self.running.values()}
        for job in self.waiting:
            if len(self.running) + len(batch) == MAX_NUM_SEQS:
                break
            if job.snapshot.adapter in needed or len(needed) < self.device_adapters:
                needed.add(job.snapshot.adapter)
                batch.append(job)
        for job in batch:
            self.waiting.remove(job)
        return batch

    def _load_ms(self, request: RequestSnapshot) -> float:
        assert request.adapter is not None
        is_held = request.adapter in self.held
        self.held[request.adapter] = None
        self.held.move_to_end(request.adapter)
        if len(self.held) > self.device_adapters:
            needed = {job.snapshot.adapter for job in (*self.running.values(), *self.batch)}
            del self.held[next(adapter for adapter in self.held if adapter not in needed)]
        return 0.0 if is_held else self.model.load_ms(request.adapter_bytes, is_on_host=True)
