"""Routing policies by name: one short file each, chosen here and nowhere else."""

from toppings.cluster.policies.base import Policy, PolicySettings
from toppings.cluster.policies.dlora import DLora
from toppings.cluster.policies.first_fit import FirstFit
from toppings.cluster.policies.least_loaded import LeastLoaded
from toppings.cluster.policies.lora_affinity import LoraAffinity
from toppings.cluster.policies.rank_aware import RankAware
from toppings.cluster.policies.rank_aware_residency import RankAwareResidency
from toppings.cluster.policies.round_robin import RoundRobin
from toppings.cluster.policies.sampled import Sampled
from toppings.cluster.policies.uniform import Random

POLICIES: dict[str, type[Policy]] = {
    "rank_aware": RankAware,
    "rank_aware_residency": RankAwareResidency,
    "random": Random,
    "round_robin": RoundRobin,
    "first_fit": FirstFit,
    "least_loaded": LeastLoaded,
    "lora_affinity": LoraAffinity,
    "dlora": DLora,
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """The policy, over as many candidates as the settings say. Raises ValueError for an unknown name."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    policy = POLICIES[name](settings or PolicySettings())
    return Sampled(policy) if policy.settings.candidates else policy


__all__ = ["POLICIES", "Policy", "PolicySettings", "make_policy"]
