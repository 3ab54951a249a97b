"""The engine's scheduler, with decodes that run on undisturbed kept as one sum.

A request whose only uncomputed token is the last one drawn joins the cohort. While all running requests are
in it and pages suffice, every step decodes each of them by one token: that is the scheduler's own decision,
and nothing about them has to be looked at. Whatever else happens (a chunked prefill, pages running out, a
preemption) dissolves the cohort: its requests get what they have generated, and the engine's code decides
as ever.

    request.num_computed_tokens, output_token_ids, page_table: as of when it joined, until it leaves
"""

from heapq import heappop, heappush

from toppings.cluster.batch_sums import BatchSums
from toppings.core import Batch, BatchItem, Request
from toppings.engine.adapter_placement import AdapterPlacement
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.prefix_cache import BlockNames
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.engine.step_plan import StepPlan
from toppings.sim.request import SimRequest


class ClaimedPages(PageAllocator):
    """The engine's pages, counted instead of numbered: which page it is decides nothing, and lists of them
    for a thousand servers would fill the caches. All entries of a table are 0.

    `num_claimed` pages belong to cohort members, who take them when they leave; `num_left` are nobody's.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(0, page_size)
        self.num_pages = self.num_left = num_pages
        self.num_claimed = 0

    @property
    def num_free(self) -> int:
        return self.num_left

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_left

    def claim(self, num: int) -> None:
        """Claim so many pages, or where negative give claims back."""
        self.num_claimed += num
        self.num_left -= num

    def grow(self, table: list[int], num_tokens: int) -> bool:
        num_missing = -(-num_tokens // self.page_size) - len(table)
        if num_missing > self.num_left:
            return False
        if num_missing > 0:
            self.num_left -= num_missing
            table += [0] * num_missing
        return True

    def free(self, table: list[int]) -> None:
        self.num_left += len(table)
        table.clear()

    def check_integrity(self, tables: list[list[int]]) -> None:
        num_used = sum(map(len, tables)) + self.num_claimed
        assert num_used + self.num_left == self.num_pages, "a page is lost or owned twice"
        assert self.num_left >= 0, "more pages are claimed than there are"


class ClaimedBlocks(PageAllocator):
    """The engine's pages with numbers, for requests that share some: an idle block makes way for a claim."""

    num_claimed = 0

    @property
    def num_free(self) -> int:
        return super().num_free - self.num_claimed

    @property
    def num_left(self) -> int:
        return self.num_free

    def claim(self, num: int) -> None:
        """As of `ClaimedPages`."""
        self.num_claimed += num
        self._make_free(0)

    def _make_free(self, num: int) -> None:
        super()._make_free(self.num_claimed + num)

    def check_integrity(self, tables: list[list[int]]) -> None:
        super().check_integrity(tables)
        assert self.num_free >= 0, "more pages are claimed than there are"


