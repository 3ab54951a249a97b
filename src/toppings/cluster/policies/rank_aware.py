"""The published scheduler (Li et al., "Toppings", USENIX ATC 2025): what a request costs those around it.

With PrePerf and DecPerf an instance's performance models:
    d_prefill = PrePerf(queue + i) - PrePerf(queue)
    d_decode  = DecPerf(running + queue + i) - DecPerf(running + queue)
    cost      = d_prefill / response length + d_decode, infinite where DecPerf(running + queue + i) > SLO
and the request goes where cost x (running + queued requests) is least, among the instances that have room for
it. A batch of nothing costs nothing; where prefills share their steps with decodes (`PerfModel.shared_ms`),
PrePerf is what they add to those steps. Where every instance would break the SLO: the least DecPerf(running +
queue + i), and the choice is marked. Where none has room: the fewest requests.

A prompt's tokens that a server has in its cache, as far as is known, are no part of d_prefill there. Where
any server has some, the request's own d_prefill / response length is added to its cost: idle servers, too,
then differ.
"""

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy, PolicySettings
from toppings.cluster.snapshot import Choice, RequestSnapshot


class RankAware(Policy):
    rule = "the least time added to the requests there, by rank; within the objective"

    def __init__(self, settings: PolicySettings) -> None:
        from toppings.cluster.scan import least_cost  # numba: only where it is used

        super().__init__(settings)
        self._least_cost = least_cost

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        return self._least_cost(request, instances, self.settings, weighs_residency=False)
