"""The first instance, in the order they are listed, that has room; the least loaded where none has."""

import numpy as np

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy, least
from toppings.cluster.snapshot import Choice, RequestSnapshot


class FirstFit(Policy):
    rule = "the first server that has room"

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        rows = np.flatnonzero(instances.is_open & instances.has_room(request))
        if not len(rows):
            return least(instances.num_requests, instances)
        return Choice(int(rows[0]), instances.ids[rows[0]])
