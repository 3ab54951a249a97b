"""Prefers an instance that holds the adapter, scored as llm-d's LoRA affinity scorer does.

1.0 where the adapter is on the device; else 0.8 where device and queue leave room for another adapter; else
0.6 where a waiting request uses it; else 0. Equal scores go to the fewest requests.
"""

import numpy as np

from toppings.cluster.instances import Instances, rows_with
from toppings.cluster.perf_model import FloatArray
from toppings.cluster.policies.base import Policy, least
from toppings.cluster.snapshot import Choice, RequestSnapshot

ON_DEVICE, HAS_ROOM, WAITING, NEITHER = 1.0, 0.8, 0.6, 0.0


class LoraAffinity(Policy):
    rule = "a server that has the adapter, else one that has room for it; then the fewest requests"

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        if request.adapter is None:
            return least(instances.num_requests, instances)
        return least(-self._scores(request.adapter, instances), instances)

    def _scores(self, adapter: str, instances: Instances) -> FloatArray:
        pairs = zip(instances.on_device, instances.queued_adapters, strict=True)
        num_adapters = np.array(
            [len(held) + len(waiting.keys() - held) for held, waiting in pairs], dtype=np.float64
        )
        scores = np.full(len(instances), NEITHER)
        scores[rows_with(adapter, instances.queued_adapters)] = WAITING
        scores[num_adapters < instances.max_adapters] = HAS_ROOM
        scores[rows_with(adapter, instances.on_device)] = ON_DEVICE
        return scores
