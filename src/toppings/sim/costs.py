"""What a step takes, from a performance model: its own prediction, on running sums instead of arrays."""

from collections.abc import Iterable
from operator import mul

from toppings.cluster.batch_sums import BatchSums
from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
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

    def decode_ms(self, sums: BatchSums) -> float:
        """A decode step of these requests but for its context: add `decode_context_ms` per attended key."""
        num = sums.sequences
        if not num:
            return 0.0
        ms: float = (
            self._per_step
            + self._per_sequence * num
            + self._per_padded_rank * (num * sums.max_rank)
            + self._per_rank * sums.rank_sum
            + self._per_distinct_rank * sums.distinct_rank_sum
        )
        return ms

    def prefill_ms(self, items: Iterable[BatchItem]) -> float:
        """A step of prefill chunks alone."""
        sums = BatchSums()
        for item in items:
            request, num_tokens = item.request, item.num_tokens
            assert isinstance(request, SimRequest)
            num_computed = request.num_computed_tokens
            attended = num_tokens * (num_computed + (num_tokens + 1) / 2)
            sums.add(request.rank, request.adapter_id, num_tokens, attended)
            if num_tokens > 1:
                sums.gathered_tokens += num_computed
        ms: float = sum(map(mul, self._prefill, sums.features()))
        return ms


def to_ns(ms: float) -> int:
    """Virtual time is whole nanoseconds, so that a run of equal steps is exactly a multiple of one.

    No step takes less than one, whatever a fitted model says.
    """
    ns = round(ms * NS_PER_MS)
    return ns if ns > 1 else 1
