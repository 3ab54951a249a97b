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
        rank, adapter_id, ranks, adapters = request.rank, request.adapter_id, self.ranks, self.adapters
        self.num -= 1
        self.rank_sum -= rank
        if (count := ranks[rank]) > 1:
            ranks[rank] = count - 1
        else:
            del ranks[rank]
        if adapter_id is not None:
            if (count := adapters[adapter_id]) > 1:
                adapters[adapter_id] = count - 1
            else:
                del adapters[adapter_id]
                self.distinct_rank_sum -= rank


class StepCosts:
    """`PerfModel.step_ms` split so that runs of decode steps, which differ in their context alone, are
    cheap.
    """

    def __init__(self, model: PerfModel) -> None:
        decode = model.decode.vector.tolist()
        self._per_step, self._per_sequence = decode[STEPS], decode[TOKENS] + decode[SEQUENCES]
        self._per_padded_rank, self._per_rank = decode[PADDED_RANKS], decode[RANK_SUM]
        self._per_distinct_rank = decode[DISTINCT_RANK_SUM]
        self._prefill: tuple[float, ...] = tuple(model.prefill.vector.tolist())
        self.decode_context_ms: float = decode[CONTEXT_TOKENS]
        self.shared_ms = model.shared_ms

    def decode_ms(self, sums: DecodeSums) -> float:
        """A decode step of these requests but for its context: add `decode_context_ms` per attended key."""
        num = sums.num
        if not num:
            return 0.0
        ms: float = (
            self._per_step
            + self._per_sequence * num
            + self._per_padded_rank * (num * max(sums.ranks))
            + self._per_rank * sums.rank_sum
            + self._per_distinct_rank * sums.distinct_rank_sum
        )
        return ms

    def prefill_ms(self, items: Iterable[BatchItem]) -> float:
        """A step of prefill chunks alone."""
        tokens, rank_tokens, max_rank, attended, num, gathered = 0, 0, 0, 0.0, 0, 0
        distinct: dict[int | None, int] = {}
        for item in items:
            request, num_tokens = item.request, item.num_tokens
            assert isinstance(request, SimRequest)
            rank, num_computed = request.rank, request.num_computed_tokens
            tokens += num_tokens
            rank_tokens += num_tokens * rank
            max_rank = max(max_rank, rank)
            attended += num_tokens * (num_computed + (num_tokens + 1) / 2)
            distinct[request.adapter_id] = rank
            num += 1
            if num_tokens > 1:
                gathered += num_computed
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
    ns = round(ms * NS_PER_MS)
    return ns if ns > 1 else 1
