"""One simulated server: the engine's scheduler on virtual time, its adapters, and the steps under way."""

from collections.abc import Iterable, Iterator
from copy import deepcopy

import numpy as np

from toppings.cluster.batch_sums import BatchSums
from toppings.cluster.report import RequestEntry, ServerReport
from toppings.core import Batch, BatchItem
from toppings.engine.prefix_cache import BlockNames
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.sim.cohort import ClaimedBlocks, ClaimedPages, CohortScheduler
from toppings.sim.costs import StepCosts, to_ns
from toppings.sim.loading import MODES, ColdStep, LinkLoad
from toppings.sim.placement import make_placement
from toppings.sim.request import SimRequest
from toppings.sim.run import Run
from toppings.sim.settings import NS_PER_MS, NS_PER_S, SimConfig

Outcome = tuple[list[SimRequest], list[SimRequest]]
"""Requests that got their first token with a step, and those that ended with it; both in the order of its
batch, in which the engine ends them too."""


class Instance:
    """Idle while `run` is None. Instants and times are ns."""

    def __init__(
        self,
        config: SimConfig,
        adapter_names: list[str],
        adapter_bytes: list[int],
        names: BlockNames | None = None,
    ) -> None:
        """`names`: of pages that requests may share."""
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            max_adapter_wait_s=config.max_adapter_wait_s,
            scheduling_policy=config.scheduling_policy,
        )
        self.placement = make_placement(config, adapter_names, adapter_bytes)
        make_pages = ClaimedPages if names is None else ClaimedBlocks
        pages = make_pages(config.num_pages, config.page_size)
        may_jump = not config.is_stepwise
        self.scheduler = CohortScheduler(limits, pages, self.placement, names, may_jump=may_jump)
        self.run: Run | None = None
        self.busy_time = self.exposed_time = self._exposing = 0  # the last: of the run that is under way
        self.num_steps = self.num_tokens = 0
        self._config, self._names = config, adapter_names
        self._costs = StepCosts(config.perf_model)
        self._exposed = MODES[config.mode]

    def add(self, request: SimRequest, now: int) -> None:
        """Queue a request. Raises ValueError where it can never be served."""
        self.placement.now_ns = now
        self.scheduler.add(request)

    def requests(self) -> list[SimRequest]:
        """All that are there, as they stand in line."""
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        return [request for request in queued if isinstance(request, SimRequest)]

    def withdraw(self, request: SimRequest) -> None:
        """Forget a request that waits."""
        self.scheduler.finish(request)

    # --- a step ---

    def begin(self, now: int) -> list[SimRequest]:
        """Begin the next step, or run of steps, if there is anything to run; requests that cannot be
        served.
        """
        assert self.run is None
        if self.scheduler.is_undisturbed:
            self.scheduler.note_undisturbed()
            self.run = self._decode_run(now, self.scheduler.steps_to_next_end())
            return []
        self.placement.now_ns = now
        num_reads = self.placement.num_reads
        batch = self.scheduler.schedule(now / NS_PER_S)
        failed = self.scheduler.pop_failed()
        if batch.items:
            self.run = self._single_step(now, batch)
        elif self.scheduler.sums.sequences:
            # A read that began may have taken host memory from another that waits: it asks again next step.
            may_change = self.placement.num_reads != num_reads or self.scheduler.may_turn
            quiet_until = now if may_change else self._quiet_until()
            self.run = self._decode_run(now, self.scheduler.steps_to_next_end(), quiet_until)
        rejected = [request for request, _ in failed if isinstance(request, SimRequest)]
        if rejected and self.run is None and self.scheduler.waiting:
            rejected += self.begin(now)  # one of those that failed may have stood in the way of others
        return rejected

    def end(self) -> Outcome:
        """The run has ended: its tokens are there."""
        run, scheduler = self.run, self.scheduler
        assert run is not None
        self.run = None
        num_steps = run.num_steps
        self.busy_time += run.end_at - run.begin_at
        self.exposed_time, self._exposing = self.exposed_time + self._exposing, 0
        self.num_steps += num_steps
        started: list[SimRequest] = []
        ended: list[SimRequest] = []
        if num := scheduler.sums.sequences:
            self.num_tokens += num * num_steps
            scheduler.advance(num_steps)
            ended = scheduler.pop_ended()
            if len(ended) > 1:
                ended.sort(key=_decode_order)
        if run.batch is not None:
            self._end_batch(run.batch, started, ended)
        for request in ended:
            scheduler.finish(request)
        self.placement.end_loads()
        return started, ended

    def _end_batch(self, batch: Batch, started: list[SimRequest], ended: list[SimRequest]) -> None:
        self.scheduler.commit(batch)
        self.scheduler.cache.keep(batch.items)
        for item in batch.items:
            request = item.request
            assert isinstance(request, SimRequest)
            output = request.output_token_ids
            if request.num_computed_tokens < len(request.prompt_token_ids) + len(output):
                continue  # a chunk that is not the last
            self.num_tokens += 1
            output.append(0)
            if len(output) == 1:
                started.append(request)
            if len(output) == request.num_to_generate:
                ended.append(request)
            else:
                self.scheduler.join(request)

    # --- how long steps take ---

    def _single_step(self, now: int, batch: Batch) -> Run:
        sums, context, prefills = self.scheduler.sums, self.scheduler.context_sum, batch.items
        if not sums.sequences:  # beside a cohort there are prefills only
            sums, context = _sums_of(batch.items)
            prefills = [item for item in batch.items if not item.is_decode]
        elif any(item.is_decode for item in batch.items):  # and prompts whose last token alone is not cached
            sums, context = _sums_of(batch.items, deepcopy(sums), context)
            prefills = [item for item in batch.items if not item.is_decode]
        ms = self._costs.decode_ms(sums) + self._costs.decode_context_ms * context
        if prefills:
            ms += self._costs.prefill_ms(prefills) - (self._costs.shared_ms if sums.sequences else 0.0)
        step_time = to_ns(ms)
        loads = self.placement.pop_loads()
        if loads:
            step_time += self._exposed_time(loads, batch, now, step_time)
        return Run(now, 1, step_time, batch)

    def _exposed_time(self, loads: list[LinkLoad], batch: Batch, now: int, compute_time: int) -> int:
        nums: dict[int | None, int] = {}
        for item in batch.items:
            adapter_id = item.request.adapter_id
            nums[adapter_id] = nums.get(adapter_id, 0) + item.num_tokens
        for load in loads:
            load.num_tokens = nums.get(load.adapter, 0)
        config = self._config
        step = ColdStep(
            now, compute_time, config.num_layers, config.cpu_gflops, config.round_trip_ms * NS_PER_MS
        )
        self._exposing = self._exposed(loads, step)
        return self._exposing

    def _decode_run(self, now: int, num_steps: int, quiet_until: int | None = None) -> Run:
        """The cohort decodes until its next member ends, pages run out or, where others wait, time tells."""
        scheduler, costs = self.scheduler, self._costs
        num_steps = scheduler.steps_with_pages(num_steps)
        fixed_ms = costs.decode_ms(scheduler.sums)
        if not costs.decode_context_ms or num_steps == 1:
            run = Run(now, num_steps, to_ns(fixed_ms + costs.decode_context_ms * scheduler.context_sum))
        else:
            context = scheduler.context_sum + scheduler.sums.sequences * np.arange(num_steps)
            times = np.rint((fixed_ms + costs.decode_context_ms * context) * NS_PER_MS).astype(np.int64)
            run = Run(now, num_steps, 0, ends=np.cumsum(np.maximum(times, 1)))
        if quiet_until is not None:
            run.cut(max(quiet_until, now))
        return run

    def _quiet_until(self) -> int | None:
        """Until when those that wait need not be asked again; None where only the end of a member helps."""
        ready_at = self.placement.next_ready_ns()
        instants = [] if ready_at is None else [ready_at]
        if (seconds := self.scheduler.quiet_until()) != float("inf"):
            instants.append(int(seconds * NS_PER_S) - 1000)
        return min(instants, default=None)

    # --- what others are told ---

    def running(self, now: int) -> Iterator[tuple[SimRequest, int]]:
        """Running requests with their tokens in the cache."""
        num_done = self.run.num_done_by(now) if self.run is not None else 0
        for request in self.scheduler.running:
            assert isinstance(request, SimRequest)
            yield request, self.scheduler.num_computed(request) + num_done * self.scheduler.is_member(request)

    def report(self, now: int) -> ServerReport:
        """What it tells routers: the cache in use, the adapters that it holds, and, where the performance
        model looks at contexts, what each running request has generated.
        """
        scheduler, config, placement = self.scheduler, self._config, self.placement
        return ServerReport(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            running_ranks=None,
            waiting_ranks=None,
            kv_tokens_total=self.scheduler.pages.num_pages * config.page_size,
            kv_tokens_used=self.kv_tokens_used(now),
            max_num_seqs=config.max_num_seqs,
            adapter_bytes_total=None if config.mode == "cached" else config.device_pool_bytes,
            on_device=placement.on_device,
            on_host=placement.on_host(),
            requests=list(self._progress(now)) if self._costs.decode_context_ms else [],
        )

    def _progress(self, now: int) -> Iterator[RequestEntry]:
        for request, num_computed in self.running(now):
            assert request.adapter_id is not None
            num_prompt = len(request.prompt_token_ids)
            name, num_generated = self._names[request.adapter_id], num_computed - num_prompt + 1
            yield RequestEntry(request.request_id, name, request.rank, num_prompt, num_generated)

    def kv_tokens_used(self, now: int) -> int:
        """Tokens in the cache."""
        scheduler = self.scheduler
        if scheduler.sums.sequences < len(scheduler.running):
            return sum(num_tokens for _, num_tokens in self.running(now))
        num_done = self.run.num_done_by(now) if self.run is not None else 0
        return scheduler.context_sum + (num_done - 1) * scheduler.sums.sequences

    def wake_at(self) -> int | None:
        """When an idle instance has to look again at those that wait; None where none waits."""
        if not self.scheduler.waiting:
            return None
        ready_at = self.placement.next_ready_ns()
        assert ready_at is not None, "requests wait for nothing"
        return ready_at

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        self.placement.check_integrity()


def _decode_order(request: SimRequest) -> tuple[int, int]:
    """Of decodes in a batch: by adapter, then by arrival."""
    assert request.adapter_id is not None
    return request.adapter_id, request.index


def _sums_of(
    items: Iterable[BatchItem], sums: BatchSums | None = None, context: int = 0
) -> tuple[BatchSums, int]:
    """The decodes among them, and the keys they attend to; added to `sums` and `context`."""
    sums = sums or BatchSums()
    for item in items:
        if item.is_decode:
            request = item.request
            assert isinstance(request, SimRequest)
            sums.add(request.rank, request.adapter_id, 1, 0)
            context += request.num_computed_tokens + 1
    return sums, context
