"""Simulations of a fleet at several loads, in the published simulation's setting, kept as short records."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from toppings import __version__
from toppings.cluster.perf_model import PerfModel, load_perf_model
from toppings.config import setting
from toppings.lab.reproduce import published
from toppings.lab.simulation.metrics import RunSummary, latencies_of, summarize_run
from toppings.sim.assign import TraceOptions
from toppings.sim.loading import MODES
from toppings.sim.readers import load_trace
from toppings.sim.records import SimResult
from toppings.sim.runs import SimJob, run_jobs
from toppings.sim.settings import SimConfig, parse_slo_ms
from toppings.sim.synth.workload import Workload

FORMS = ("bgmv", "mbgmv")
POLICIES = ("random", "first_fit", "dlora", "rank_aware", "rank_aware_residency")
QUANTILES = np.linspace(0.0, 1.0, 401)
SHIPPED_MODEL = "published"


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """`rates` in requests per second of the whole fleet, `duration_s` of simulated arrivals, `seeds`
    repetitions. `trace`: a file whose arrivals (scaled to the rates) and adapters are used, else Poisson
    arrivals for `num_adapters` adapters. `prefill_interrupts` None: as published for the published model,
    shared steps for any other.
    """

    num_instances: int = setting(published.SIMULATION_INSTANCES, "servers")
    rates: tuple[float, ...] = setting((published.SIMULATION_RPS,), "requests/s")
    policies: tuple[str, ...] = setting(POLICIES, "with commas between")
    perf_model: str = SHIPPED_MODEL
    prefill_interrupts: bool | None = None
    duration_s: float = setting(600.0, "seconds of simulated arrivals")
    seeds: int = setting(5, "repetitions of each run")
    num_adapters: int = setting(published.SIMULATION_FUNCTIONS, "how many")
    mode: str = setting("pipelined", "cold adapters", choices=tuple(MODES))
    trace: str = ""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be at least 1")
        if not self.rates:
            raise ValueError("there are no rates; give at least one")
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise ValueError(f"rates are '{','.join(f'{r:g}' for r in self.rates)}'; each must be above 0")

    @property
    def interrupts(self) -> bool:
        """Whether a prefill is a step of its own."""
        if self.prefill_interrupts is None:
            return self.perf_model == SHIPPED_MODEL
        return self.prefill_interrupts

    def model(self, form: str) -> PerfModel:
        model = load_perf_model(self.perf_model).using(form)
        return replace(model, prefill_interrupts=self.interrupts)

    def config(self, form: str, policy: str, seed: int) -> SimConfig:
        model = self.model(form)
        return SimConfig(
            perf_model=model,
            policy=policy,
            num_instances=self.num_instances,
            mode=self.mode,
            slo_tpt_ms=parse_slo_ms(f"{published.SLO_RATIO}x", model),
            seed=seed,
            max_num_seqs=published.MAX_BATCH,
            response_tokens=published.RESPONSE_TOKENS,
        )

    def workload(self, rate: float) -> Workload:
        return Workload(
            lengths="instruct",
            rate=rate,
            duration_s=self.duration_s,
            num_adapters=self.num_adapters,
            ranks=published.RANKS,
        )

    def job(self, form: str, policy: str, rate: float, seed: int) -> SimJob:
        config = self.config(form, policy, seed)
        if not self.trace:
            return SimJob(config, self.workload(rate))
        options = TraceOptions(
            ranks=published.RANKS, lengths="instruct", rate=rate, duration_s=self.duration_s, seed=seed
        )
        return SimJob(config, load_trace(Path(self.trace), options))


@dataclass(frozen=True)
class RunRecord:
    """One run. `tpt_quantiles`, ms: at 401 evenly spaced shares of the requests. `key` names all that decided
    the result.
    """

    key: str
    form: str
    policy: str
    rate: float
    seed: int
    slo_ms: float
    summary: RunSummary
    tpt_quantiles: list[float] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        return self.summary.slo_attainment


Case = tuple[str, str, float, int]
"""Form, policy, rate, seed."""


def cases_of(spec: FleetSpec) -> list[Case]:
    return [
        (form, policy, rate, seed)
        for rate in spec.rates
        for form in FORMS
        for policy in spec.policies
        for seed in range(spec.seeds)
    ]


def run_fleet(
    spec: FleetSpec,
    *,
    num_processes: int = 1,
    kept: Path | None = None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[RunRecord]:
    """All cases; `on_progress` is given the share that is done.

    With `kept`, a file of one record per line, runs that stand there are taken from it and new ones added, so
    that a long series can be stopped and gone on with. Raises what `run_jobs` raises.
    """
    cases = cases_of(spec)
    records = {record.key: record for record in _read(kept)}
    keys = {case: _key(spec, case) for case in cases}
    missing = [case for case in cases if keys[case] not in records]
    num_processes = max(1, num_processes)
    for start in range(0, len(missing), num_processes):
        chunk = missing[start : start + num_processes]
        results = run_jobs(
            [spec.job(*case) for case in chunk],
            num_processes=num_processes,
            on_progress=lambda i, share, start=start: on_progress((start + i + share) / len(missing)),  # type: ignore[misc]
        )
        for case, result in zip(chunk, results):
            record = records[keys[case]] = _record(keys[case], case, result)
            _append(kept, record)
    return [records[keys[case]] for case in cases]


def _key(spec: FleetSpec, case: Case) -> str:
    form, policy, rate, seed = case
    source = (spec.trace, spec.duration_s) if spec.trace else spec.workload(rate)
    settings = msgspec.json.encode((__version__, spec.config(form, policy, seed), rate, source))
    return hashlib.sha256(settings).hexdigest()[:16]


def _record(key: str, case: Case, result: SimResult) -> RunRecord:
    form, policy, rate, seed = case
    summary = replace(summarize_run(result), rank_mix=[])
    tpt = latencies_of(result).tpt
    quantiles = [round(float(q), 3) for q in np.quantile(tpt, QUANTILES)] if len(tpt) else []
    return RunRecord(key, form, policy, rate, seed, result.config.slo_tpt_ms, summary, quantiles)


def _read(kept: Path | None) -> Iterable[RunRecord]:
    if kept is None or not kept.exists():
        return []
    return [msgspec.json.decode(line, type=RunRecord) for line in kept.read_bytes().splitlines()]


def _append(kept: Path | None, record: RunRecord) -> None:
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")


def select(records: Sequence[RunRecord], **wanted: object) -> list[RunRecord]:
    """The records whose fields have these values."""
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]


def attainment(records: Sequence[RunRecord]) -> float:
    """Mean over seeds."""
    return float(np.mean([record.attainment for record in records]))


def mean_tpt_ms(records: Sequence[RunRecord]) -> float:
    return float(np.mean([record.summary.tpt_ms.mean for record in records]))


def load_that_breaks(records: Sequence[RunRecord], share: float) -> tuple[float, bool]:
    """The load, requests/s, at which a policy's attainment falls below `share`, linear between the rates that
    were run, and whether it does; otherwise the largest rate. Records of one form and one policy.
    """
    rates = sorted({record.rate for record in records})
    points = [(rate, attainment(select(records, rate=rate))) for rate in rates]
    if points[0][1] < share:
        return points[0][0], True
    for (low, before), (high, after) in pairwise(points):
        if after < share:
            return low + (high - low) * (before - share) / (before - after), True
    return rates[-1], False
