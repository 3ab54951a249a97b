"""The published cost, plus what getting the adapter there costs, plus the wait where the cache has no room.

A cold start delays the request itself and, as a prefill does, those it shares steps with; a lack of cache for
its keys and values delays it alone, by as much of a response's time as is lacking:
    own TPT = DecPerf(running + queue + i) x (1 + lacking share) + load / response length
    total   = cost x (running + queued) + load / response length x (running + queued + 1) + wait
The SLO is asked of the own TPT; an instance without a free sequence is chosen only where none has one. No
gain over `rank_aware` has been shown where loads are short: over fresh seeds the two attain the same within
the spread.
"""

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy
from toppings.cluster.policies.rank_aware import choose_within_slo, predict
from toppings.cluster.snapshot import Choice, RequestSnapshot


class RankAwareResidency(Policy):
    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        costs = predict(request, instances)
        load = instances.load_ms(request) / request.response_tokens
        wait = costs.tpt * instances.lacking_kv_share(request)
        own_tpt = costs.tpt + wait + load
        totals = (costs.per_token + load) * instances.num_requests + load + wait
        has_room = instances.num_requests < instances.max_num_seqs
        return choose_within_slo(totals, has_room, own_tpt <= self.settings.slo_tpt_ms, own_tpt, instances)
