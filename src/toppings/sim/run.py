"""Steps under way on an instance: one, or a run of decode steps that differ in nothing but their context."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toppings.core import Batch


@dataclass(slots=True)
class Run:
    """`num_steps` steps from `begin_at` on, ns. Each takes `step_time`, or where `ends` [num_steps] is set,
    step n ends so many ns after the beginning."""

    begin_at: int
    num_steps: int
    step_time: int
    batch: Batch | None = None
    ends: NDArray[np.int64] | None = None

    @property
    def end_at(self) -> int:
        if self.ends is None:
            return self.begin_at + self.num_steps * self.step_time
        return self.begin_at + int(self.ends[self.num_steps - 1])

    def num_done_by(self, at: int) -> int:
        """Steps that have ended by an instant."""
        if self.ends is None:
            return min(self.num_steps, (at - self.begin_at) // self.step_time)
        return int(np.searchsorted(self.ends[: self.num_steps], at - self.begin_at, side="right"))

    def cut(self, at: int) -> bool:
        """End with the step that is under way at an instant, or ends right then; False where it does so
        anyway.
        """
        if self.ends is None:
            num_before = -(-(at - self.begin_at) // self.step_time) - 1
        else:
            num_before = int(np.searchsorted(self.ends[: self.num_steps], at - self.begin_at, side="left"))
        if num_before + 1 >= self.num_steps:
            return False
        self.num_steps = max(1, num_before + 1)
        return True
