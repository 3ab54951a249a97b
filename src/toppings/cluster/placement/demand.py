"""How much each adapter is asked for, estimated online from the requests that are placed.

Counts decay exponentially: of a count with time constant tau, count / tau is the rate. Two constants tell a
change from chance: `SLOW_S` for what lasts, `FAST_S` for what begins.
"""

import math
from dataclasses import dataclass

import numpy as np

from toppings.cluster.perf_model import FloatArray
from toppings.cluster.snapshot import RequestSnapshot

SLOW_S, FAST_S = 60.0, 10.0
CERTAINTY = 2.0
"""Standard deviations by which the fast rate must be above chance before it counts."""
FORGOTTEN_COUNT = 1e-3
"""An adapter with a slow count below this is forgotten: some seven time constants after its last request."""

SLOW, FAST, PROMPT, RESPONSE, AT, RANK, BYTES = range(7)
"""Columns: decayed counts, decayed sums of tokens (as slow), when they were last brought up to date, and
what the adapter is."""


BASE = ""
"""Stands for the base model: no adapter has this name."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Of A adapters, and of the base model under the name `BASE` where it is asked for: `names`; arrays
    float64 [A]: `rates` in requests/s, `prompt_tokens` and `response_tokens` of a request, `ranks`,
    `num_bytes` (0: unknown).
    """

    names: list[str]
    rates: FloatArray
    prompt_tokens: FloatArray
    response_tokens: FloatArray
    ranks: FloatArray
    num_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.names)

    def of_adapters(self) -> "Demand":
        """Without that for the base model."""
        if BASE not in self.names:
            return self
        row = self.names.index(BASE)
        columns = (self.rates, self.prompt_tokens, self.response_tokens, self.ranks, self.num_bytes)
        return Demand(self.names[:row] + self.names[row + 1 :], *(np.delete(each, row) for each in columns))


class DemandMeter:
    """Counts requests; a request costs a few scalar operations, `demand` a few passes over columns.

    `ticks_per_s`: in the unit of its `now`.
    """

    def __init__(self, ticks_per_s: float = 1.0) -> None:
        self._s_per_tick = 1.0 / ticks_per_s
        self._rows: dict[str, int] = {}
        self._columns: FloatArray = np.zeros((7, 64))
        self._cells = self._map_cells()
        self._began_at: float | None = None

    def _map_cells(self) -> list["memoryview[float]"]:
        """Plain numbers are read and written much faster than elements of an array."""
        return [memoryview(column) for column in self._columns]

    def note(self, request: RequestSnapshot, now: float) -> None:
        """A request was placed."""
        adapter = request.adapter or BASE
        at = now * self._s_per_tick
        if self._began_at is None:
            self._began_at = at
        row = self._rows.get(adapter)
        if row is None:
            row = self._new_row(adapter, at)
        slow, fast, prompt, response, updated, rank, num_bytes = self._cells
        elapsed = max(0.0, at - updated[row])  # of instants that do not ascend, exp could overflow
        kept = math.exp(-elapsed / SLOW_S)
        slow[row] = slow[row] * kept + 1.0
        fast[row] = fast[row] * math.exp(-elapsed / FAST_S) + 1.0
        prompt[row] = prompt[row] * kept + request.prompt_tokens
        response[row] = response[row] * kept + request.response_tokens
        updated[row] = at
        rank[row] = request.rank
        num_bytes[row] = request.adapter_bytes

    def _new_row(self, adapter: str, at: float) -> int:
        if len(self._rows) == self._columns.shape[1]:
            self._drop_forgotten(at)
        row = len(self._rows)
        if row == self._columns.shape[1]:
            self._columns = np.append(self._columns, np.zeros_like(self._columns), axis=1)
            self._cells = self._map_cells()
        self._rows[adapter] = row
        self._cells[AT][row] = at
        return row

    def demand(self, now: float) -> Demand:
        """As of now; adapters that nobody has asked for in a long time are forgotten."""
        at = now * self._s_per_tick
        self._drop_forgotten(at)
        columns = self._columns[:, : len(self._rows)]
        elapsed = at - columns[AT]
        slow, fast = columns[SLOW] * np.exp(-elapsed / SLOW_S), columns[FAST] * np.exp(-elapsed / FAST_S)
        age = max(at - (at if self._began_at is None else self._began_at), 1.0)
        certain = fast - CERTAINTY * np.sqrt(fast)
        rates = np.maximum(slow / _seen_s(SLOW_S, age), certain / _seen_s(FAST_S, age))
        tokens = columns[[PROMPT, RESPONSE]] / columns[SLOW]
        return Demand(
            list(self._rows), rates, tokens[0], tokens[1], columns[RANK].copy(), columns[BYTES].copy()
        )

    def _drop_forgotten(self, at: float) -> None:
        columns = self._columns[:, : len(self._rows)]
        is_kept = columns[SLOW] * np.exp((columns[AT] - at) / SLOW_S) >= FORGOTTEN_COUNT
        if is_kept.all():
            return
        self._rows = {
            name: row
            for row, name in enumerate(
                n for n, kept in zip(self._rows, is_kept.tolist(), strict=True) if kept
            )
        }
        kept = self._columns[:, : len(is_kept)][:, is_kept]
        self._columns = np.zeros((len(kept), max(64, 2 * kept.shape[1])))
        self._columns[:, : kept.shape[1]] = kept
        self._cells = self._map_cells()


def _seen_s(constant_s: float, age_s: float) -> float:
    """The time that a decayed count stands for, `age_s` after counting began."""
    return constant_s * -math.expm1(-age_s / constant_s)
