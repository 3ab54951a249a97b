"""What a step takes, from a performance model: its own prediction, on running sums instead of arrays."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    GATHERED_TOKENS,
    PADDED_RANKS,
    RANK_SUM,
    SEQUENCES,
    STEPS,
    TOKENS,
    PerfModel,
)
from toppings.core import BatchItem
from toppings.sim.request import SimRequest
from toppings.sim.settings import NS_PER_MS


@dataclass(slots=True)
class DecodeSums:
    """Of requests that decode together: how many, of what ranks, for which adapters."""

    num: int = 0
    rank_sum: int = 0
    distinct_rank_sum: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    adapters: dict[int, int] = field(default_factory=dict)

    def add(self, request: SimRequest) -> None:
        rank, adapter_id = request.rank, request.adapter_id
        self.num += 1
        self.rank_sum += rank
        self.ranks[rank] = self.ranks.get(rank, 0) + 1
        if adapter_id is not None:
            count = self.adapters.get(adapter_id, 0)
            self.adapters[adapter_id] = count + 1
            if not count:
                self.distinct_rank_sum += rank

    def remove(self, request: SimRequest) -> None:
        rank, adapter_id = request.rank, request.adapter_id
        self.num -= 1
        self.rank_sum -= rank
        if self.ranks[rank] > 1:
            self.ranks[rank] -= 1
        else:
            del self.ranks[rank]
        if adapter_id is not None:
            if self.adapters[adapter_id] > 1:
                self.adapters[adapter_id] -= 1
            else:
                del self.adapters[adapter_id]
                self.distinct_rank_sum -= rank


class StepCosts:
    """`PerfModel.step_ms` split so that runs of decode steps, which differ in their context alone, are
    cheap.
    """

    def __init__(self, model: PerfModel) -> None:
        self._decode = tuple(float(c) for c in model.decode.vector)
        self._prefill = tuple(float(c) for c in model.prefill.vector)
        self.decode_context_ms = self._decode[CONTEXT_TOKENS]
        self.shared_ms = model.shared_ms

    def decode_ms(self, sums: DecodeSums) -> float:
        """A decode step of these requests but for its context: add `decode_context_ms` per attended key."""
        decode, num = self._decode, sums.num
        if not num:
            return 0.0
        padded = num * max(sums.ranks)
        return (
            decode[STEPS]
            + (decode[TOKENS] + decode[SEQUENCES]) * num
            + decode[PADDED_RANKS] * padded
            + decode[RANK_SUM] * sums.rank_sum
            + decode[DISTINCT_RANK_SUM] * sums.distinct_rank_sum
        )

    def prefill_ms(self, items: Iterable[BatchItem]) -> float:
        """A step of prefill chunks alone."""
        tokens, rank_tokens, max_rank, attended, num, gathered = 0, 0, 0, 0.0, 0, 0
        distinct: dict[int | None, int] = {}
        for item in items:
            request, num_tokens = item.request, item.num_tokens
            assert isinstance(request, SimRequest)
            rank = request.rank
            tokens += num_tokens
            rank_tokens += num_tokens * rank
            max_rank = max(max_rank, rank)
            attended += num_tokens * (request.num_computed_tokens + (num_tokens + 1) / 2)
            distinct[request.adapter_id] = rank
            num += 1
            gathered += request.num_computed_tokens if num_tokens > 1 else 0
        prefill = self._prefill
        return (
            prefill[STEPS]
            + prefill[TOKENS] * tokens
            + prefill[PADDED_RANKS] * (tokens * max_rank)
            + prefill[RANK_SUM] * rank_tokens
            + prefill[DISTINCT_RANK_SUM] * sum(distinct.values())
            + prefill[CONTEXT_TOKENS] * attended
            + prefill[SEQUENCES] * num
            + prefill[GATHERED_TOKENS] * gathered
        )


def to_ns(ms: float) -> int:
    """Virtual time is whole nanoseconds, so that a run of equal steps is exactly a multiple of one.

    No step takes less than one, whatever a fitted model says.
    """
    return max(1, round(ms * NS_PER_MS))
