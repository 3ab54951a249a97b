"""Another policy over a few candidates drawn for each request: deciding costs the same in any fleet.

Drawing two and taking the better one already evens out load (Mitzenmacher, IEEE TPDS 2001: the power of two
choices), and routers that know the fleet's state only from a while ago do not all rush to the one server that
was idle then.
"""

from dataclasses import replace
from random import Random as Generator

import numpy as np

from toppings.cluster.instances import Instances, IntArray
from toppings.cluster.policies.base import Policy
from toppings.cluster.snapshot import Choice, Move, RequestSnapshot

NUM_DRAWS_PER_CANDIDATE = 4
"""Rows drawn, closed ones among them, before all the open rows are looked for."""


class Sampled(Policy):
    """`policy` decides among `settings.candidates` open instances; what it migrates is among all of them."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.settings)
        self.policy = policy
        self.rule = f"of {self.settings.candidates} open servers, drawn for each request: {policy.rule}"
        self._generator = Generator(f"{policy.settings.seed} candidates")

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        if len(instances) <= self.settings.candidates:
            return self.policy.choose(request, instances)
        rows = self._draw(instances)
        choice = self.policy.choose(request, instances.take(rows))
        if choice is None:
            return None
        return replace(choice, row=int(rows[choice.row]))

    def migrations(self, instances: Instances) -> list[Move]:
        return self.policy.migrations(instances)

    @property
    def migrates(self) -> bool:
        return self.policy.migrates

    def _draw(self, instances: Instances) -> IntArray:
        """Rows of open instances, each as likely as another; fewer where there are no more. Where nearly all
        are open, as is usual, only those that are drawn are looked at.
        """
        num, is_open = self.settings.candidates, instances.is_open
        drawn: list[int] = []
        for _ in range(NUM_DRAWS_PER_CANDIDATE * num):
            row = int(self._generator.random() * len(is_open))
            if is_open[row] and row not in drawn:
                drawn.append(row)
                if len(drawn) == num:
                    return np.array(drawn)
        rows = np.flatnonzero(is_open).tolist()
        return np.array(self._generator.sample(rows, min(num, len(rows))), dtype=np.int64)
