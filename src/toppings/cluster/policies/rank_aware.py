"""The published scheduler (Li et al., "Toppings", USENIX ATC 2025): what a request costs those around it.

With PrePerf and DecPerf an instance's performance models:
    d_prefill = PrePerf(queue + i) - PrePerf(queue)
    d_decode  = DecPerf(running + queue + i) - DecPerf(running + queue)
    cost      = d_prefill / response length + d_decode, infinite where DecPerf(running + queue + i) > SLO
and the request goes where cost x (running + queued requests) is least, among the instances that have room for
it. A batch of nothing costs nothing; where prefills share their steps with decodes (`PerfModel.shared_ms`),
PrePerf is what they add to those steps. Where every instance would break the SLO: the least DecPerf(running +
queue + i), and the choice is marked. Where none has room: the fewest requests.
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
    totals: FloatArray, has_room: BoolArray, keeps_slo: BoolArray, tpt: FloatArray, instances: Instances
) -> Choice | None:
    """The least total [N] among those that have room and keep the SLO; or else, marked, the least predicted
    TPT [N] of those that have room; or else the fewest requests.
    """
    row = least_row(np.where(has_room & keeps_slo, totals, math.inf), instances)
    if row is not None:
        return Choice(row, instances.ids[row], False, float(tpt[row]))
    row = least_row(np.where(has_room, tpt, math.inf), instances)
    if row is None:
        row = least_row(instances.num_requests, instances)
    if row is None:
        return None
    return Choice(row, instances.ids[row], not keeps_slo[row], float(tpt[row]))


class RankAware(Policy):
    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        costs = predict(request, instances)
        keeps_slo = costs.tpt <= self.settings.slo_tpt_ms
        has_room = instances.has_room(request)
        totals = costs.per_token * instances.num_requests
        return choose_within_slo(totals, has_room, keeps_slo, costs.tpt, instances)
