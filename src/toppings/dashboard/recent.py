"""What happened in the last minutes: rates and latencies, in slots of some seconds.

Noting something costs about a microsecond and no memory, whether anybody looks or not. A latency is counted
in a bucket: buckets grow by a sixteenth of an octave, so that a percentile is told within 2.2 %.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLOT_S = 5
NUM_SLOTS = 60
"""Whole slots that are kept, beside the one that is being filled."""
WINDOW_SLOTS = 12
"""Of the percentiles that stand for now, beside the slot that is being filled."""
BUCKETS_PER_OCTAVE = 16
FLOOR_S = 1e-4
"""Latencies below it, and above 2^23 times it (14 minutes), are counted as those."""
NUM_BUCKETS = 23 * BUCKETS_PER_OCTAVE

TTFT, TPT = range(2)
LATENCIES = {"ttft": TTFT, "tpt": TPT}
TOKENS, PROMPT_TOKENS, ENDED = range(3)
COUNTS = {"tokens": TOKENS, "prompt_tokens": PROMPT_TOKENS, "requests": ENDED}


class Recent:
    """Used from one event loop only; `clock` is in seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.outcomes: Counter[str] = Counter()
        """Requests that have ended since the start, by how."""
        self._clock = clock
        self._started_at = clock()
        self._slot = int(self._started_at // SLOT_S)  # that is being filled
        self._counts = np.zeros((len(COUNTS), NUM_SLOTS + 1))
        self._latencies = np.zeros((len(LATENCIES), NUM_SLOTS + 1, NUM_BUCKETS), np.int64)

    def note_prompt(self, num_tokens: int) -> None:
        self._counts[PROMPT_TOKENS, self._column()] += num_tokens

    def note_tokens(self, num_tokens: int) -> None:
        """Drawn."""
        self._counts[TOKENS, self._column()] += num_tokens

    def note_ttft(self, seconds: float) -> None:
        self._latencies[TTFT, self._column(), _bucket(seconds)] += 1

    def note_tpt(self, seconds: float) -> None:
        self._latencies[TPT, self._column(), _bucket(seconds)] += 1

    def note_end(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._counts[ENDED, self._column()] += 1

    # --- looked at ---

    def rates(self) -> dict[str, float]:
        """By the second, over the slot that is being filled and the one before it."""
        columns, now = self._last(1), self._clock()
        seconds = min(SLOT_S + now - self._slot * SLOT_S, now - self._started_at)
        sums = self._counts[:, columns].sum(axis=1) / max(1.0, seconds)
        return {f"{name}_per_s": _rounded(sums[row]) for name, row in COUNTS.items()}

    def latency(self) -> dict[str, dict[str, float | None]]:
        """Of the last minute: `num` latencies, and their `p50_ms` and `p99_ms`, None where there are none."""
        columns = self._last(WINDOW_SLOTS)
        told = {}
        for name, row in LATENCIES.items():
            counts = self._latencies[row, columns].sum(axis=0)
            p50_ms, p99_ms = _percentiles_ms(counts[None])
            told[name] = {"num": int(counts.sum()), "p50_ms": p50_ms[0], "p99_ms": p99_ms[0]}
        return told

    def history(self) -> dict[str, Any]:
        """Of the whole slots, the oldest first, `slot_s` seconds each: rates and percentiles."""
        columns = self._last(NUM_SLOTS)[:-1]
        told: dict[str, Any] = {"slot_s": SLOT_S}
        for name, row in COUNTS.items():
            told[f"{name}_per_s"] = [_rounded(count / SLOT_S) for count in self._counts[row, columns]]
        for name, row in LATENCIES.items():
            told[f"{name}_p50_ms"], told[f"{name}_p99_ms"] = _percentiles_ms(self._latencies[row, columns])
        return told

    def _last(self, num: int) -> NDArray[np.int64]:
        """Columns of so many whole slots and the one that is being filled, the oldest first."""
        self._column()
        return (self._slot + np.arange(-num, 1)) % (NUM_SLOTS + 1)

    def _column(self) -> int:
        """Of this moment's slot; what has become too old is forgotten."""
        slot = int(self._clock() // SLOT_S)
        if slot != self._slot:
            num_new = min(slot - self._slot, NUM_SLOTS + 1)
            columns = (slot - np.arange(num_new)) % (NUM_SLOTS + 1)
            self._counts[:, columns] = 0
            self._latencies[:, columns] = 0
            self._slot = slot
        return slot % (NUM_SLOTS + 1)


def _bucket(seconds: float) -> int:
    octaves = math.log2(max(seconds, FLOOR_S) / FLOOR_S)
    return min(int(octaves * BUCKETS_PER_OCTAVE), NUM_BUCKETS - 1)


def _percentiles_ms(counts: NDArray[np.int64]) -> tuple[list[float | None], list[float | None]]:
    """p50 and p99 of each row [N, NUM_BUCKETS]: the middle of the bucket in which they lie."""
    sums = counts.cumsum(axis=1)
    totals = sums[:, -1]
    told = []
    for share in (0.50, 0.99):
        buckets = (sums >= np.ceil(share * totals)[:, None]).argmax(axis=1)
        values = 1e3 * FLOOR_S * 2 ** ((buckets + 0.5) / BUCKETS_PER_OCTAVE)
        told.append([_rounded(v) if total else None for v, total in zip(values, totals, strict=True)])
    return told[0], told[1]


def _rounded(value: float) -> float:
    """Three digits: more would be another text each time, and nobody reads them."""
    return float(f"{value:.3g}")
