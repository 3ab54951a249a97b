"""Placements that know nothing of demand: an adapter's homes follow from its name and the servers' ids."""

from toppings.cluster.instances import Instances
from toppings.cluster.placement.base import Placement, open_ids
from toppings.cluster.placement.demand import Demand
from toppings.cluster.placement.plan import Plan, Ring, Shards


class StaticK(Placement):
    """`num_copies` neighbours on a ring."""

    def plan(self, demand: Demand, instances: Instances, previous: Plan | None) -> Plan:
        ids = open_ids(instances)
        if previous is not None and previous.instance_ids == ids:
            return previous
        return Plan(ids, Ring(ids, self.settings.num_copies))


class ShuffleShard(Placement):
    """`num_copies` servers that another adapter hardly has all of."""

    def plan(self, demand: Demand, instances: Instances, previous: Plan | None) -> Plan:
        ids = open_ids(instances)
        if previous is not None and previous.instance_ids == ids:
            return previous
        return Plan(ids, Shards(ids, self.settings.num_copies))
