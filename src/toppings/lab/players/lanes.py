"""Scheduling policies side by side on one engine's model: each a lane, with requests and a clock of its own.

All lanes run the same weights by the same kernels, a step of one after a step of another, so that whatever
else the machine does slows all alike. They share pages and adapters, of which there are enough for all.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from toppings.core import Batch, Standing
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.engine import Engine
from toppings.engine.fair_queue import OUTPUT_WEIGHT
from toppings.engine.scheduler import Scheduler
from toppings.engine.step_log import StepLog
from toppings.lab.summary import Stats
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.sim.trace import Trace

MAX_OPEN = 20_000
"""Requests of a lane: beyond, none is sent, so that memory has a bound."""
MIN_STEPS = 2
"""Of each lane, whatever the time: a result has something in it."""


class TimedScheduler(Scheduler):
    """`seconds`: processor time of `schedule`."""

    seconds = 0.0

    def schedule(self, now: float, *, admits: bool = True) -> Batch:
        began_at = time.process_time()
        try:
            return super().schedule(now, admits=admits)
        finally:
            self.seconds += time.process_time() - began_at


class Lane:
    """`trace`, whose tenants are the clients, by a policy on the model of `engine`, which is idle itself.
    `now`: processor time in s of this lane's steps; time passes at once while it has nothing to do."""

    def __init__(self, engine: Engine, policy: str, trace: Trace, adapter_ids: Sequence[int]) -> None:
        assert trace.tenants is not None
        limits = replace(engine.scheduler.limits, scheduling_policy=policy)
        names = BlockHasher(engine.scheduler.pages.page_size)
        self.scheduler = TimedScheduler(limits, engine.scheduler.pages, engine.adapters, names)
        self._engine = Engine(
            engine.info,
            self.scheduler,
            engine._runner,
            engine.adapters,
            eos_token_ids=(),
            step_log=StepLog(""),
        )
        self._trace, self._tenants, self._adapter_ids = trace, trace.tenants, adapter_ids
        self._prefix = f"{id(self)}-"
        self._random = np.random.default_rng(0)
        self._arrivals = trace.arrivals_s.tolist()
        self._begun: set[int] = set()
        self._num_added = 0
        self._ttft_ms: list[list[float]] = [[] for _ in self._tenants.names]
        self._got = np.zeros(len(self._tenants.names))  # tokens, of prompts once, drawn ones twice
        self._counted: Counter[str] = Counter()
        self.now = self._longest_step_s = 0.0
        self.num_steps = 0

    def step(self) -> bool:
        """False where all is done."""
        self._add_arrived()
        if not self._engine.has_requests:
            if self._num_added == len(self._arrivals):
                return False
            self.now = self._arrivals[self._num_added]
            return True
        began_at = time.process_time()
        outputs = self._engine.step()
        step_s = time.process_time() - began_at
        self.now += step_s
        self.num_steps += 1
        self._longest_step_s = max(self._longest_step_s, step_s)
        for output in outputs:
            assert output.error is None, output.error
            self._note(int(output.request_id.removeprefix(self._prefix)), len(output.token_ids))
        return True

    def _note(self, index: int, num_tokens: int) -> None:
        tenant = int(self._tenants.indices[index])
        self._got[tenant] += OUTPUT_WEIGHT * num_tokens
        self._counted["generation_tokens"] += num_tokens
        if index not in self._begun:
            self._begun.add(index)
            num_prompt = int(self._trace.prompt_tokens[index])
            self._got[tenant] += num_prompt
            self._counted["prompt_tokens"] += num_prompt
            self._ttft_ms[tenant].append((self.now - self._arrivals[index]) * 1e3)

    def _add_arrived(self) -> None:
        while self._num_added < len(self._arrivals) and self._arrivals[self._num_added] <= self.now:
            if len(self.scheduler.waiting) < MAX_OPEN:
                refusal = self._engine.add(self._request(self._num_added))
                assert refusal is None, refusal
            self._num_added += 1

    def _request(self, index: int) -> AddRequest:
        """Its prompt is drawn when it comes: no two begin alike."""
        trace, tenant = self._trace, int(self._tenants.indices[index])
        vocabulary = self._engine.info.vocab_size
        return AddRequest(
            f"{self._prefix}{index}",
            self._random.integers(2, vocabulary, int(trace.prompt_tokens[index])).tolist(),
            SamplingParams(max_tokens=int(trace.response_tokens[index]), temperature=0.0, ignore_eos=True),
            self._adapter_ids[int(trace.adapters[index])],
            standing=Standing(self._tenants.names[tenant], self._tenants.weights[tenant]),
        )

    def stop(self) -> None:
        """What is left is ended."""
        self._engine.abort_all("the time is over")

    def end(self) -> dict[str, Any]:
        """After `stop` of all. By weight, a share of what got most; tokens per second of `now`."""
        self._engine.check_integrity()
        by_weight = self._got / np.asarray(self._tenants.weights)
        return {
            "seconds": self.now,
            "steps": self.num_steps,
            **self._counted,
            "preemptions": self.scheduler.num_preemptions,
            "served_by_weight": (by_weight / max(1.0, by_weight.max())).tolist(),
            "tokens_per_s": float(self._got.sum()) / max(self.now, 1e-9),
            "tokens_per_step": float(self._got.sum()) / max(self.num_steps, 1),
            "schedule_us": self.scheduler.seconds / max(self.num_steps, 1) * 1e6,
            "schedule_share": self.scheduler.seconds / max(self.now, 1e-9),
            "longest_step_ms": self._longest_step_s * 1e3,
            "num_begun": [len(each) for each in self._ttft_ms],
            "ttft_ms": [asdict(Stats.of(each)) for each in self._ttft_ms],
        }


def run_lanes(lanes: dict[str, Lane], ends_at: float = 0.0) -> dict[str, dict[str, Any]]:
    """A step of the lane that is behind the others, until `ends_at` of `time.monotonic`, or all is done; of
    each lane some steps in any case. What `Lane.end` says, by the lanes' names."""
    going = list(lanes.values())
    while going and (time.monotonic() < ends_at or any(lane.num_steps < MIN_STEPS for lane in going)):
        lane = min(going, key=lambda each: each.now)
        if not lane.step():
            going.remove(lane)
    for lane in lanes.values():
        lane.stop()
    return {name: lane.end() for name, lane in lanes.items()}
