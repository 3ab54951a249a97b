"""The frozen settings of `toppings up`: those of a server, and how many engines there are behind it."""

import math
from dataclasses import dataclass, field, replace

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.placement import NO_PLACEMENT, PLACEMENTS
from toppings.cluster.policies import POLICIES
from toppings.config import Config, ConfigError, Settings, setting

BY_REQUESTS, BY_DEMAND = "requests", "demand"


@dataclass(frozen=True, kw_only=True)
class FleetConfig(Settings):
    """What is asked of Ray Serve and of its request router. Times in seconds unless named otherwise."""

    replicas: int = setting(
        1, "engines; where their number follows the load, how many to start with", at_least=1
    )
    min_replicas: int = setting(0, "fewest engines (0: replicas)", at_least=0)
    max_replicas: int = setting(
        0, "most engines; their number then follows the load (0: it is fixed)", at_least=0
    )
    scale_by: str = setting(
        BY_REQUESTS,
        "what their number follows: requests at once, or how many the demand needs within slo_tpt_ms",
        choices=(BY_REQUESTS, BY_DEMAND),
    )
    target_ongoing_requests: float = setting(
        0.0, "requests per engine that scaling by requests aims at (0: half of max_num_seqs)", at_least=0
    )
    upscale_delay_s: float = setting(30.0, "how long the load must ask for more engines", at_least=0)
    downscale_delay_s: float = setting(600.0, "how long it must ask for fewer", at_least=0)
    cpus_per_replica: float = setting(
        0.0,
        "cores that Ray sets aside for an engine (0: an equal share of this machine's; in a cluster, 1)",
        at_least=0,
    )
    gpus_per_replica: float = setting(0.0, "GPUs of an engine (0: one where the device is cuda)", at_least=0)
    policy: str = setting("rank_aware", "how an engine is chosen", choices=tuple(POLICIES))
    placement: str = setting(NO_PLACEMENT, "which engines adapters are kept on", choices=tuple(PLACEMENTS))
    num_copies: int = setting(2, "engines of each adapter (static_k, shuffle_shard)", above=0)
    placement_interval_s: float = setting(2.0, "between two looks at where adapters should be", above=0)
    slo_tpt_ms: float = setting(math.inf, "objective for time per token (inf: none)", above=0)
    slo_ttft_ms: float = setting(
        math.inf, "objective for the time until the first token (inf: none)", above=0
    )
    perf_model: str = setting(
        "published:mbgmv", "costs of engines that have measured none: a file or a shipped name"
    )
    stats_period_s: float = setting(1.0, "between two reports of an engine to the request router", above=0)
    accept_timeout_s: float = setting(
        30.0, "a request that no engine takes for so long is answered 503", above=0
    )
    replica_timeout_s: float = setting(
        5.0,
        "an engine of which nothing is heard for so long gets no requests, and those it has go elsewhere",
        above=0,
    )
    ray_host: str = setting(
        "127.0.0.1",
        "address of the Ray that is started here (one that is not the loopback's opens its ports to all)",
    )
    ray_address: str = setting("", "Ray cluster to join, e.g. auto or host:6379 (empty: start Ray here)")
    app_name: str = setting("toppings", "name of the Serve application")
    route_prefix: str = setting("/", "path below which the application answers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_replicas and not self.max_replicas:
            raise ConfigError("min_replicas needs max_replicas, the most engines there may be")
        if self.scale_by == BY_DEMAND and not self.max_replicas:
            raise ConfigError("scale_by demand needs max_replicas, the most engines there may be")
        if self.scale_by == BY_DEMAND and (target := self.target_ongoing_requests):
            raise ConfigError(f"target_ongoing_requests is {target:g}; it is for scale_by requests only")
        if self.max_replicas and not self.fewest <= self.replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas, replicas and max_replicas are {self.fewest}, {self.replicas} and "
                f"{self.max_replicas}; they must not fall"
            )
        if not self.route_prefix.startswith("/"):
            raise ConfigError(f"route_prefix is {self.route_prefix!r}; it must begin with /")
        try:
            load_perf_model(self.perf_model)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def fewest(self) -> int:
        return self.min_replicas or self.replicas

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas


@dataclass(frozen=True, kw_only=True)
class UpConfig(Settings):
    """Everything `toppings up` reads: one flat list of settings in YAML, a server's and a fleet's here."""

    server: Config = field(default_factory=Config)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def with_cores(self, num_cores: int | None) -> "UpConfig":
        """With an engine's cores and threads resolved: shares of `num_cores`, or one each where None."""
        share = 1.0 if num_cores is None else max(round(num_cores / self.fleet.most, 2), 0.01)
        cpus = self.fleet.cpus_per_replica or share
        threads = self.server.engine.num_threads or max(1, int(cpus))
        engine = replace(self.server.engine, num_threads=threads)
        return UpConfig(
            server=replace(self.server, engine=engine), fleet=replace(self.fleet, cpus_per_replica=cpus)
        )
