"""When an adapter is to be folded into the base model's weights, and when it is to be taken out again.

What a step would save by folding an adapter, or saves because it is folded, follows from its rows and the
measured costs: a pass of the adapter's products where rows of it are there, less one where rows of others
are, which then take its product out again. The sums of what was missed, and of what was lost, start again
from 0 wherever they would fall below it (CUSUM, Page 1954); a switch is worth it when such a sum has reached
what switching takes. So switching takes no longer than what not switching has taken by then: loads that
change sides faster than that cause none. Those that change just as fast as it would be wrong to follow them
are met with caution: a folding that did not pay doubles what has to be missed before the next one.

Knows no clock and no torch: `now` is an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MIN_SHARE = 0.6
"""Of all rows, that are an adapter's before it is looked at: half of them would win nothing."""
MIN_GAIN = 0.001
"""Of the time that steps take, however busy the machine is: less is not worth the memory."""
MAX_CAUTION = 64.0
_MAX_EXPONENT = 64
_MIN_WEIGHT = 2.0**-20


@dataclass(frozen=True, slots=True)
class FoldCosts:
    """Seconds. `pass_s`: an adapter's products in all layers for a few rows; `row_s`: for each row more;
    `switch_s`: folding it in and taking it out again."""

    pass_s: float
    row_s: float
    switch_s: float

    def saved_s(self, num_own: int, num_others: int) -> float:
        """What folding saves of a step with so many rows of the adapter and of others."""
        return self.pass_s * ((num_own > 0) - (num_others > 0)) + self.row_s * (num_own - num_others)


class FoldPolicy:
    """`half_life_s`: what a step counts for after that time, in shares and in the gain that is told."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._since: float | None = None  # when a step's weight was 1
        self._rows: dict[int | None, float] = {}  # weighted, by adapter
        self._num_rows = 0.0
        self._most: int | None = None  # who has most of them
        self._saved_s = 0.0  # weighted, of the priced adapter
        self._busy_s = 0.0  # since that was priced
        self._priced: tuple[int, FoldCosts] | None = None
        self._due_s = 0.0  # of what was missed, or is being lost
        self._won_s = 0.0  # since it was folded
        self._caution = 1.0
        self.target: int | None = None
        """The adapter that is to be folded."""

    @property
    def candidate(self) -> int | None:
        """The one with most of the rows lately."""
        return self._most if self.share_of(self._most) >= MIN_SHARE else None

    @property
    def priced(self) -> int | None:
        return None if self._priced is None else self._priced[0]

    @property
    def gain(self) -> float:
        """What folding the priced adapter saves, as a share of the steps' time."""
        return self._saved_s / self._busy_s if self._busy_s else 0.0

    def share_of(self, adapter_id: int | None) -> float:
        """Of the rows of late steps."""
        return self._rows.get(adapter_id, 0.0) / self._num_rows if self._num_rows else 0.0

    def price(self, adapter_id: int, costs: FoldCosts) -> None:
        """From now on it is the one that is looked at. None is to be folded."""
        assert self.target is None
        self._priced = (adapter_id, costs)
        self._due_s = self._saved_s = self._busy_s = 0.0

    def leave(self) -> None:
        """None is to be folded now, whatever it would save; what follows is looked at anew."""
        self.target, self._due_s = None, 0.0

    def note_step(self, rows: Mapping[int | None, int], step_s: float, now: float) -> None:
        """A step with these rows by adapter, None the base model, has taken `step_s`."""
        weight = self._weight(now)
        for adapter_id, num_rows in rows.items():
            self._rows[adapter_id] = self._rows.get(adapter_id, 0.0) + weight * num_rows
            self._num_rows += weight * num_rows
            if self._rows[adapter_id] > self._rows.get(self._most, 0.0):
                self._most = adapter_id
        if self._priced is None:
            return
        adapter_id, costs = self._priced
        num_own = rows.get(adapter_id, 0)
        saved_s = costs.saved_s(num_own, sum(rows.values()) - num_own)
        self._saved_s += weight * saved_s
        self._busy_s += weight * step_s
        self._won_s += saved_s
        self._due_s = max(0.0, self._due_s + (saved_s if self.target is None else -saved_s))
        self._decide(adapter_id, costs)

    def _decide(self, adapter_id: int, costs: FoldCosts) -> None:
        if self.target is not None and self._due_s >= costs.switch_s:
            has_paid = self._won_s >= costs.switch_s
            self._caution = 1.0 if has_paid else min(2 * self._caution, MAX_CAUTION)
            self.leave()
        elif self.target is None and self._due_s >= self._caution * costs.switch_s:
            self._fold(adapter_id)

    def _fold(self, adapter_id: int) -> None:
        if self.candidate == adapter_id and self.gain >= MIN_GAIN:
            self.target, self._due_s, self._won_s = adapter_id, 0.0, 0.0

    def _weight(self, now: float) -> float:
        """Later steps weigh more, which is the same as earlier ones weighing less."""
        if self._since is None:
            self._since = now
        exponent = (now - self._since) / self._half_life_s
        if exponent > _MAX_EXPONENT:
            self._fade(2.0 ** -min(exponent, 1000.0))
            self._since, exponent = now, 0.0
        return float(2.0**exponent)

    def _fade(self, factor: float) -> None:
        """What counts for next to nothing is forgotten."""
        self._rows = {a: n * factor for a, n in self._rows.items() if n * factor > _MIN_WEIGHT}
        self._num_rows = sum(self._rows.values())
        self._saved_s *= factor
        self._busy_s *= factor