class CohortScheduler(Scheduler):
    """`may_jump` False keeps the cohort empty: every step is the engine's own code and nothing else."""

    pages: ClaimedPages | ClaimedBlocks

    def __init__(
        self,
        limits: SchedulerLimits,
        pages: ClaimedPages | ClaimedBlocks,
        adapters: AdapterPlacement,
        names: BlockNames | None = None,
        *,
        may_jump: bool,
    ) -> None:
        super().__init__(limits, pages, adapters, names)
        self.sums = BatchSums()
        self.num_steps = 0
        self._may_jump = may_jump
        self._offsets: dict[Request, int] = {}  # member -> its computed tokens less num_steps: constant
        self._offset_sum = 0
        self._ends: list[tuple[int, int, SimRequest]] = []  # heap: step after which it ends, index, member
        self._num_ahead = 0  # pages claimed for the step that was scheduled and has not ended
        self._page_size = pages.page_size
        self._crossings = [0] * pages.page_size  # members that need a new page in steps of this residue
        self._step: StepPlan | None = None  # that is put together, with every member in it

    # --- the cohort ---

    @property
    def is_undisturbed(self) -> bool:
        """True where `schedule` would decode the cohort and do nothing else."""
        return not self.waiting and self._is_whole() and not self.draining.is_on

    def note_undisturbed(self) -> None:
        """Steps run that `schedule` was not asked for."""
        self._was_overtaken = False

    @property
    def context_sum(self) -> int:
        """Keys that the next step's decodes attend to, each its own included."""
        return self._offset_sum + self.sums.sequences * (self.num_steps + 1)

    def join(self, request: SimRequest) -> None:
        """The request, which is running, decodes from now on."""
        if not self._may_jump:
            return
        num_computed, num_generated = request.num_computed_tokens, len(request.output_token_ids)
        assert len(request.prompt_token_ids) + num_generated - num_computed == 1
        offset = num_computed - self.num_steps
        self._offsets[request] = offset
        self._offset_sum += offset
        self.sums.add(request.rank, request.adapter_id, 1, 0)
        self._crossings[-offset % self._page_size] += 1
        num_left = request.num_to_generate - num_generated
        heappush(self._ends, (self.num_steps + num_left, request.index, request))

    def steps_to_next_end(self) -> int:
        return self._ends[0][0] - self.num_steps

    def steps_with_pages(self, num_steps: int) -> int:
        """How many of the next steps have pages, at most `num_steps`."""
        num_free, page_size = self.pages.num_left + self._num_ahead, self._page_size
        if self.sums.sequences * (num_steps // page_size + 1) <= num_free:
            return num_steps
        num_possible = min(num_steps, num_free // self.sums.sequences * page_size)
        while num_possible < num_steps and self._pages_of_steps(num_possible + 1) <= num_free:
            num_possible += 1
        return num_possible

    def advance(self, num_steps: int) -> None:
        """The cohort has run so many steps."""
        self.pages.claim(self._pages_of_steps(num_steps) - self._num_ahead)
        self.num_steps += num_steps
        self._num_ahead = 0

    def pop_ended(self) -> list[SimRequest]:
        """Members that have all their tokens now; they are still running."""
        ended: list[SimRequest] = []
        ends, num_steps = self._ends, self.num_steps
        while ends and ends[0][0] == num_steps:
            ended.append(heappop(ends)[2])
        return ended

    def is_member(self, request: Request) -> bool:
        return request in self._offsets

    def num_computed(self, request: Request) -> int:
        """Tokens of a request in the cache, member or not."""
        offset = self._offsets.get(request)
        return request.num_computed_tokens if offset is None else offset + self.num_steps

    def _pages_of_steps(self, num_steps: int) -> int:
        """Pages that the next steps take: a member takes one whenever its computed tokens fill its pages."""
        crossings, page_size = self._crossings, self._page_size
        first = self.num_steps % page_size
        if num_steps == 1:
            return crossings[first]
        num_cycles, rest = divmod(num_steps, page_size)
        last = first + rest
        num_pages = num_cycles * self.sums.sequences + sum(crossings[first:last])
        return num_pages + sum(crossings[: last - page_size]) if last > page_size else num_pages

    def _leave(self, request: Request) -> int:
        """The request is no member any more; how many tokens it has in the cache."""
        assert isinstance(request, SimRequest)
        page_size = self._page_size
        offset = self._offsets.pop(request)
        self._offset_sum -= offset
        self.sums.remove(request.rank, request.adapter_id, 1, 0)
        self._crossings[-offset % page_size] -= 1
        num_computed: int = offset + self.num_steps
        self.pages.claim(len(request.page_table) + -num_computed // page_size)
        return num_computed

    def _dissolve(self) -> None:
        for request in list(self._offsets):
            self._settle(request, self._leave(request))
        self._ends.clear()

    def _settle(self, request: Request, num_computed: int) -> None:
        """It gets what it has generated since it joined."""
        num_tokens = num_computed - request.num_computed_tokens
        request.output_token_ids.extend([0] * num_tokens)
        request.num_computed_tokens = num_computed
        has_grown = self.pages.grow(request.page_table, num_computed)
        assert has_grown, "its pages were claimed"
        self.cache.keep([BatchItem(request, num_tokens, stop=num_computed)])

    # --- the engine's scheduler ---

    def finish(self, request: Request) -> None:
        if request not in self._offsets:
            super().finish(request)
            return
        self.waiting.settle_one(request)
        num_computed = self._leave(request)  # it runs, so that nobody waits for its adapter or its end
        if self.cache.is_on:
            self._settle(request, num_computed)
        self.waiting.remove(request)
        self.running.remove(request)
        self._take_back(request)

    def preempt(self, request: Request) -> None:
        step, self._step = self._step, None
        members = list(self._offsets)
        if step is None:
            self._dissolve()
        else:  # what was claimed for them in this step they take one by one
            self.pages.claim(-self._num_ahead)
            self._num_ahead = 0
            step.budget += len(members)
            self._dissolve()
            for member in members:
                self._grow_or_preempt(step, member, 1)
        super().preempt(request)

    def num_generated(self, request: Request) -> int:
        if request not in self._offsets:
            return super().num_generated(request)
        return self.num_computed(request) - len(request.prompt_token_ids) + 1

    def num_pages(self, request: Request) -> int:
        if request not in self._offsets:
            return super().num_pages(request)
        return pages_for(self.num_computed(request) + (self._step is not None), self._page_size)

    @property
    def may_turn(self) -> bool:
        """Whose turn it is may change with what is served, and then who can start."""
        has_places = len(self.running) < self.limits.max_num_seqs
        return self.waiting.is_contended and (has_places or self.waiting.may_displace)

    def quiet_until(self) -> float:
        """Before this instant, with the pool as it is, time alone changes nothing for those that wait."""
        return self.draining.quiet_until()

    def schedule(self, now: float, *, admits: bool = True) -> Batch:
        batch = super().schedule(now, admits=admits)
        self._step = None
        return batch

    def _schedule_running(self, step: StepPlan, *, may_overtake: bool) -> None:
        if self._is_whole():
            self._num_ahead = self._pages_of_steps(1)
            self.pages.claim(self._num_ahead)
            step.budget -= self.sums.sequences
            self._step = step
            return
        self._dissolve()
        super()._schedule_running(step, may_overtake=may_overtake)

    def _is_whole(self) -> bool:
        """All that run are members, and the next step has pages for them."""
        num = self.sums.sequences
        if not num or num != len(self.running):
            return False
        num_free = self.pages.num_left
        return num <= num_free or self._pages_of_steps(1) <= num_free

    # --- proof ---

    def check_integrity(self) -> None:
        super().check_integrity()
        page_size = self.pages.page_size
        claims = [pages_for(self.num_computed(r), page_size) - len(r.page_table) for r in self._offsets]
        assert self.pages.num_claimed - self._num_ahead == sum(claims), "a claim is lost or made twice"
        assert set(self._offsets) <= set(self.running), "a member does not run"
        assert self.sums.sequences == len(self._offsets) == len(self._ends) == sum(self._crossings)
