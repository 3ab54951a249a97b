"""The open instances in turn."""

import numpy as np

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy, PolicySettings
from toppings.cluster.snapshot import Choice, RequestSnapshot


class RoundRobin(Policy):
    rule = "the open servers in turn"

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self._turn = -1

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        rows = np.flatnonzero(instances.is_open)
        if not len(rows):
            return None
        later = rows[rows > self._turn]
        self._turn = int(later[0] if len(later) else rows[0])
        return Choice(self._turn, instances.ids[self._turn])
