"""What the scheduler itself costs a step, by policy: no model runs.

256 requests wait all the time, of 100 tenants and 1,000 adapters, beside as many that run as there are
places; who ends is replaced. `schedule_us`: putting one step together; `all_us`: also taking requests in,
counting what was computed, keeping blocks and ending requests. Both are medians over thousands of steps, of
this thread's processor time; `schedule_p10_us` is the step that the fewest others on the machine slowed. The
aim is 100 us for `schedule_us` of `fair`. Ends in one JSON line.
"""

import random
import time
from itertools import count
from typing import Any

import numpy as np

from toppings.core import Request
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.pages import PageAllocator
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.lab.script import finish, make_parser, parse
from toppings.sampling_params import SamplingParams
from toppings.sim.placement import AllResident

NUM_WAITING = 256
NUM_TENANTS, NUM_ADAPTERS = 100, 1000
NUM_PROMPT, NUM_OUTPUT = 128, 32
PAGE_SIZE = 16
STEP_S = 0.02


class World:
    def __init__(self, policy: str, max_num_seqs: int) -> None:
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=512,
            max_model_len=1024,
            max_adapter_wait_s=1.0,
            scheduling_policy=policy,
        )
        pages = PageAllocator(max_num_seqs * 16, PAGE_SIZE)
        self.scheduler = Scheduler(limits, pages, AllResident(), BlockHasher(PAGE_SIZE))
        self._random = random.Random(0)
        self._numbers = count()
        self._now = 0.0

    def fill(self) -> None:
        """Until so many wait as there shall be."""
        while len(self.scheduler.waiting) < NUM_WAITING:
            tenant = self._random.randrange(NUM_TENANTS)
            prompt = [self._random.randrange(32_000) for _ in range(NUM_PROMPT)]
            request = Request(
                f"request-{next(self._numbers)}",
                prompt,
                SamplingParams(max_tokens=NUM_OUTPUT),
                self._random.randrange(NUM_ADAPTERS),
                arrived_at=self._now,
                tenant=f"tenant {tenant}",
                weight=1.0 + tenant % 3,
            )
            self.scheduler.add(request)

    def step(self) -> tuple[float, float]:
        """Seconds of `schedule`, and of all."""
        scheduler, began_at = self.scheduler, time.thread_time()
        self.fill()
        started_at = time.thread_time()
        batch = scheduler.schedule(self._now)
        schedule_s = time.thread_time() - started_at
        drawing = [item.request for item in batch.items if item.needs_sample]
        scheduler.commit(batch)
        scheduler.cache.keep(batch.items)
        for request in drawing:
            request.output_token_ids.append(7)
            if len(request.output_token_ids) == NUM_OUTPUT:
                scheduler.finish(request)
        self._now += STEP_S
        return schedule_s, time.thread_time() - began_at


def measure(policy: str, max_num_seqs: int, num_steps: int) -> dict[str, float]:
    world = World(policy, max_num_seqs)
    for _ in range(num_steps // 4):
        world.step()
    times_us = np.array([world.step() for _ in range(num_steps)]) * 1e6
    world.scheduler.check_integrity()
    p10, p50 = np.percentile(times_us, (10, 50), axis=0)
    return {"schedule_us": float(p50[0]), "schedule_p10_us": float(p10[0]), "all_us": float(p50[1])}


def main() -> None:
    options = parse(make_parser(__doc__, "a few steps"))
    num_steps = 20 if options.toy else 3000
    results: dict[str, Any] = {}
    for max_num_seqs in (16, 64):
        rows = results[f"{max_num_seqs} places"] = {}
        for policy in ("fair", "fcfs"):
            row = rows[policy] = measure(policy, max_num_seqs, num_steps)
            print(f"{max_num_seqs} places  {policy:5s} " + "  ".join(f"{k} {v:7.1f}" for k, v in row.items()))
    finish(options, "scheduling_step", num_waiting=NUM_WAITING, places=results)


if __name__ == "__main__":
    main()
