"""How a plan is obeyed: which servers a routing policy is asked about, one group after the other."""

from collections.abc import Sequence

import numpy as np

from toppings.cluster.instances import Instances, rows_with
from toppings.cluster.policies import Policy
from toppings.cluster.snapshot import Choice, RequestSnapshot

COMFORT = 0.5
"""Share of a device up to which adapters in use together may grow by one that is in use elsewhere: beyond it,
room is kept for adapters that are in use nowhere, which would have to wait for it."""


def steer(
    request: RequestSnapshot, instances: Instances, homes: Sequence[int], policy: Policy
) -> Choice | None:
    """The policy's choice among the first of these groups in which one keeps the objective:

    1. homes, rows of the adapter's, that use it or have plenty of room for it
    2. other servers that use it
    3. homes that have room
    4. all servers that have room

    Where none keeps the objective: in the first group that has an open server; where no device has room,
    among all. Policies that predict nothing take the first group.
    """
    adapter, first = request.adapter, None
    assert adapter is not None
    is_home, is_user = np.zeros((2, len(instances)), dtype=np.bool_)
    is_home[homes] = True
    is_user[[row for row in homes if adapter in instances.active[row]]] = True
    is_left = instances.is_open
    for group in range(4):
        if group == 0:
            mask = is_home & (is_user | instances.has_adapter_room(request, COMFORT))
        elif group == 1:
            is_user[rows_with(adapter, instances.active)] = True
            mask = is_user
        else:
            has_room = instances.has_adapter_room(request)
            mask = is_home & has_room if group == 2 else has_room
        mask = mask & is_left
        if not mask.any():
            continue
        choice = policy.choose(request, instances.among(mask))
        if choice is None or not choice.breaks_slo:
            return choice
        first = first or choice
        is_left = is_left & ~mask
    return first or policy.choose(request, instances)
