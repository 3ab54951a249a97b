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

from bisect import insort
from collections.abc import Iterable
from contextlib import closing
from itertools import islice

from toppings.core import Admission, Batch, Request
from toppings.engine.adapter_placement import AdapterPlacement
from toppings.engine.draining import Draining
from toppings.engine.fair_queue import FairQueue
from toppings.engine.lookup import LookupDrafts
from toppings.engine.making_room import last_of, victims_for
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.prefix_cache import BlockNames, PrefixCache
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.engine.step_plan import StepPlan

LOSS_SHARE = 34
"""Of so many tokens of prompts, one place in a step may be left empty for guests' sake."""
MAX_LOOKED_AT = 32
"""Waiting requests whose adapters are asked for between steps; where there are more, one may find its own."""


class Scheduler:
    """By turns over `waiting` (`fair_queue.py`), among one client's requests first come first served but for
    a lead that the prefix cache gives; whoever waits for an adapter is overtaken, never starved. `names`: of
    what the cache keeps, if it is to keep anything. `drafts`: who guesses tokens, if anybody does.

    A tenant that asks for no more than its share of places is a guest of those that ask for more: its prompts
    come before what is left of theirs, and all others get half as many tokens of that step, so that it takes
    little longer than it would alone; but not in two steps on end, so that prompts go on whoever comes, and
    only while what such steps cost, the fixed part of one more, is below 3 % of what is computed.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pages: PageAllocator,
        adapters: AdapterPlacement,
        names: BlockNames | None = None,
        drafts: LookupDrafts | None = None,
    ) -> None:
        assert pages.num_pages * pages.page_size >= limits.max_model_len, "one sequence may not fit the cache"
        self.limits = limits
        self.pages = pages
        self.adapters = adapters
        self.cache = PrefixCache(pages, names)
        self.drafts = drafts
        self.waiting = FairQueue(
            limits.scheduling_policy, self.num_generated, self.cache.in_turn, limits.max_num_seqs
        )
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.draining = Draining(adapters, limits.max_adapter_wait_s)
        self._started: set[Request] = set()  # in the step that is put together
        self._was_overtaken = False  # in the last step, a prompt under way, or others for a guest
        self._max_credit = LOSS_SHARE * limits.max_num_batched_tokens
        self._credit = self._max_credit  # prompts' tokens for which places may be left empty
        self._failed: list[tuple[Request, str]] = []

    # --- the life of a request ---

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError where it can never be served."""
        self.limits.check(request)
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
        if self.drafts is not None:
            self.drafts.forget(request)

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
        may_shorten = not self._was_overtaken and self._credit > 0
        step = StepPlan(self.limits.max_num_batched_tokens, may_shorten)
        may_overtake = admits and not self._was_overtaken and bool(self.waiting) and self.waiting.is_contended
        if admits:
            for request in self.draining.advance(now, self.running):
                request.was_drained = True
                self.preempt(request)
        self._schedule_running(step, may_overtake=may_overtake)
        step.num_others = self.limits.max_num_batched_tokens - step.budget
        if step.late and not step.was_preempted:
            self._schedule_waiting(now, step, ahead_of=step.late[0])
        self._schedule_late(step)
        if admits and not step.was_preempted:
            self._schedule_waiting(now, step)
        self._was_overtaken = step.was_overtaken or step.guest_tokens > 0
        num_lost = min(step.budget, self.limits.fixed_step_tokens) if step.is_held_back else 0
        self._credit = min(self._max_credit, self._credit + step.num_prompt_tokens - LOSS_SHARE * num_lost)
        self._started.clear()
        if self.drafts is not None:
            self.drafts.add_to(step, self.limits, self.pages, len(self.running))
        return step.batch()

    def _schedule_running(self, step: StepPlan, *, may_overtake: bool) -> None:
        """What is left of prompts is `late` where others may overtake it."""
        page_size = self.pages.page_size
        for request in list(self.running):
            if step.budget <= 0:
                break
            num_tokens = request.num_uncomputed_tokens
            has_page = 0 < request.num_computed_tokens < len(request.page_table) * page_size
            if num_tokens == 1 and has_page and not step.was_preempted:
                step.add_decode(request)
                continue
            num_tokens = min(num_tokens, step.budget)
            if num_tokens > 1 and may_overtake:
                step.late.append(request)
            elif num_tokens and not (step.was_preempted and request in self.waiting):
                self._grow_or_preempt(step, request, num_tokens)  # else its last token is on its way

    def _schedule_late(self, step: StepPlan) -> None:
        for request in step.late:
            is_guest = self.waiting.is_guest(request)
            num_tokens = step.tokens_for(request, is_guest=is_guest)
            if num_tokens > 0 and self.waiting.is_running(request):
                self._grow_or_preempt(step, request, num_tokens)
                step.note_others(0 if is_guest else num_tokens)

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
        if step.budget <= 0 or self._first_in_turn() is None:
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
        adapter_id, is_guest = request.adapter_id, self.waiting.is_guest(request)
        if not step.tokens_for(request, is_guest=is_guest):
            self.waiting.pass_over(request)
            return step.budget > 0
        num_found = self.cache.num_found(request)
        victims = self._victims(request, num_found)
        if victims is None:
            return False
        is_held_up = adapter_id in refused or request in step.made_way or not self.draining.may_start(request)
        if is_held_up or self.cache.is_awaited(request, num_found, step.prompts, now):
            return True
        is_cold = adapter_id is not None and not self.adapters.holds(adapter_id)
        if adapter_id is not None and self._acquire(request, adapter_id, now, num_found) != Admission.READY:
            refused.add(adapter_id)
            return True
        if victims and not self._make_room(step, victims, request, num_found):
            return False
        load_tokens = self.adapters.load_tokens(adapter_id) if is_cold and adapter_id is not None else 0.0
        self._start(step, request, num_found, load_tokens, now)
        return True

    def _make_room(self, step: StepPlan, victims: list[Request], request: Request, num_found: int) -> bool:
        """Others make way for it. False where that is not enough, since they shared pages: it waits on."""
        for victim in victims:
            self.preempt(victim)
            step.drop(victim)
            step.made_way.append(victim)
        if self._victims(request, num_found) == []:
            return True
        if request.adapter_id is not None:
            self.adapters.release(request.adapter_id)
        return False

    def _start(
        self, step: StepPlan, request: Request, num_found: int, load_tokens: float, now: float
    ) -> None:
        is_guest = self.waiting.is_guest(request)
        self._unblock(request)
        copy_page = self.cache.take(request, num_found)
        self.waiting.start(request, request.num_uncomputed_tokens + load_tokens, now)
        # Kept in order of arrival, so that the last one is always the one to preempt.
        insort(self.running, request, key=_arrived_at)
        self._started.add(request)
        num_tokens = step.tokens_for(request, is_guest=is_guest)
        # All that its prompt needs: others may start before the rest of it is computed.
        has_grown = self.pages.grow(request.page_table, request.num_tokens)
        assert has_grown, "pages were counted before the adapter was acquired"
        step.add(request, num_tokens, copy_page)
        if is_guest:
            step.note_guest(num_tokens)
        else:
            step.note_others(num_tokens)

    def _first_in_turn(self) -> Request | None:
        """Whose turn it is, by all that was drawn until now; None where no place is to be had."""
        is_full = len(self.running) >= self.limits.max_num_seqs
        if not self.waiting or (is_full and not self.waiting.may_displace):
            return None
        self.waiting.settle()
        first = self.waiting.first
        return None if first is None or (is_full and self._victims(first, 0) is None) else first

    def num_generated(self, request: Request) -> int:
        """Tokens that were drawn for it."""
        return len(request.output_token_ids)

    def num_pages(self, request: Request) -> int:
        """Pages that it owns, those of the step that is put together included."""
        return len(request.page_table)

    def may_admit(self, now: float) -> bool:
        """The next step may start a waiting request, or make room for one, for all that can be told without
        changing anything."""
        first = self._first_in_turn()
        if first is None or self._victims(first, self.cache.num_found(first)) is None:
            return False
        if self.draining.is_due(now):
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
            self.draining.note_blocked(request, now)
        return admission

    # --- preemption ---

    def preempt(self, request: Request) -> None:
        """Back to the queue, to the place its arrival gives it; its tokens are computed again later."""
        self.running.remove(request)
        self._take_back(request)
        self.waiting.put_back(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _unblock(self, request: Request) -> None:
        self.draining.forget(request)
        self.cache.forget(request)

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
        self.draining.check_integrity(list(self.waiting))
        self.waiting.check_integrity(self.running)


def _arrived_at(request: Request) -> float:
    return request.arrived_at
