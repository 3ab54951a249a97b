"""Graphs without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class FakeGraph:
    """Runs the captured work again: the same tensors, and whatever lists of numbers it was captured with."""

    run: Callable[[], None]
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.run()


@dataclass
class FakeGraphs:
    graphs: list[FakeGraph] = field(default_factory=list)

    def capture(self, run: Callable[[], None]) -> FakeGraph:
        with torch.inference_mode():
            run()
        self.graphs.append(FakeGraph(run))
        return self.graphs[-1]
