"""Any open instance, each as likely as the others."""

from random import Random as Generator

from toppings.cluster.instances import Instances
from toppings.cluster.policies.base import Policy, PolicySettings
from toppings.cluster.snapshot import Choice, RequestSnapshot


class Random(Policy):
    rule = "any open server"

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self._generator = Generator(settings.seed)

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        rows = instances.is_open.nonzero()[0]
        if not len(rows):
            return None
        row = int(rows[self._generator.randrange(len(rows))])
        return Choice(row, instances.ids[row])
