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

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from toppings.bad_input import RequestError
from toppings.core import Admission, Batch, Request
from toppings.engine.adapter_placement import AdapterPlacement
from toppings.engine.fair_queue import FairQueue
from toppings.engine.making_room import last_of, victims_for
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.prefix_cache import BlockNames, PrefixCache
from toppings.engine.step_plan import StepPlan

MAX_LOOKED_AT = 32
"""Waiting requests whose adapters are asked for between steps; where there are more, one may find its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`max_adapter_wait_s`: after waiting so long for its adapter's room, a request has others drained.
    `scheduling_policy`: as in `config.SCHEDULING_POLICIES`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_adapter_wait_s: float
    scheduling_policy: str = "fair"


@dataclass(slots=True)
class Drain:
    """Room is being made for one starved request: `adapter_ids` admit nobody until it has started."""

    request: Request
    adapter_ids: frozenset[int]
    started_at: float


class Scheduler:
    """By turns over `waiting` (`fair_queue.py`), among one client's requests first come first served but for
    a lead that the prefix cache gives; whoever waits for an adapter is overtaken, never starved. `names`: of
    what the cache keeps, if it is to keep anything.

    A tenant that asks for no more than its share of places is a guest of those that ask for more: its prompts
    come before what is left of theirs, and all others get half as many tokens of that step, so that it takes
    little longer than it would alone; but not in two steps on end, so that prompts go on whoever comes.
    """

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
        self.waiting = FairQueue(
            limits.scheduling_policy, self.num_generated, self.cache.in_turn, limits.max_num_seqs
        )
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_drains = 0
        self._blocked_at: dict[Request, float] = {}  # since when its adapter found no room, longest first
        self._drain: Drain | None = None
        self._started: set[Request] = set()  # in the step that is put together
        self._was_overtaken = False  # in the last step, a prompt under way, or others for a guest
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
        if not 0 < request.weight < math.inf:
            raise RequestError(f"weight is {request.weight}; it must be above 0 and finite")
        if request.priority and self.limits.scheduling_policy != "priority":
            raise RequestError(
                f"priority is {request.priority}, but scheduling_policy is {self.limits.scheduling_policy!r};"
                " leave it out, or serve with scheduling_policy priority"
            )
        if request.adapter_id is not None:
            self.adapters.prefetch(request.adapter_id)
        self.cache.add(request)
        self.waiting.add(request)

    def finish(self, request: Request) -> None:
        """Forget a request, waiting or running, and take back all that it owns."""
        if self.waiting.is_running(request):
            self._end_running(request)
        else:
            self.waiting.remove(request)
        self._unblock(request)

    def _end_running(self, request: Request) -> None:
        if not request.output_token_ids and not request.num_preemptions:
            self.waiting.refund(request, request.num_uncomputed_tokens)
        self.waiting.remove(request)
        self.running.remove(request)
        self._take_back(request)

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
        step = StepPlan(self.limits.max_num_batched_tokens)
        may_overtake = admits and not self._was_overtaken and bool(self.waiting) and self.waiting.is_contended
        if admits:
            self._advance_drain(now)
        self._schedule_running(step, may_overtake=may_overtake)
        step.num_others = self.limits.max_num_batched_tokens - step.budget
        if step.late and not step.was_preempted:
            self._schedule_waiting(now, step, ahead_of=step.late[0])
        self._schedule_late(step)
        if admits and not step.was_preempted:
            self._schedule_waiting(now, step)
        self._was_overtaken = step.was_overtaken or step.guest_tokens > 0
        self._started.clear()
        return step.batch()

    def _schedule_running(self, step: StepPlan, *, may_overtake: bool) -> None:
        """What is left of prompts is `late` where others may overtake it."""
        for request in list(self.running):
            if step.budget <= 0:
                break
            num_tokens = min(request.num_uncomputed_tokens, step.budget)
            if num_tokens > 1 and may_overtake:
                step.late.append(request)
            elif num_tokens and not (step.was_preempted and request in self.waiting):
                self._grow_or_preempt(step, request, num_tokens)  # else its last token is on its way

    def _schedule_late(self, step: StepPlan) -> None:
        for request in step.late:
            num_tokens = min(request.num_uncomputed_tokens, self._budget_of(step, request))
            if num_tokens > 0 and self.waiting.is_running(request):
                self._grow_or_preempt(step, request, num_tokens)

    def _grow_or_preempt(self, step: StepPlan, request: Request, num_tokens: int) -> None:
        """Adds it to the step, at the cost of those that make way; not where it is one of these itself."""
        while not self.pages.grow(request.page_table, request.num_computed_tokens + num_tokens):
            victim = last_of(self.running, self.waiting, self.num_pages)
            step.drop(victim)
            step.was_preempted = True
            self.preempt(victim)
            if victim is request:
                return
        step.add(request, num_tokens)

    def _schedule_waiting(self, now: float, step: StepPlan, ahead_of: Request | None = None) -> None:
        """Adds to the step those that wait, or only those whose clients come before that of a running one."""
        if step.budget <= 0 or not self._may_start_any():
            return
        refused: set[int] = set()  # adapters that were asked for in this step and cannot start
        with closing(self.waiting.candidates(now)) as candidates:
            for request in candidates:
                if ahead_of is not None and not self.waiting.precedes(request, ahead_of):
                    return
                if not self._try_start(step, request, now, refused):
                    return
                step.was_overtaken = step.was_overtaken or ahead_of is not None

    def _try_start(self, step: StepPlan, request: Request, now: float, refused: set[int]) -> bool:
        """Start it, if it can be; False where those behind it have to wait as well."""
        num_found = self.cache.num_found(request)
        victims = self._victims(request, num_found) if step.budget > 0 else None
        if victims is None:
            return False
        adapter_id, budget = request.adapter_id, self._budget_of(step, request)
        is_held_up = adapter_id in refused or request in step.made_way or budget <= 0
        if is_held_up or not self._may_start(request):
            return True
        if self.cache.is_awaited(request, num_found, step.items, now):
            return True
        is_cold = adapter_id is not None and not self.adapters.holds(adapter_id)
        if adapter_id is not None and self._acquire(request, adapter_id, now, num_found) != Admission.READY:
            refused.add(adapter_id)
            return True
        if victims and not self._make_room(step, victims, request, num_found):
            return False
        load_tokens = self.adapters.load_tokens(adapter_id) if is_cold and adapter_id is not None else 0.0
        self._start(step, request, num_found, budget, load_tokens, now)
        return True

    def _make_room(self, step: StepPlan, victims: list[Request], request: Request, num_found: int) -> bool:
        """Others make way for it. False where that is not enough, since they shared pages: it waits on."""
        for victim in victims:
            victim.has_yielded = True
            self.preempt(victim)
            step.drop(victim)
            step.made_way.append(victim)
        if self._victims(request, num_found) == []:
            return True
        if request.adapter_id is not None:
            self.adapters.release(request.adapter_id)
        return False

    def _budget_of(self, step: StepPlan, request: Request) -> int:
        """Tokens of the step that its prompt may take, which is a guest's or one of those who have some."""
        if step.spare_tokens is None or self.waiting.is_guest(request):
            return step.budget
        return min(step.budget, step.spare_tokens)

    def _start(
        self, step: StepPlan, request: Request, num_found: int, budget: int, load_tokens: float, now: float
    ) -> None:
        is_guest = self.waiting.is_guest(request)
        self._unblock(request)
        copy_page = self.cache.take(request, num_found)
        self.waiting.start(request, request.num_uncomputed_tokens + load_tokens, now)
        # Kept in order of arrival, so that the last one is always the one to preempt.
        is_latest = not self.running or self.running[-1].arrived_at <= request.arrived_at
        self.running.append(request)
        self._started.add(request)
        if not is_latest:
            self.running.sort(key=lambda r: r.arrived_at)
        num_tokens = min(request.num_uncomputed_tokens, budget)
        # All that its prompt needs: others may start before the rest of it is computed.
        has_grown = self.pages.grow(request.page_table, request.num_tokens)
        assert has_grown, "pages were counted before the adapter was acquired"
        step.add(request, num_tokens, copy_page)
        self._note_guest(step, num_tokens, is_guest=is_guest)

    def _note_guest(self, step: StepPlan, num_tokens: int, *, is_guest: bool) -> None:
        if is_guest and not self._was_overtaken:
            step.guest_tokens += num_tokens
            step.spare_tokens = max(0, step.guest_tokens // 2 - step.num_others)
        elif not is_guest:
            step.num_others += num_tokens
            step.spare_tokens = None if step.spare_tokens is None else step.spare_tokens - num_tokens

    def _may_start_any(self) -> bool:
        """A request may start, for all that is known of places."""
        first = self.waiting.first
        is_full = len(self.running) >= self.limits.max_num_seqs
        return first is not None and (not is_full or self._victims(first, 0) is not None)

    def num_generated(self, request: Request) -> int:
        """Tokens that were drawn for it."""
        return len(request.output_token_ids)

    def num_pages(self, request: Request) -> int:
        """Pages that it owns, those of the step that is put together included."""
        return len(request.page_table)

    def may_admit(self, now: float) -> bool:
        """The next step may start a waiting request, or make room for one, for all that can be told without
        changing anything."""
        first = self.waiting.first
        if first is None or self._victims(first, self.cache.num_found(first)) is None:
            return False
        if self._drain is not None or self._has_starved(now):
            return True
        looked_at = list(islice(self.waiting, MAX_LOOKED_AT + 1))
        return len(looked_at) > MAX_LOOKED_AT or any(map(self._may_find_adapter, looked_at))

    def _may_find_adapter(self, request: Request) -> bool:
        return request.adapter_id is None or self.adapters.may_acquire(request.adapter_id)

    def _victims(self, request: Request, num_found: int) -> list[Request] | None:
        """Who has to make room for it; None where it cannot start.

        It needs pages for all it has to compute, and one for each that runs, lest one be preempted at once.
        """
        if not self.running:
            return []
        num_owned = self.cache.num_owned(request, num_found)
        num_needed = pages_for(request.num_tokens + 1, self.pages.page_size) - num_owned
        num_seqs = len(self.running) + 1 - self.limits.max_num_seqs
        num_pages = num_needed + len(self.running) - self.pages.num_free
        if num_seqs <= 0 and num_pages <= 0:
            return []
        victims = victims_for(
            request,
            self.running,
            self.waiting,
            num_seqs=num_seqs,
            num_pages=num_pages,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_pages=self.pages.num_pages,
            num_pages_of=self.num_pages,
            spared=self._started,
        )
        return victims or None

    def _acquire(self, request: Request, adapter_id: int, now: float, num_found: int) -> Admission:
        num_cached = num_found * self.pages.page_size
        num_tokens = request.num_uncomputed_tokens - max(num_cached, request.adapter_start)
        try:
            admission = self.adapters.try_acquire(adapter_id, now, num_tokens=num_tokens)
        except ValueError as error:
            self.finish(request)
            self._failed.append((request, str(error)))
            return Admission.LOADING
        if admission is Admission.NO_ROOM:
            self._blocked_at.setdefault(request, now)
        return admission

    # --- preemption and draining ---

    def preempt(self, request: Request) -> None:
        """Back to the queue, to the place its arrival gives it; its tokens are computed again later."""
        self.running.remove(request)
        self._take_back(request)
        self.waiting.put_back(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _may_start(self, request: Request) -> bool:
        """False where starting it would take the room that is being made for a starved request."""
        if self._drain is None or request is self._drain.request or request.adapter_id is None:
            return True
        return request.adapter_id not in self._drain.adapter_ids and self.adapters.holds(request.adapter_id)

    def _advance_drain(self, now: float) -> None:
        """Begin to drain for the request starved longest; preempt those that keep their room too long.

        Who has been preempted so runs to its end the next time: else two adapters for which there is one
        room could take it from each other for ever.
        """
        if self._drain is None:
            self._begin_drain(now)
        elif now - self._drain.started_at > self.limits.max_adapter_wait_s:
            adapter_ids = self._drain.adapter_ids
            for request in [r for r in self.running if r.adapter_id in adapter_ids and not r.has_yielded]:
                request.has_yielded = True
                self.preempt(request)

    def _begin_drain(self, now: float) -> None:
        starved, blocked_at = next(iter(self._blocked_at.items()), (None, now))
        if (
            starved is None
            or starved.adapter_id is None
            or now - blocked_at <= self.limits.max_adapter_wait_s
        ):
            return
        victims = frozenset(self.adapters.victims_for(starved.adapter_id))
        self._drain = Drain(starved, victims, now)
        self.num_drains += 1

    def _has_starved(self, now: float) -> bool:
        longest = min(self._blocked_at.values(), default=now)
        return now - longest > self.limits.max_adapter_wait_s

    def _unblock(self, request: Request) -> None:
        self._blocked_at.pop(request, None)
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
        assert set(self._blocked_at) <= set(self.waiting), "a blocked request is gone"
        self.waiting.check_integrity(self.running)
