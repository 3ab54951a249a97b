"""Continuous batching: which requests run in the next step, and with how many tokens.

Knows no tensors and no clock (`now` is an argument), so the simulator runs this very code on virtual time.

A request's pages and its adapter pin, and who owns them:

    add ---- waiting ----> admitted ---- running ----> finish / abort
             (a read of its adapter      owns pages,
             may be under way)           pins its adapter
                     <---- preempted ----
                     gives both back, computes again from its first token

What it computed may stay in pages that it gives back (`prefix_cache.py`): whoever begins with the same
tokens, itself as well, computes the rest.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from toppings.bad_input import RequestError
from toppings.core import Admission, Batch, BatchItem, Request
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.prefix_cache import BlockNames, PrefixCache


class AdapterPlacement(Protocol):
    """What the scheduler asks of whoever places adapters: the engine's manager, or a simulated one."""

    def prefetch(self, adapter_id: int) -> None:
        """A request for it was queued: begin to read it from disk, without blocking."""

    def holds(self, adapter_id: int) -> bool:
        """True where it has its room on the device already, whether its load is done or not."""

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        """Pin it for a request of `num_tokens` to compute, and begin its load.

        Raises ValueError where it can never be served.
        """

    def release(self, adapter_id: int) -> None:
        """One request less that needs it."""

    def victims_for(self, adapter_id: int) -> list[int]:
        """Adapters in use, least valuable first, whose leaving would make room for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`max_adapter_wait_s`: after waiting so long for its adapter's room, a request has others drained."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_adapter_wait_s: float


@dataclass(slots=True)
class Drain:
    """Room is being made for one starved request: `adapter_ids` admit nobody until it has started."""

    request: Request
    adapter_ids: frozenset[int]
    started_at: float


class Scheduler:
    """First come first served over `waiting`, but for a lead that the prefix cache gives; whoever waits for
    an adapter is overtaken, never starved. `names`: of what the cache keeps, if it is to keep anything."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pages: PageAllocator,
        adapters: AdapterPlacement,
        names: BlockNames | None = None,
    ) -> None:
        assert pages.num_pages * pages.page_size >= limits.max_model_len, "one sequence may not fit the cache"
        self.limits = limits
        self.pages = pages
        self.adapters = adapters
        self.cache = PrefixCache(pages, names)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_drains = 0
        self._blocked_at: dict[str, float] = {}  # request id -> since when its adapter found no room
        self._drain: Drain | None = None
        self._failed: list[tuple[Request, str]] = []

    # --- the life of a request ---

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError where it can never fit."""
        num_prompt, limit = len(request.prompt_token_ids), self.limits.max_model_len
        if not num_prompt:
            raise RequestError("the prompt is empty; it needs at least one token")
        most = limit - min(1, request.sampling.max_tokens)
        if num_prompt > most:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; at most {most} fit max_model_len {limit}"
            )
        if request.adapter_id is not None:
            self.adapters.prefetch(request.adapter_id)
        self.cache.add(request)
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request, waiting or running, and take back all that it owns."""
        if request in self.running:
            self.running.remove(request)
            self._take_back(request)
        else:
            self.waiting.remove(request)
        self._unblock(request)

    def pop_failed(self) -> list[tuple[Request, str]]:
        """Requests whose adapter cannot be served, with the reason; each is handed out once."""
        failed, self._failed = self._failed, []
        return failed

    def commit(self, batch: Batch) -> None:
        """The batch has been started: to its requests' next steps, its tokens are in the cache.

        To others they are once `cache.keep` was told that they are right.
        """
        for item in batch.items:
            item.request.num_computed_tokens += item.num_tokens
            item.stop = item.request.num_computed_tokens

    # --- one step ---

    def schedule(self, now: float, *, admits: bool = True) -> Batch:
        """The next step's batch; empty where nothing can run now. Without `admits`, of running requests."""
        if admits:
            self._advance_drain(now)
        items, budget, was_preempted = self._schedule_running()
        if admits and not was_preempted:
            self._schedule_waiting(now, budget, items)
        items.sort(key=_batch_order)
        return Batch(items)

    def _schedule_running(self) -> tuple[list[BatchItem], int, bool]:
        items: list[BatchItem] = []
        budget = self.limits.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_tokens = min(request.num_uncomputed_tokens, budget)
            if not num_tokens:  # its last token is on its way
                index += 1
                continue
            if not self._grow_or_preempt(request, num_tokens):
                break  # it was itself the last to arrive, and is waiting again
            items.append(BatchItem(request, num_tokens))
            budget -= num_tokens
            index += 1
        return items, budget, self.num_preemptions > num_preemptions

    def _grow_or_preempt(self, request: Request, num_tokens: int) -> bool:
        """Room for `num_tokens` more, at the cost of those that came last; False where it fell to itself."""
        while not self.pages.grow(request.page_table, request.num_computed_tokens + num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, now: float, budget: int, items: list[BatchItem]) -> None:
        """Adds to the `items` of those that run."""
        refused: set[int] = set()  # adapters that were asked for in this step and cannot start
        for request in self.cache.in_turn(self.waiting) if self._may_start_any(budget) else ():
            num_found = self.cache.num_found(request)
            if not self._may_start_any(budget) or not self._has_pages(request, num_found):
                break
            if request.adapter_id in refused or not self._may_start(request):
                continue
            if self.cache.is_awaited(request, num_found, items, now):
                continue
            admission = self._acquire(request, now, num_found)
            if admission is not Admission.READY:
                refused.add(request.adapter_id if request.adapter_id is not None else -1)
                continue
            items.append(self._start(request, num_found, budget))
            budget -= items[-1].num_tokens

    def _may_start_any(self, budget: int) -> bool:
        return budget > 0 and len(self.running) < self.limits.max_num_seqs

    def _start(self, request: Request, num_found: int, budget: int) -> BatchItem:
        self.waiting.remove(request)
        self._unblock(request)
        copy_page = self.cache.take(request, num_found)
        # Kept in order of arrival, so that the last one is always the one to preempt.
        is_latest = not self.running or self.running[-1].arrived_at <= request.arrived_at
        self.running.append(request)
        if not is_latest:
            self.running.sort(key=lambda r: r.arrived_at)
        num_tokens = min(request.num_uncomputed_tokens, budget)
        has_grown = self.pages.grow(request.page_table, request.num_computed_tokens + num_tokens)
        assert has_grown, "pages were counted before the adapter was acquired"
        return BatchItem(request, num_tokens, copy_page=copy_page)

    @property
    def may_admit(self) -> bool:
        """The next step may start a waiting request, for all that is known without asking for its adapter."""
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return False
        first = self.waiting[0]
        return self._has_pages(first, self.cache.num_found(first))

    def _has_pages(self, request: Request, num_found: int) -> bool:
        """Room for all it has to compute, and a page for each that runs, lest one be preempted at once."""
        if not self.running:
            return True
        num_owned = self.cache.num_owned(request, num_found)
        num_needed = pages_for(request.num_tokens + 1, self.pages.page_size) - num_owned
        return num_needed + len(self.running) <= self.pages.num_free

    def _acquire(self, request: Request, now: float, num_found: int) -> Admission:
        if request.adapter_id is None:
            return Admission.READY
        num_cached = num_found * self.pages.page_size
        num_tokens = request.num_uncomputed_tokens - max(num_cached, request.adapter_start)
        try:
            admission = self.adapters.try_acquire(request.adapter_id, now, num_tokens=num_tokens)
        except ValueError as error:
            self.finish(request)
            self._failed.append((request, str(error)))
            return Admission.LOADING
        if admission is Admission.NO_ROOM:
            self._blocked_at.setdefault(request.request_id, now)
        return admission

    # --- preemption and draining ---

    def preempt(self, request: Request) -> None:
        """Back to the queue, to the place its arrival gives it; its tokens are computed again later."""
        self.running.remove(request)
        self._take_back(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        index = next(
            (i for i, w in enumerate(self.waiting) if w.arrived_at > request.arrived_at), len(self.waiting)
        )
        self.waiting.insert(index, request)

    def _may_start(self, request: Request) -> bool:
        """False where starting it would take the room that is being made for a starved request."""
        if self._drain is None or request is self._drain.request or request.adapter_id is None:
            return True
        return request.adapter_id not in self._drain.adapter_ids and self.adapters.holds(request.adapter_id)

    def _advance_drain(self, now: float) -> None:
        """Begin to drain for the request starved longest; preempt those that keep their room too long."""
        if self._drain is None:
            self._begin_drain(now)
        elif now - self._drain.started_at > self.limits.max_adapter_wait_s:
            adapter_ids = self._drain.adapter_ids
            for request in [r for r in self.running if r.adapter_id in adapter_ids]:
                self.preempt(request)

    def _begin_drain(self, now: float) -> None:
        if not self._blocked_at:
            return
        starved = next((r for r in self.waiting if self._is_starved(r, now)), None)
        if starved is None or starved.adapter_id is None:
            return
        victims = frozenset(self.adapters.victims_for(starved.adapter_id))
        self._drain = Drain(starved, victims, now)
        self.num_drains += 1

    def _is_starved(self, request: Request, now: float) -> bool:
        blocked_at = self._blocked_at.get(request.request_id)
        return blocked_at is not None and now - blocked_at > self.limits.max_adapter_wait_s

    def _unblock(self, request: Request) -> None:
        self._blocked_at.pop(request.request_id, None)
        self.cache.forget(request)
        if self._drain is not None and self._drain.request is request:
            self._drain = None

    def _take_back(self, request: Request) -> None:
        self.cache.leave(request)
        self.pages.free(request.page_table)
        if request.adapter_id is not None:
            self.adapters.release(request.adapter_id)

    # --- proof ---

    def requests(self) -> Iterable[Request]:
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Running requests alone own pages, and nobody is both waiting and running."""
        self.pages.check_integrity([r.page_table for r in self.running])
        assert not any(r.page_table for r in self.waiting), "a waiting request owns pages"
        ids = [r.request_id for r in self.requests()]
        assert len(ids) == len(set(ids)), "a request is queued twice"
        assert set(self._blocked_at) <= {r.request_id for r in self.waiting}, "a blocked request is gone"


def _batch_order(item: BatchItem) -> tuple[bool, int]:
    adapter_id = item.request.adapter_id
    return (not item.is_decode, -1 if adapter_id is None else adapter_id)
