"""Sends a request where its adapter is unless that server is the busier one, and moves what waits later.

After dLoRA (Wu et al., OSDI 2024), reduced to what routing sees: new requests go to a server that holds their
adapter unless another has fewer requests; from time to time, requests that still wait move from the most to
the least loaded server while that evens out the load. It counts requests, not ranks: that is the comparison.
"""

import numpy as np

from toppings.cluster.instances import Instances, rows_with
from toppings.cluster.perf_model import FloatArray
from toppings.cluster.policies.base import Policy, least
from toppings.cluster.snapshot import Choice, Move, RequestSnapshot

COLD_PENALTY_REQUESTS = 1.0
"""An adapter that has to be loaded weighs as much as this many requests."""


class DLora(Policy):
    rule = "the fewest requests, where an adapter that has to be loaded counts as one"

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        if request.adapter is None:
            return least(instances.num_requests, instances)
        loads = instances.num_requests + COLD_PENALTY_REQUESTS
        holders = {
            *rows_with(request.adapter, instances.on_device),
            *rows_with(request.adapter, instances.active),
        }
        loads[list(holders)] -= COLD_PENALTY_REQUESTS
        return least(loads, instances)

    def migrations(self, instances: Instances) -> list[Move]:
        rows = np.flatnonzero(instances.is_open)
        if len(rows) < 2:
            return []
        loads = np.where(instances.is_open, instances.num_requests, np.nan)
        queues = {int(row): list(instances.queued[row].values()) for row in rows}
        moves = []
        while (move := _next_move(loads, queues, instances)) is not None:
            moves.append(move)
        return moves


def _next_move(
    loads: FloatArray, queues: dict[int, list[RequestSnapshot]], instances: Instances
) -> Move | None:
    """Take the best move out of `queues` and put it into `loads`; None where none would even out the load."""
    movable = [row for row, queue in queues.items() if queue]
    if not movable:
        return None
    source, target = max(movable, key=lambda row: float(loads[row])), int(np.nanargmin(loads))
    request = max(queues[source], key=lambda waiting: waiting.adapter in instances.on_device[target])
    is_cold = request.adapter is not None and request.adapter not in instances.on_device[target]
    if loads[source] - loads[target] < 2 + COLD_PENALTY_REQUESTS * is_cold:
        return None
    queues[source].remove(request)
    loads[source] -= 1
    loads[target] += 1
    return Move(request.request_id, instances.ids[source], instances.ids[target])
