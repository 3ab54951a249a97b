"""The engine: requests in, tokens out, one step at a time. Knows neither processes nor HTTP."""

import logging
import time

from toppings.adapters.errors import AdapterError
from toppings.adapters.manager import AdapterManager
from toppings.bad_input import RequestError
from toppings.core import Batch, BatchItem, FinishReason, Request
from toppings.engine.activation import activate
from toppings.engine.assist import Assist
from toppings.engine.counters import Counters
from toppings.engine.ends import Ends, error_output
from toppings.engine.intake import check_tokens, own_tokens, request_of, set_vocabulary, tier_of
from toppings.engine.merged_mode import MergedMode
from toppings.engine.model_runner import StepResult
from toppings.engine.progress import Progress
from toppings.engine.scheduler import Scheduler
from toppings.engine.snapshot import snapshot
from toppings.engine.step import Followers, Runner, Step
from toppings.engine.step_log import StepLog, describe
from toppings.engine.structures import Structures
from toppings.messages import AddRequest, EngineReady, EngineStats, RequestOutput, TokenLogprobs
from toppings.ops.device_faults import is_sticky
from toppings.vital import EngineLostError

IDLE_S = 3.0
"""What may hold up steps for a moment is done when there have been none for so long."""
MAX_FAILURES = 10
"""Steps in a row that fail, whatever they run: the engine is taken to be broken."""

logger = logging.getLogger(__name__)


