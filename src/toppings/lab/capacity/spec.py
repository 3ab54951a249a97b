"""What a plan of a fleet is asked, and the ways of running servers that it chooses from."""

import math
from dataclasses import dataclass, replace

from toppings.cluster.placement import NO_PLACEMENT, PLACEMENTS
from toppings.cluster.policies import POLICIES
from toppings.config import ConfigError, Settings, setting
from toppings.sim.settings import SimConfig


@dataclass(frozen=True, slots=True)
class Design:
    """How servers are run: `pool_share` of the memory that is left beside the base model is for adapters."""

    policy: str
    placement: str
    pool_share: float

    def __str__(self) -> str:
        placed = "" if self.placement == NO_PLACEMENT else f", placement {self.placement}"
        return f"{self.policy}{placed}, {self.pool_share:.0%} for adapters"


@dataclass(frozen=True, kw_only=True)
class PlanSpec(Settings):
    """Sizes in bytes; `gpu_cost` in any currency. Raises ConfigError for a value that is out of range."""

    slo_ttft_ms: float = setting(math.inf, "objective for the time to the first token, ms", above=0)
    slo_tpt_ms: float = setting(math.inf, "objective for the time per token, ms", above=0)
    attainment: float = setting(
        0.99, "share of the requests that must be within the objectives", above=0, at_most=1
    )
    num_instances: int = setting(
        0, "instead: what load do so many servers hold (0: how many for this load)", at_least=0
    )
    max_instances: int = setting(200, "servers at most", at_least=1)
    policies: tuple[str, ...] = setting(("rank_aware_residency", "rank_aware"), "to choose from")
    placements: tuple[str, ...] = setting(tuple(PLACEMENTS), "to choose from")
    memory_bytes: int = setting(
        40 * 2**30, "of a server's device, for adapters and key-value cache together", at_least=1
    )
    kv_token_bytes: int = setting(2**19, "of one token's keys and values", at_least=1)
    pool_shares: tuple[float, ...] = setting(
        (0.2, 0.05, 0.1, 0.4), "parts of that memory for adapters, to choose from"
    )
    gpu_cost: float = setting(2.5, "of a server for an hour", at_least=0)
    seeds: int = setting(6, "loads that the answer must hold for, and others to try it with", at_least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isinf(self.slo_ttft_ms) and math.isinf(self.slo_tpt_ms):
            raise ConfigError("there is no objective; give --slo-ttft-ms, --slo-tpt-ms or both")
        for kind, known in (("policies", POLICIES), ("placements", PLACEMENTS)):
            chosen = getattr(self, kind)
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{kind} has {name!r}; choose from {', '.join(known)}")
            if not chosen:
                raise ConfigError(f"{kind} is empty; choose from {', '.join(known)}")
        if not self.pool_shares or not all(0 < share < 1 for share in self.pool_shares):
            raise ConfigError(f"pool_shares are {self.pool_shares}; give at least one, each between 0 and 1")

    def first_design(self) -> Design:
        return Design(self.policies[0], self.placements[0], self.pool_shares[0])

    def ways_to_place(self, design: Design) -> list[Design]:
        """That one, with each policy and placement."""
        return [
            replace(design, policy=policy, placement=placement)
            for placement in self.placements
            for policy in self.policies
        ]

    def ways_to_divide(self, design: Design) -> list[Design]:
        """That one, with each division of the memory."""
        return [replace(design, pool_share=share) for share in self.pool_shares]

    def pool_bytes(self, design: Design) -> int:
        return int(self.memory_bytes * design.pool_share)

    def kv_cache_tokens(self, design: Design) -> int:
        return (self.memory_bytes - self.pool_bytes(design)) // self.kv_token_bytes

    def config(self, base: SimConfig, design: Design) -> SimConfig:
        """Servers of that design. Raises ConfigError where the cache is too small for anything."""
        kv_cache_tokens = self.kv_cache_tokens(design)
        num_cached = kv_cache_tokens // base.page_size * base.page_size
        if not num_cached:
            raise ConfigError(
                f"memory_bytes is {self.memory_bytes}; beside adapters it holds {kv_cache_tokens} tokens of "
                f"{self.kv_token_bytes} bytes, less than a page of {base.page_size}"
            )
        return replace(
            base,
            policy=design.policy,
            placement=design.placement,
            device_pool_bytes=self.pool_bytes(design),
            kv_cache_tokens=kv_cache_tokens,
            max_model_len=min(base.max_model_len, num_cached),
        )
