"""What a comparison of the loading modes is asked for, and what came of it."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from toppings.config import MODES, Config, ConfigError, setting
from toppings.lab.outcome import Outcome
from toppings.lab.summary import METRICS, LoadSummary
from toppings.lab.workload import LoadShape

REFERENCE_MODE = "cached"
ADAPTIVE_MODE = "auto"
"""All others are fixed: they treat every cold prefill alike."""
DEFAULT_LOAD_RATIO = 1.5
HOMES = ("host", "disk")
LOADS = ("sequential", "poisson")
POOL_SHARE = 4
"""Outside `cached` the device pool holds one in so many of the adapters."""


@dataclass(frozen=True, kw_only=True)
class ModesSpec:
    """What is compared. `load` is the Poisson load; the same number is first sent one after another.

    `num_adapters` are made with `ranks` (in turn) and `targets`, unless the configuration names a directory
    of adapters, of which so many are used. `home`: where a cold adapter is when its request comes.
    `load_ratio` > 0 emulates a link on which an adapter's load takes so many times a cached prefill; 0 leaves
    `link_gbps` as configured. `load.rps` 0 stands for half of what one request at a time allows.
    `one_at_a_time`: a mode's server ends before the next one starts, even if there is memory for all.

    Raises ConfigError for a value out of range.
    """

    base: Config
    modes: tuple[str, ...]
    load: LoadShape
    num_warmup: int = setting(3, "how many come first and are not counted")
    num_adapters: int = setting(60, "distinct adapters; made, if the settings name none")
    ranks: str = setting("64", "of adapters that are made, taken in turn")
    targets: str = setting("q_proj,k_proj,v_proj", "projections of adapters that are made, or all")
    home: str = setting("host", "where cold adapters are", choices=HOMES)
    load_ratio: float = 0.0
    one_at_a_time: bool = setting(False, "one server after another, not all of them taking turns")

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES or self.modes.count(mode) > 1:
                raise ConfigError(
                    f"modes are {','.join(self.modes)}; choose from {', '.join(MODES)}, each once"
                )
        if not self.modes:
            raise ConfigError(f"no mode is given; choose from {', '.join(MODES)}")
        if self.num_warmup < 0:
            raise ConfigError(f"num_warmup is {self.num_warmup}; it must be at least 0")
        if self.num_adapters < POOL_SHARE:
            raise ConfigError(
                f"num_adapters is {self.num_adapters}; for cold requests it must be at least {POOL_SHARE}"
            )
        if self.home not in HOMES:
            raise ConfigError(f"home is {self.home!r}; choose one of {', '.join(HOMES)}")
        if not 0 <= self.load_ratio < float("inf"):
            raise ConfigError(f"load_ratio is {self.load_ratio}; it must be at least 0")
        if self.load_ratio and self.base.engine.link_gbps:
            gbps = self.base.engine.link_gbps
            raise ConfigError(
                f"load_ratio {self.load_ratio} and link_gbps {gbps} both set the link; give one"
            )
        if self.load_ratio and self.base.engine.device != "cpu":
            raise ConfigError(f"load_ratio is {self.load_ratio}; a link is emulated on the CPU device only")

    def num_requests_per_mode(self) -> int:
        preload = self.num_adapters if self.home == "host" else 0
        return preload + self.num_warmup + 2 * self.load.num_requests


@dataclass(frozen=True)
class Survey:
    """What a server without link emulation told: bytes of each adapter that is used and of all that are
    registered; medians of warm requests, where `prefill_ms` is the engine's step; by how much it made the
    machine's available memory less."""

    adapters: dict[str, int]
    registered_bytes: int
    prefill_ms: float
    e2e_ms: float
    server_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        return sum(self.adapters.values())

    @property
    def pool_bytes(self) -> int:
        """Room for one adapter in `POOL_SHARE`."""
        return max(self.used_bytes // POOL_SHARE, *self.adapters.values())


@dataclass(frozen=True)
class ModeResult:
    """`loads`: by kind, "sequential" and "poisson"; `settings`: what the server was started with."""

    mode: str
    settings: dict[str, Any]
    loads: dict[str, LoadSummary]
    outcomes: dict[str, list[Outcome]]

    def to_json(self) -> dict[str, Any]:
        loads = {
            kind: {**summary.to_json(), "requests": [asdict(each) for each in self.outcomes[kind]]}
            for kind, summary in self.loads.items()
        }
        return {"config": self.settings, **loads}


@dataclass(frozen=True)
class ModesComparison:
    """`link_gbps`: of the emulated link, 0 where there was none. `is_interleaved`: all servers ran, and each
    request (or short round of Poisson arrivals) went to one mode after another; else mode after mode."""

    spec: ModesSpec
    survey: Survey
    link_gbps: float
    rps: float
    results: list[ModeResult]
    is_interleaved: bool = False

    def ratios(self, result: ModeResult, kind: str) -> dict[str, dict[str, float]]:
        """Latencies over those of `cached`; empty where that was not measured."""
        for reference in self.results:
            if reference.mode == REFERENCE_MODE:
                return result.loads[kind].ratios_to(reference.loads[kind])
        return {}

    def paired_ratios(self, result: ModeResult, kind: str) -> dict[str, dict[str, float]]:
        """Per metric, over "cached" and over "best_fixed": the median over the requests of their latencies in
        this mode over those of the same requests in the other. Interleaved, a drift of the machine hits
        both alike."""
        references = {each.mode: each for each in self.results if each.mode == REFERENCE_MODE}
        ratios: dict[str, dict[str, float]] = {}
        for metric in METRICS:
            best = self.best_fixed(kind, metric)
            others = {**references, **({"best_fixed": best} if best else {})}
            found = {
                name: _median_ratio(result.outcomes[kind], other.outcomes[kind], metric)
                for name, other in others.items()
            }
            ratios[metric] = {name: ratio for name, ratio in found.items() if ratio is not None}
        return ratios

    def best_fixed(self, kind: str, metric: str) -> ModeResult | None:
        """The fixed mode with cold starts whose median is the least; None where none was measured."""
        medians = {
            result.mode: (latency.p50, result)
            for result in self.results
            if result.mode not in (REFERENCE_MODE, ADAPTIVE_MODE)
            and (latency := result.loads[kind].latencies()[metric])
        }
        return min(medians.values(), key=lambda each: each[0])[1] if medians else None

    def to_json(self) -> dict[str, Any]:
        spec = {name: value for name, value in vars(self.spec).items() if name not in ("base", "load")}
        modes = {
            result.mode: {
                **result.to_json(),
                "ratios": {kind: self.ratios(result, kind) for kind in result.loads},
                "paired_ratios": {kind: self.paired_ratios(result, kind) for kind in result.loads},
            }
            for result in self.results
        }
        best = {kind: {metric: self.best_fixed(kind, metric) for metric in METRICS} for kind in LOADS}
        return {
            "emulated_link_gbps": self.link_gbps or None,
            "is_interleaved": self.is_interleaved,
            "spec": {**spec, "load": asdict(replace(self.spec.load, rps=self.rps))},
            "survey": asdict(self.survey),
            "best_fixed": {
                kind: {metric: each.mode for metric, each in metrics.items() if each}
                for kind, metrics in best.items()
            },
            "modes": modes,
        }


def _median_ratio(mine: Sequence[Outcome], theirs: Sequence[Outcome], metric: str) -> float | None:
    """Over the requests that succeeded in both; None where there are none."""
    pairs = [
        (getattr(one, f"{metric}_ms"), getattr(other, f"{metric}_ms"))
        for one, other in zip(mine, theirs)
        if one.error is None and other.error is None
    ]
    ratios = [one / other for one, other in pairs if one is not None and other]
    return statistics.median(ratios) if ratios else None
