"""Which batches to time, so that each feature of a step's cost varies by itself.

Sizes, ranks, contexts and how many rows share an adapter are drawn independently of each other: a feature
that always came along with another could not be told from it by any fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from toppings.cluster.batch_row import BatchRow

Rows = tuple[BatchRow, ...]

DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PREFILL_SIZES = (1, 1, 2, 4, 8)
MIN_CONTEXT = 16
MAX_CONTEXT = 2048
"""A few contexts far beyond the others would make up most of a fit's variance."""
MIN_PREFILL_TOKENS = 16
CHUNK_SHARE = 0.25  # of the prefill batches continue prompts of which a part is cached
BASE_SHARE = 0.25  # of the batches have rows without an adapter among the others


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step can hold: sequences, new tokens, tokens of one sequence, tokens of all in the cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_cached_tokens: int

    def max_context(self, num_seqs: int) -> int:
        """Tokens of each of so many sequences that may be cached; a quarter is left for those to come."""
        return min(MAX_CONTEXT, self.max_model_len * 3 // 4, self.max_cached_tokens // num_seqs)


def decode_batches(adapters: Mapping[str, int], limits: StepLimits, num: int, rng: Generator) -> list[Rows]:
    """`num` batches of single tokens; `adapters` are the names that may be used, with their ranks."""
    smallest = MIN_CONTEXT * 2
    fitting = (
        n for n in DECODE_SIZES if n <= limits.max_num_seqs and n * smallest <= limits.max_cached_tokens
    )
    sizes = list(fitting) or [1]
    return [_decode_batch(adapters, limits, sizes[i % len(sizes)], rng) for i in range(num)]


def _decode_batch(adapters: Mapping[str, int], limits: StepLimits, size: int, rng: Generator) -> Rows:
    most = max(2, limits.max_context(size))
    mean = _log_uniform(min(MIN_CONTEXT, most), most, rng)
    contexts = np.clip(mean * rng.uniform(0.5, 1.5, size), 2, most).astype(int)
    names = _pick_adapters(list(adapters), adapters, size, rng)
    return tuple(_row(name, adapters, 1, int(context)) for name, context in zip(names, contexts, strict=True))


def prefill_batches(
    adapters: Mapping[str, int], limits: StepLimits, num: int, max_tokens: int, rng: Generator
) -> list[Rows]:
    """`num` batches of up to `max_tokens` prompt tokens in all, of one sequence or several."""
    most = min(max_tokens, limits.max_num_batched_tokens, limits.max_context(1))
    return [_prefill_batch(adapters, limits, most, rng) for _ in range(num)]


def _prefill_batch(adapters: Mapping[str, int], limits: StepLimits, most: int, rng: Generator) -> Rows:
    total = _log_uniform(min(MIN_PREFILL_TOKENS, most), most, rng)
    size = min(int(rng.choice(PREFILL_SIZES)), limits.max_num_seqs, max(1, total // 2))
    num_tokens = max(2, total // size)
    room = limits.max_context(size) - num_tokens
    has_context = rng.random() < CHUNK_SHARE and room > MIN_CONTEXT
    context = _log_uniform(MIN_CONTEXT, room, rng) if has_context else 0
    names = _pick_adapters(list(adapters), adapters, size, rng)
    return tuple(_row(name, adapters, num_tokens, context) for name in names)


def _pick_adapters(
    names: Sequence[str], ranks: Mapping[str, int], size: int, rng: Generator
) -> list[str | None]:
    """One adapter per row: of one rank or of several, few of them shared or all distinct."""
    if rng.random() < 0.5:
        rank = rng.choice(sorted({ranks[name] for name in names}))
        names = [name for name in names if ranks[name] == rank]
    num_distinct = _log_uniform(1, min(size, len(names)), rng)
    distinct = [str(name) for name in rng.choice(list(names), num_distinct, replace=False)]
    picked: list[str | None] = [*distinct, *map(str, rng.choice(distinct, size - num_distinct))]
    if rng.random() < BASE_SHARE:
        share = rng.random()
        picked = [None if rng.random() < share else name for name in picked]
    return picked


def _row(name: str | None, ranks: Mapping[str, int], num_tokens: int, num_context: int) -> BatchRow:
    return BatchRow(0 if name is None else ranks[name], name, num_tokens, num_context)


def _log_uniform(low: int, high: int, rng: Generator) -> int:
    """`low` to `high`, both included, each factor between them as likely as any other."""
    return int(min(high, np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
