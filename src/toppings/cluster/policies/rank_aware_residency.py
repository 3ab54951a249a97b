"""The published cost, plus what getting the adapter there costs, plus the wait where the cache has no room.

A cold start delays the request itself and, as a prefill does, those it shares steps with; a lack of cache for
its keys and values delays it alone, by as much of a response's time as is lacking:
    own TPT = DecPerf(running + queue + i) x (1 + lacking share) + load / response length
    total   = cost x (running + queued) + load / response length x (running + queued + 1) + wait
The SLO is asked of the own TPT; an instance without a free sequence is chosen only where none has one. In
`benchmarks/routing.py` it attains what `rank_aware` does, within the spread of seeds, where loads are short,
and 7 to 64 points more where few adapters fit a server and its link is slow.
"""

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy
from toppings.cluster.snapshot import Choice, RequestSnapshot


class RankAwareResidency(Policy):
    rule = (
        "the least time added to the requests there, by rank, with"
        " what loading the adapter and a full cache cost"
    )

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        from toppings.cluster.scan import least_cost  # numba: only where it is used

        return least_cost(request, instances, self.settings, weighs_residency=True)
