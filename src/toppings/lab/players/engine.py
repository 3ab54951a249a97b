"""The requests of a trace through an engine in this process, each when its time has come."""

import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from toppings.adapters.link import sleep_until
from toppings.adapters.manager import PRELOAD_POLL_S, AdapterManager
from toppings.cluster.batch_row import BatchRow
from toppings.core import FinishReason, Request, Standing
from toppings.engine.engine import Engine
from toppings.engine.loop import LOADING_POLL_S
from toppings.lab.outcome import Outcome
from toppings.lab.workload import calls_of
from toppings.messages import AddRequest, RequestOutput
from toppings.sampling_params import SamplingParams
from toppings.sim.trace import Trace

PRELOAD_TIMEOUT_S = 60.0


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some instant."""

    def sleep_until(self, at: float) -> None: ...

    def stopped(self) -> AbstractContextManager[None]:
        """Whatever happens within takes no time."""


class WallClock:
    """`time.perf_counter`, which can be stopped; sleeps end within tens of microseconds."""

    def __init__(self) -> None:
        self._stopped_s = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._stopped_s

    def sleep_until(self, at: float) -> None:
        sleep_until(at + self._stopped_s)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._stopped_s += time.perf_counter() - started_at


@dataclass(frozen=True, slots=True)
class PlayedStep:
    """What one step of the engine computed, and how long it took. `is_cold`: a load began with it."""

    decode: tuple[BatchRow, ...]
    prefill: tuple[BatchRow, ...]
    ms: float
    is_cold: bool


def preload_host(adapters: AdapterManager, adapter_ids: Sequence[int]) -> None:
    """Returns when all these are in host memory, which must have room for them. Raises AdapterError, and
    RuntimeError where the disk is too slow.
    """
    for adapter_id in adapter_ids:
        adapters.prefetch(adapter_id)
    deadline = time.monotonic() + PRELOAD_TIMEOUT_S
    while not set(adapter_ids) <= set(adapters.host.ready_ids()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"adapters were not read from disk within {PRELOAD_TIMEOUT_S:g} s")
        time.sleep(PRELOAD_POLL_S)


class EnginePlayer:
    """Adapter i of a trace is `adapter_ids[i]`. To be used by the thread that made the engine, which has
    nothing else to do.

    Between steps it does what the engine's loop does, except for messages, and calls `on_step` while the
    clock stands still. A request that arrives during a step is known after it.
    """

    def __init__(
        self,
        engine: Engine,
        adapter_ids: Sequence[int],
        clock: Clock,
        *,
        on_step: Callable[[PlayedStep], None] = lambda _: None,
        is_cacheable: bool = False,
        batch_tenants: Container[str] = (),
    ) -> None:
        """`is_cacheable`: prompts that share nothing, too, which are those of other traces; `batch_tenants`:
        whose requests are of the class batch."""
        self._is_cacheable, self._batch_tenants = is_cacheable, batch_tenants
        self._engine, self._adapter_ids, self._clock, self._on_step = engine, adapter_ids, clock, on_step

    def play(self, trace: Trace) -> list[Outcome]:
        """Instants are seconds since the trace began. Raises RuntimeError where a request is not served."""
        self._requests = self.requests_of(trace)
        self._arrivals = trace.arrivals_s.tolist()
        self._first_token_at = [np.nan] * len(trace)
        self._ended_at = [np.nan] * len(trace)
        self._num_tokens = [0] * len(trace)
        self._num_added = 0
        begin_at = self._clock.now()
        while self._num_added < len(self._requests) or self._engine.has_requests:
            self._add_arrived(self._clock.now() - begin_at)
            outputs, now = self._step(begin_at)
            if not outputs and not self._engine.has_running:
                self._clock.sleep_until(begin_at + self._next_look(now))
        return self._outcomes(trace)

    def requests_of(self, trace: Trace) -> list[AddRequest]:
        """Made beforehand, so that no time goes by for it; the i-th has the request id i."""
        tenants = trace.tenants
        owners = [("", 1.0)] * len(trace)
        if tenants is not None:
            owners = [(tenants.names[i], tenants.weights[i]) for i in tenants.indices.tolist()]
        return [
            AddRequest(
                str(index),
                list(map(int, call.prompt)),
                SamplingParams(max_tokens=call.max_tokens, temperature=0.0, ignore_eos=True),
                self._adapter_ids[adapter],
                is_cacheable=self._is_cacheable or trace.blocks is not None,
                standing=Standing(tenant, weight, is_batch=tenant in self._batch_tenants),
            )
            for index, (adapter, call, (tenant, weight)) in enumerate(
                zip(trace.adapters.tolist(), calls_of(trace), owners, strict=True)
            )
        ]

    def _step(self, begin_at: float) -> tuple[list[RequestOutput], float]:
        """What a step of the engine gave, and when that was."""
        with self._clock.stopped():
            before, num_loads = self._computed(), self._num_loads()
        started_at = self._clock.now()
        outputs = self._engine.step()
        ended_at = self._clock.now()
        for output in outputs:
            self._note(output, ended_at - begin_at)
        self._engine.poll()
        with self._clock.stopped():
            step = self._played(before, ended_at - started_at, self._num_loads() > num_loads)
            if step.decode or step.prefill:
                self._on_step(step)
        return outputs, ended_at - begin_at

    def _add_arrived(self, now: float) -> None:
        while self._num_added < len(self._requests) and self._arrivals[self._num_added] <= now:
            refusal = self._engine.add(self._requests[self._num_added])
            if refusal is not None:
                raise RuntimeError(f"the engine refused request {refusal.request_id}: {refusal.error}")
            self._num_added += 1

    def _note(self, output: RequestOutput, now: float) -> None:
        index = int(output.request_id)
        if output.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"the engine failed request {index}: {output.error}")
        if not self._num_tokens[index]:
            self._first_token_at[index] = now
        self._num_tokens[index] += len(output.token_ids)
        if output.finish_reason is not None:
            self._ended_at[index] = now

    def _num_loads(self) -> float:
        return self._engine.adapters.counters()["adapter_loads"]

    def _computed(self) -> list[tuple[Request, int]]:
        """All requests, with their tokens in the cache."""
        return [(request, request.num_computed_tokens) for request in self._engine.scheduler.requests()]

    def _played(self, before: list[tuple[Request, int]], seconds: float, is_cold: bool) -> PlayedStep:
        decode: list[BatchRow] = []
        prefill: list[BatchRow] = []
        for request, num_context in before:
            num_tokens = request.num_computed_tokens - num_context
            if num_tokens <= 0 or request.adapter_id is None:
                continue  # it waited, or was preempted
            name, rank = str(request.adapter_id), self._engine.adapters.rank_of(request.adapter_id)
            is_decode = num_tokens == 1 and num_context > 0
            (decode if is_decode else prefill).append(BatchRow(rank, name, num_tokens, num_context))
        return PlayedStep(tuple(decode), tuple(prefill), seconds * 1e3, is_cold)

    def _next_look(self, now: float) -> float:
        """When to look again if nothing runs; at the end of the last request: at once."""
        look_at = now + LOADING_POLL_S if self._engine.has_requests else np.inf
        if self._num_added < len(self._requests):
            look_at = min(look_at, self._arrivals[self._num_added])
        return look_at if np.isfinite(look_at) else now

    def _outcomes(self, trace: Trace) -> list[Outcome]:
        assert np.isfinite(self._ended_at).all(), "a request has not ended"
        names, rows = trace.adapter_names, zip(trace.adapters.tolist(), trace.prompt_tokens.tolist())
        return [
            Outcome(
                names[adapter],
                self._arrivals[i],
                (self._ended_at[i] - self._arrivals[i]) * 1e3,
                (self._first_token_at[i] - self._arrivals[i]) * 1e3,
                self._num_tokens[i],
                num_prompt,
            )
            for i, (adapter, num_prompt) in enumerate(rows)
        ]