class Engine:
    """Steps are run by one thread; `add`, `abort` and all else are called by that thread, between steps.

    Where the runner can, the next step is started before this one's tokens are waited for, so that the device
    finds its work queued. It runs for all requests that may go on; what it draws for one that has
    ended is dropped. Whatever ended requests give back may be given to others at once: what they do
    with it comes later in the device's order.
    """

    def __init__(
        self,
        info: EngineReady,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AdapterManager,
        *,
        eos_token_ids: tuple[int, ...],
        step_log: StepLog,
        assist: Assist | None = None,
        followers: Followers | None = None,
        structures: Structures | None = None,
        merged: MergedMode | None = None,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.adapters = adapters
        self._runner = runner
        self._ends = Ends(frozenset(eos_token_ids), info.max_model_len)
        self._step_log = step_log
        self._assist = assist
        self._followers = followers
        self._structures = structures
        self.merged = merged
        self._progress: dict[str, Progress] = {}
        self._counters = Counters()
        self._ahead: Step | None = None  # started on top of the last one that was finished
        self._finished_at = time.perf_counter()
        self._num_failures = 0  # steps in a row

    @property
    def has_requests(self) -> bool:
        return bool(self._progress)

    @property
    def has_running(self) -> bool:
        return bool(self.scheduler.running)

    def add(self, message: AddRequest) -> RequestOutput | None:
        """Queue a request; where it cannot be served, its one and only output, with the reason."""
        request = request_of(message, time.perf_counter())
        try:
            if message.request_id in self._progress:
                raise RequestError(f"request id {message.request_id!r} is already in use")
            set_vocabulary(request, self.adapters, self.info.vocab_size)
            check_tokens(request)
            tier = tier_of(request, self.adapters)
            if request.adapter_id is not None:
                activate(request, self.adapters.invocation_tokens_of(request.adapter_id))
            if self._is_compiled(request):
                self.scheduler.add(request)
        except ValueError as error:
            return error_output(message.request_id, str(error))
        self._progress[request.request_id] = Progress(request, tier)
        return None

    def _is_compiled(self, request: Request) -> bool:
        """False where its structure has yet to be. Raises ValueError where that cannot be followed."""
        if request.sampling.structure is None:
            return True
        if self._structures is None:
            raise RequestError("this engine has no structured output; leave the structure out")
        return self._structures.begin(request, own_tokens(request, self.adapters, self._ends.eos_token_ids))

    def _add_compiled(self) -> list[RequestOutput]:
        """Queues requests whose structure is compiled by now; what is said to those that cannot be served."""
        outputs: list[RequestOutput] = []
        for request, reason in () if self._structures is None else self._structures.pop_compiled():
            try:
                if reason is not None:
                    raise RequestError(reason)
                self.scheduler.add(request)
            except ValueError as error:
                outputs.append(self._fail(request, str(error)))
        return outputs

    def abort(self, request_id: str) -> None:
        """Free all that a request owns; unknown or finished ones are none of our business."""
        progress = self._progress.get(request_id)
        if progress is not None:
            self._forget(progress.request)

    def abort_all(self, reason: str) -> list[RequestOutput]:
        """End every request; its last output carries `reason`."""
        outputs = [
            RequestOutput(request_id, [], finish_reason=FinishReason.ABORT, error=reason)
            for request_id in self._progress
        ]
        for progress in list(self._progress.values()):
            self._forget(progress.request)
        self._ahead = None
        return outputs

    def step(self) -> list[RequestOutput]:
        """One step's outputs: schedule, run, postprocess. Empty where nothing could run.

        Raises EngineLostError.
        """
        step, self._ahead = self._ahead, None
        outputs = self._add_compiled()
        if step is None:
            step = self._start(outputs)
        if step is None:
            return outputs
        following = self._start(outputs, step) if self._can_run_ahead() else None
        self._finish(step, outputs)
        if following is not None and any(map(self._is_alive, following.batch.items)):
            self._ahead = following
        return outputs

    def _can_run_ahead(self) -> bool:
        """While nobody is to be admitted: whose prompt joins a step is decided with all tokens known."""
        may_admit = self.scheduler.may_admit(time.perf_counter())
        return not may_admit and self._runner.can_run_ahead(self.scheduler.running)

    def _start(self, outputs: list[RequestOutput], previous: Step | None = None) -> Step | None:
        """Schedules a step and queues its work; None where nothing can run or it could not be started.

        Raises EngineLostError.
        """
        started_at = time.perf_counter()
        # Who is admitted may need CPU assistance, whose host memory is the adapter's until the step is over.
        batch = self.scheduler.schedule(started_at, admits=previous is None)
        outputs += [self._fail(request, reason) for request, reason in self.scheduler.pop_failed()]
        if not batch.items:
            return None
        for item in batch.items:
            self._progress[item.request.request_id].note_scheduled(started_at)
        try:
            flight = self._runner.start(batch, None if previous is None else previous.flight)
        except AdapterError as error:
            outputs += self._fail_all(self._users_of_failed_loads(batch), str(error))
            return None
        except Exception as error:
            outputs += self._fail_step(batch, error)
            return None
        num_prompt_tokens = sum(i.num_tokens for i in batch.items if not i.is_decode)
        read_out = [i for i in batch.items if i.is_last and not i.needs_sample]
        record = describe(batch, self.adapters.rank_of)
        step = Step(batch, read_out, flight, started_at, num_prompt_tokens, record)
        drawn = [i for i in batch.items if i.needs_sample]
        self.scheduler.commit(batch)
        for item in drawn:
            item.request.num_pending_tokens += self._ends.may_go_on(item.request)
        return step

    def _finish(self, step: Step, outputs: list[RequestOutput]) -> None:
        """Waits for the step's tokens and hands them out. Raises EngineLostError."""
        try:
            result = step.flight.result()
        except Exception as error:
            outputs += self._fail_step(step.batch, error)
            return
        self._num_failures = 0
        self.scheduler.cache.keep(filter(self._is_alive, step.batch.items))
        outputs += self._postprocess(step, result)

    def _fail_step(self, batch: Batch, error: Exception) -> list[RequestOutput]:
        """Raises EngineLostError where the next steps would fail, too."""
        if isinstance(error, EngineLostError):
            raise error
        logger.error("a step failed; its requests are answered with an error", exc_info=error)
        self._counters.note_error()
        self._num_failures += 1
        if is_sticky(error) or self._num_failures >= MAX_FAILURES:
            times = "" if self._num_failures == 1 else f" ({self._num_failures} steps in a row)"
            raise EngineLostError(f"the device has failed{times}: {error}") from error
        alive = [item.request for item in batch.items if self._is_alive(item)]
        return self._fail_all(alive, f"the engine failed: {error}")

    def _is_alive(self, item: BatchItem) -> bool:
        """Its request has not ended since the step was scheduled."""
        progress = self._progress.get(item.request.request_id)
        return progress is not None and progress.request is item.request

    def is_removed(self, adapter_id: int) -> bool:
        """Free an adapter whose removal was requested, once no request needs it; to be asked until True."""
        if any(p.request.adapter_id == adapter_id for p in self._progress.values()):
            return False
        self.scheduler.pages.drop(adapter_id)
        return self.adapters.is_removed(adapter_id)

    def stats(self, call_id: int, *, only_changes: bool = False) -> EngineStats:
        """`only_changes`: of adapters that have changed since it was last asked so."""
        counters = {
            **self._counters.values,
            **({} if self._assist is None else self._assist.counters()),
            **({} if self.merged is None else self.merged.counters),
            "step_log_dropped": self._step_log.num_dropped,
        }
        return snapshot(
            call_id,
            self.scheduler,
            self.adapters,
            counters,
            only_changes=only_changes,
            num_workers=0 if self._assist is None else self._assist.num_workers,
            merged=None if self.merged is None else self.merged.status(),
        )

    def check_integrity(self) -> None:
        """Nothing is lost or owned twice: pages, pins, requests."""
        self.scheduler.check_integrity()
        self.adapters.check_integrity()
        num_compiling = 0 if self._structures is None else self._structures.num_compiling
        scheduled = {r.request_id for r in self.scheduler.requests()}
        assert scheduled <= set(self._progress), "a request has no progress"
        assert len(scheduled) + num_compiling == len(self._progress), "a request is lost"
        if not self._progress:
            assert self.scheduler.pages.num_used == 0, "pages are owned while no request lives"

    def poll(self) -> None:
        """Background work that no request drives: loads that landed, pins, workers that died.

        Raises EngineLostError.
        """
        self.adapters.poll()
        self.adapters.check()
        if self._followers is not None:
            self._followers.check()
        if self._assist is not None:
            self._assist.poll()
        if self.merged is not None and self.merged.poll():
            self._finished_at = time.perf_counter()  # a step that was started before did not take as long
        is_idle = not self._progress and time.perf_counter() - self._finished_at > IDLE_S
        if is_idle and self._structures is not None:
            self._structures.warm_up()

    def close(self) -> None:
        if self._assist is not None:
            self._assist.close()
        self.adapters.close()
        if self._followers is not None:
            self._followers.close()
        if self._structures is not None:
            self._structures.close()
        self._step_log.close()

    # --- after the forward ---

    def _postprocess(self, step: Step, result: StepResult) -> list[RequestOutput]:
        now = time.perf_counter()
        step_s, self._finished_at = now - max(step.started_at, self._finished_at), now
        for item in filter(self._is_alive, step.batch.items):
            progress = self._progress[item.request.request_id]
            if not item.request.output_token_ids:
                progress.note_prefill(item, now, step_s, result)
            if (reading := result.readings.get(item.request.request_id)) is not None:
                progress.notes.add(reading)
        outputs: list[RequestOutput] = []
        before: BatchItem | None = None
        for item, token_id, logprobs in zip(result.items, result.token_ids, result.logprobs, strict=True):
            if not self._is_alive(item):
                continue
            if item is before:
                self._keep_drafted(item.request)
            before = item
            if (reason := result.failed.get(item.request.request_id)) is not None:
                outputs += self._fail_all([item.request], reason)
            else:
                outputs.append(self._token_output(item.request, token_id, logprobs))
        if self.scheduler.drafts is not None:
            self.scheduler.drafts.note_step(step.batch.items, result.items)
        self._counters.note_step(step, result, len(outputs))
        outputs += [self._end_of_reading(i.request) for i in step.read_out if self._is_alive(i)]
        if self.merged is not None:
            self.merged.note_step(step.batch.items, step_s, now)
        self._step_log.write_step(step.record, result, step_s)
        return outputs

    def _keep_drafted(self, request: Request) -> None:
        """Its last token was in a draft, and was computed in the step that drew it."""
        request.num_computed_tokens += 1
        self.scheduler.cache.keep([BatchItem(request, 1, stop=request.num_computed_tokens)])

    def _token_output(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        is_first = not request.output_token_ids
        request.output_token_ids.append(token_id)
        request.num_pending_tokens = max(0, request.num_pending_tokens - 1)
        output = self._ends.output(request, token_id, logprobs)
        if is_first:
            output = self._progress[request.request_id].with_start(output, self.adapters)
        if output.finish_reason is not None:
            self._forget(request)
        return output

    def _end_of_reading(self, request: Request) -> RequestOutput:
        """All that is said of a prompt after which nothing is to be drawn."""
        output = RequestOutput(request.request_id, [], finish_reason=FinishReason.LENGTH)
        output = self._progress[request.request_id].with_start(output, self.adapters)
        self._forget(request)
        return output

    # --- ends ---

    def _fail(self, request: Request, reason: str) -> RequestOutput:
        """The scheduler has dropped it already."""
        self._progress.pop(request.request_id)
        self._runner.forget(request)
        return error_output(request.request_id, reason)

    def _fail_all(self, requests: list[Request], reason: str) -> list[RequestOutput]:
        for request in requests:
            self._forget(request)
        return [error_output(request.request_id, reason) for request in requests]

    def _forget(self, request: Request) -> None:
        self._progress.pop(request.request_id)
        if self._structures is None or not self._structures.cancel(request):
            self.scheduler.finish(request)
        self._runner.forget(request)

    def _users_of_failed_loads(self, batch: Batch) -> list[Request]:
        """Only they end; for the others nothing was committed, and they run again in the next step."""
        return [
            r for i in batch.items if (r := i.request).adapter_id and self.adapters.has_failed(r.adapter_id)
        ]
