"""The frozen settings of `toppings up`: those of a server, and how many engines there are behind it."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import POLICIES
from toppings.config import Config, ConfigError, check_choices, coerce, read_yaml, setting


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """What is asked of Ray Serve and of its request router. Times in seconds unless named otherwise."""

    replicas: int = setting(1, "engines; where their number follows the load, how many to start with")
    min_replicas: int = setting(0, "fewest engines (0: replicas)")
    max_replicas: int = setting(0, "most engines; their number then follows the load (0: it is fixed)")
    target_ongoing_requests: float = setting(
        0.0, "requests per engine that scaling aims at (0: half of max_num_seqs)"
    )
    upscale_delay_s: float = setting(30.0, "how long the load must ask for more engines")
    downscale_delay_s: float = setting(600.0, "how long it must ask for fewer")
    cpus_per_replica: float = setting(
        0.0, "cores that Ray sets aside for an engine (0: an equal share of this machine's; in a cluster, 1)"
    )
    gpus_per_replica: float = setting(0.0, "GPUs of an engine (0: one where the device is cuda)")
    policy: str = setting("rank_aware", "how an engine is chosen", choices=tuple(POLICIES))
    slo_tpt_ms: float = setting(math.inf, "objective for time per token (inf: none)")
    perf_model: str = setting(
        "published:mbgmv", "costs of engines that have measured none: a file or a shipped name"
    )
    stats_period_s: float = setting(1.0, "between two reports of an engine to the request router")
    accept_timeout_s: float = setting(30.0, "a request that no engine takes for so long is answered 503")
    replica_timeout_s: float = setting(
        5.0, "an engine of which nothing is heard for so long gets no requests, and those it has go elsewhere"
    )
    ray_host: str = setting(
        "127.0.0.1",
        "address of the Ray that is started here (one that is not the loopback's opens its ports to all)",
    )
    ray_address: str = setting("", "Ray cluster to join, e.g. auto or host:6379 (empty: start Ray here)")
    app_name: str = setting("toppings", "name of the Serve application")
    route_prefix: str = setting("/", "path below which the application answers")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.replicas < 1:
            raise ConfigError(f"replicas is {self.replicas}; it must be at least 1")
        if self.min_replicas and not self.max_replicas:
            raise ConfigError("min_replicas needs max_replicas, the most engines there may be")
        if self.max_replicas and not self.fewest <= self.replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas, replicas and max_replicas are {self.fewest}, {self.replicas} and "
                f"{self.max_replicas}; they must not fall"
            )
        for name in ("slo_tpt_ms", "stats_period_s", "accept_timeout_s", "replica_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s"):
            self._require_not_negative(name)
        for name in ("downscale_delay_s", "cpus_per_replica", "gpus_per_replica"):
            self._require_not_negative(name)
        if not self.route_prefix.startswith("/"):
            raise ConfigError(f"route_prefix is {self.route_prefix!r}; it must begin with /")
        try:
            load_perf_model(self.perf_model)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _require_not_negative(self, name: str) -> None:
        if getattr(self, name) < 0:
            raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @property
    def fewest(self) -> int:
        return self.min_replicas or self.replicas

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """Everything `toppings up` reads: one flat list of settings in YAML, a server's and a fleet's here."""

    server: Config = field(default_factory=Config)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], base: "UpConfig | None" = None) -> "UpConfig":
        """`base` (default: the defaults) with some settings replaced, by their flat names.

        Raises ConfigError for an unknown name or a value of the wrong type or range.
        """
        base = base or cls()
        own = {f.name for f in fields(FleetConfig)}
        unknown = sorted(settings.keys() - base.to_settings().keys())
        if unknown:
            known = ", ".join(sorted(base.to_settings()))
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {known}")
        mine = {name: coerce(base.fleet, name, settings[name]) for name in settings.keys() & own}
        theirs = {name: value for name, value in settings.items() if name not in own}
        return cls(
            server=Config.from_settings(theirs, base.server),
            fleet=replace(base.fleet, **mine),
        )

    @classmethod
    def from_yaml(cls, path: Path) -> "UpConfig":
        """Settings of a YAML mapping over the defaults. Raises ConfigError as `from_settings`."""
        return cls.from_settings(read_yaml(path))

    def to_settings(self) -> dict[str, Any]:
        """The flat mapping that `from_settings` reads back."""
        return {**self.server.to_settings(), **asdict(self.fleet)}

    def with_cores(self, num_cores: int | None) -> "UpConfig":
        """With an engine's cores and threads resolved: shares of `num_cores`, or one each where None."""
        share = 1.0 if num_cores is None else max(round(num_cores / self.fleet.most, 2), 0.01)
        cpus = self.fleet.cpus_per_replica or share
        threads = self.server.engine.num_threads or max(1, int(cpus))
        engine = replace(self.server.engine, num_threads=threads)
        return UpConfig(
            server=replace(self.server, engine=engine), fleet=replace(self.fleet, cpus_per_replica=cpus)
        )
