"""What every policy is: a choice over snapshots, and where it has one, a rebalancing of what waits."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from toppings.cluster.instances import Instances
from toppings.cluster.perf_model import FloatArray
from toppings.cluster.snapshot import Choice, Move, RequestSnapshot


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """`slo_tpt_ms` is the objective for time per token, `slo_ttft_ms` that for the time until the first one
    (inf: none); `seed` is for policies that draw; `candidates` is how many instances, drawn for each request,
    are considered (0: all).
    """

    slo_tpt_ms: float = math.inf
    seed: int = 0
    candidates: int = 0
    slo_ttft_ms: float = math.inf

    def __post_init__(self) -> None:
        for name in ("slo_tpt_ms", "slo_ttft_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.candidates < 0:
            raise ValueError(f"candidates is {self.candidates}; it must be at least 0 (0: all)")


class Policy(ABC):
    """Decides from what it is given and nothing else; those that draw or take turns keep that state."""

    rule: str
    """What it looks for, in words, for people who wonder where a request went."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings

    @abstractmethod
    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice | None:
        """Where the request goes: one of the open instances, None only where there is none."""

    def migrations(self, instances: Instances) -> list[Move]:
        """Waiting requests that would wait less elsewhere; called now and then. Most policies have none."""
        return []

    @property
    def migrates(self) -> bool:
        """Whether the policy rebalances at all."""
        return type(self).migrations is not Policy.migrations


def least_row(costs: FloatArray, instances: Instances) -> int | None:
    """The open instance of least cost [N], the one with fewer requests among equals, then the first."""
    costs = np.where(instances.is_open, costs, math.inf)
    row = int(costs.argmin()) if len(costs) else 0
    if not len(costs) or costs[row] == math.inf:
        return None
    ties = costs == costs[row]
    if np.count_nonzero(ties) == 1:
        return row
    return int(np.where(ties, instances.num_requests, math.inf).argmin())


def least(costs: FloatArray, instances: Instances) -> Choice | None:
    """The choice of `least_row`."""
    row = least_row(costs, instances)
    return None if row is None else Choice(row, instances.ids[row])
