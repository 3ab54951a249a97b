"""What a step takes, from a performance model: its own prediction, on running sums instead of arrays."""

from collections.abc import Iterable

from toppings.cluster.batch_sums import BatchSums
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
        """A step of prefill chunks alone; without `BatchSums`, whose counts nobody would look at again."""
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
