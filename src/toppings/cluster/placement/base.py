"""What every placement is: a pure function from demand and servers to the homes of adapters."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from toppings.cluster.instances import Instances
from toppings.cluster.placement.demand import Demand
from toppings.cluster.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """`num_copies`: homes of each adapter, of placements that do not count them by demand; `slo_tpt_ms` is
    the objective for time per token (inf: none).
    """

    num_copies: int = 2
    slo_tpt_ms: float = math.inf

    def __post_init__(self) -> None:
        if self.num_copies < 1:
            raise ValueError(f"num_copies is {self.num_copies}; it must be at least 1")
        if not self.slo_tpt_ms > 0:
            raise ValueError(f"slo_tpt_ms is {self.slo_tpt_ms}; it must be above 0")


class Placement(ABC):
    """Keeps nothing between two plans: the last one is an argument."""

    def __init__(self, settings: PlacementSettings) -> None:
        self.settings = settings

    @abstractmethod
    def plan(self, demand: Demand, instances: Instances, previous: Plan | None) -> Plan:
        """The homes from now on, among the open instances. Neither argument is changed: it may run in a
        thread of its own on copies.
        """


def open_ids(instances: Instances) -> tuple[str, ...]:
    return tuple(
        each for each, is_open in zip(instances.ids, instances.is_open.tolist(), strict=True) if is_open
    )
