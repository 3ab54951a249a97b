"""The published scheduler (Li et al., "Toppings", USENIX ATC 2025): what a request costs those around it.

With PrePerf and DecPerf an instance's performance models:
    d_prefill = PrePerf(queue + i) - PrePerf(queue)
    d_decode  = DecPerf(running + queue + i) - DecPerf(running + queue)
    cost      = d_prefill / response length + d_decode, infinite where DecPerf(running + queue + i) > SLO
and the request goes where cost x (running + queued requests) is least. A batch of nothing costs nothing.
Where every instance would break the SLO: the least DecPerf(running + queue + i), and the choice is marked.
"""

import math
from typing import NamedTuple

import numpy as np

from toppings.cluster.instances import DECODE, PREFILL, BoolArray, Instances
from toppings.cluster.perf_model import FloatArray
from toppings.cluster.policies.base import Policy, least_row
from toppings.cluster.snapshot import Choice, RequestSnapshot


class Costs(NamedTuple):
    """In ms, each [N]: what the request adds per token of those that run there, and the decode step then."""

    per_token: FloatArray
    tpt: FloatArray


def predict(request: RequestSnapshot, instances: Instances) -> Costs:
    """The published `cost` of the request on each instance, from its performance models."""
    after = instances.step_ms_with(request)
    added = after - instances.step_ms()
    return Costs(added[PREFILL] / request.response_tokens + added[DECODE], after[DECODE])


def choose_within_slo(
    totals: FloatArray, feasible: BoolArray, tpt: FloatArray, instances: Instances
) -> Choice | None:
    """The least total [N] among the feasible; where none is, the least predicted TPT [N], marked."""
    row = least_row(np.where(feasible, totals, math.inf), instances)
    breaks_slo = row is None
    if row is None:
        row = least_row(tpt, instances)
    if row is None:
        return None
    return Choice(row, instances.ids[row], breaks_slo, float(tpt[row]))


class RankAware(Policy):
    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        costs = predict(request, instances)
        feasible = costs.tpt <= self.settings.slo_tpt_ms
        return choose_within_slo(costs.per_token * instances.num_requests, feasible, costs.tpt, instances)
