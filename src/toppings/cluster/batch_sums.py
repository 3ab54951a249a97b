"""The features of one batch as running sums: plain numbers, which change faster than elements of an array."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class BatchSums:
    """`ranks` and `adapters` count the requests of each rank and of each adapter, by name or by number;
    `adapter_bytes` is what distinct adapters take together.
    """

    sequences: int = 0
    tokens: float = 0.0
    rank_sum: float = 0.0
    distinct_rank_sum: float = 0.0
    context_tokens: float = 0.0
    adapter_bytes: float = 0.0
    max_rank: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    adapters: dict[Any, int] = field(default_factory=dict)
    _bytes: dict[Any, int] = field(default_factory=dict, compare=False)

    def add(self, rank: int, adapter: Hashable, tokens: int, context: float, adapter_bytes: int = 0) -> None:
        """A request of which so many tokens are in the batch, attending to `context` keys."""
        self.sequences += 1
        self.tokens += tokens
        self.rank_sum += tokens * rank
        self.context_tokens += context
        self.ranks[rank] = self.ranks.get(rank, 0) + 1
        self.max_rank = max(self.max_rank, rank)
        if adapter is not None:
            count = self.adapters.get(adapter, 0)
            self.adapters[adapter] = count + 1
            if not count:
                self.distinct_rank_sum += rank
                self.adapter_bytes += adapter_bytes
                self._bytes[adapter] = adapter_bytes

    def remove(self, rank: int, adapter: Hashable, tokens: int, context: float) -> None:
        """The request leaves; what it counts for by now."""
        self.sequences -= 1
        self.tokens -= tokens
        self.rank_sum -= tokens * rank
        self.context_tokens -= context
        if (count := self.ranks[rank]) > 1:
            self.ranks[rank] = count - 1
        else:
            del self.ranks[rank]
            self.max_rank = max(self.ranks, default=0)
        if adapter is not None:
            if (count := self.adapters[adapter]) > 1:
                self.adapters[adapter] = count - 1
            else:
                del self.adapters[adapter]
                self.distinct_rank_sum -= rank
                self.adapter_bytes -= self._bytes.pop(adapter)

    def features(self) -> tuple[float, ...]:
        """In the order of `perf_model.FEATURES`; all zero for an empty batch. Nothing is cached before: no
        `gathered_tokens`.
        """
        return (
            1.0 if self.sequences else 0.0,
            self.tokens,
            self.tokens * self.max_rank,
            self.rank_sum,
            self.distinct_rank_sum,
            self.context_tokens,
            self.sequences,
            0.0,
        )
