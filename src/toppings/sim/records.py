"""What a simulation leaves: three instants per request, totals per server; checked, then summed up."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from toppings.sim.instance import Instance
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.trace import Tenants, Trace

NEVER = -1


@dataclass(frozen=True, slots=True)
class InstanceTotals:
    """Of one server; times in seconds. `exposed_s` is the part of `busy_s` that waited for adapters."""

    busy_s: float
    exposed_s: float
    num_steps: int
    num_tokens: int
    num_preemptions: int
    num_drains: int
    num_adapter_hits: int
    num_adapter_loads: int
    num_queried_tokens: int  # of prompts that may share some
    num_cached_tokens: int

    @classmethod
    def of(cls, instance: Instance, now: int) -> "InstanceTotals":
        under_way = max(0, now - instance.run.begin_at) if instance.run is not None else 0
        return cls(
            busy_s=(instance.busy_time + under_way) / NS_PER_S,
            exposed_s=instance.exposed_time / NS_PER_S,
            num_steps=instance.num_steps,
            num_tokens=instance.num_tokens,
            num_preemptions=instance.scheduler.num_preemptions,
            num_drains=instance.scheduler.draining.num_drains,
            num_adapter_hits=instance.placement.num_hits,
            num_adapter_loads=instance.placement.num_loads,
            num_queried_tokens=instance.scheduler.cache.num_queries,
            num_cached_tokens=instance.scheduler.cache.num_hits,
        )


@dataclass(frozen=True, eq=False)
class SimResult:
    """Arrays over the N requests that arrived: instants in ns (int64, -1 where it never came), `rows` int32
    of the server, `num_tokens` int32 to generate, `num_prompt_tokens` int32, `ranks` int32, `is_rejected`
    bool. `num_breaking`: requests that the policy placed knowing that no server was within the SLO.
    `num_moves`: of each plan, homes that adapters did not have in the one before. `tenants`: whose they were.
    """

    config: SimConfig
    arrived_at: NDArray[np.int64]
    first_token_at: NDArray[np.int64]
    ended_at: NDArray[np.int64]
    rows: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    num_prompt_tokens: NDArray[np.int32]
    ranks: NDArray[np.int32]
    is_rejected: NDArray[np.bool_]
    num_present: int
    num_breaking: int
    wall_s: float
    instances: list[InstanceTotals] = field(default_factory=list)
    num_moves: list[int] = field(default_factory=list)
    tenants: Tenants | None = None

    @property
    def has_ended(self) -> NDArray[np.bool_]:
        ended: NDArray[np.bool_] = self.ended_at != NEVER
        return ended

    def check(self) -> None:
        """Conservation. Raises AssertionError where it is broken: a fault of the simulator."""
        has_ended, has_token = self.has_ended, self.first_token_at != NEVER
        num_ended, num_rejected = int(has_ended.sum()), int(self.is_rejected.sum())
        assert len(self.arrived_at) == num_ended + num_rejected + self.num_present, "a request is lost"
        assert not (has_ended & self.is_rejected).any(), "a request was rejected and ended"
        assert (self.first_token_at > self.arrived_at)[has_token].all(), "a token came before its prefill"
        assert has_token[has_ended].all(), "a request ended without a token"
        assert (self.ended_at >= self.first_token_at)[has_ended].all(), (
            "a request ended before its first token"
        )
        num_generated = sum(instance.num_tokens for instance in self.instances)
        assert num_generated >= self.num_tokens[has_ended].sum(), "more tokens arrived than were generated"
        for instance in self.instances:
            assert 0 <= instance.exposed_s <= instance.busy_s + 1e-9, "more time was waited than was spent"
            assert instance.busy_s <= self.wall_s + 1e-9, "a server was busy for longer than time passed"


class Records:
    """Filled in as things happen; `nums_to_generate` are the response tokens of each request."""

    def __init__(self, nums_to_generate: list[int]) -> None:
        num_requests = len(nums_to_generate)
        self.first_token_at = [NEVER] * num_requests
        self.ended_at = [NEVER] * num_requests
        self.rows = [NEVER] * num_requests
        self.nums_to_generate = nums_to_generate
        self.is_rejected = [False] * num_requests
        self.num_moves: list[int] = []

    def result(
        self,
        config: SimConfig,
        trace: Trace,
        *,
        arrivals_ns: Sequence[int],
        num_arrived: int,
        num_present: int,
        num_breaking: int,
        wall_time: int,
        totals: list[InstanceTotals],
    ) -> SimResult:
        """Of the first `num_arrived` requests; checked."""
        n = num_arrived
        rows = np.array(self.rows[:n], dtype=np.int32)
        nums_to_generate = np.array(self.nums_to_generate[:n], dtype=np.int32)
        result = SimResult(
            config=config,
            arrived_at=np.array(arrivals_ns[:n], dtype=np.int64),
            first_token_at=np.array(self.first_token_at[:n], dtype=np.int64),
            ended_at=np.array(self.ended_at[:n], dtype=np.int64),
            rows=rows,
            num_tokens=np.where(rows == NEVER, 0, nums_to_generate).astype(np.int32),
            num_prompt_tokens=trace.prompt_tokens[:n],
            ranks=trace.ranks[trace.adapters[:n]],
            is_rejected=np.array(self.is_rejected[:n], dtype=np.bool_),
            num_present=num_present,
            num_breaking=num_breaking,
            wall_s=wall_time / NS_PER_S,
            instances=totals,
            num_moves=self.num_moves,
            tenants=None
            if trace.tenants is None
            else replace(trace.tenants, indices=trace.tenants.indices[:n]),
        )
        result.check()
        return result
