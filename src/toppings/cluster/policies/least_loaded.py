"""The instance with the fewest running and waiting requests."""

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy, least
from toppings.cluster.snapshot import Choice, RequestSnapshot


class LeastLoaded(Policy):
    rule = "the fewest requests"

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        return least(instances.num_requests, instances)
