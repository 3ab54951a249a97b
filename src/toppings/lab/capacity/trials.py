"""Simulations that a plan rests on: each is run once, several at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from toppings.cluster.fleet import Fleet
from toppings.cluster.placement.demand import Demand
from toppings.cluster.placement.sizing import desired_instances
from toppings.cluster.snapshot import InstanceSnapshot
from toppings.lab.capacity.spec import Design, PlanSpec
from toppings.lab.simulation.metrics import attainment_of, latencies_of
from toppings.lab.summary import Stats
from toppings.sim.records import SimResult
from toppings.sim.runs import SimJob
from toppings.sim.settings import SimConfig
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

RunJobs = Callable[[str, Sequence[SimJob]], list[SimResult]]
"""Runs jobs; the text says what for."""


@dataclass(frozen=True, slots=True)
class Trial:
    """`load` times the source's rate; with `loses_one` a server dies half-way."""

    design: Design
    num_instances: int
    load: float
    seed: int
    loses_one: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """`attainment`: share of the requests within the objectives; those that were refused or lost are not.
    Tokens per second over the time in which requests arrived."""

    attainment: float
    ttft_p99_ms: float
    tpt_p99_ms: float
    prompt_tokens_per_s: float
    response_tokens_per_s: float

    @classmethod
    def of(cls, result: SimResult, spec: PlanSpec, duration_s: float) -> "Outcome":
        latencies = latencies_of(result)
        ttft, tpt = Stats.of(latencies.ttft), Stats.of(latencies.tpt)
        return cls(
            attainment_of(result, spec.slo_ttft_ms, spec.slo_tpt_ms),
            ttft.p99,
            tpt.p99,
            float(result.num_prompt_tokens.sum()) / duration_s,
            float(result.num_tokens.sum()) / duration_s,
        )


class Trials:
    """`source_of`: by seed, what is played at load 1, `rate` requests/s. Raises ValueError where it holds no
    request.
    """

    def __init__(
        self, spec: PlanSpec, base: SimConfig, source_of: Callable[[int], Trace | Workload], run: RunJobs
    ) -> None:
        self.spec, self._base, self._source_of, self._run = spec, base, source_of, run
        self._sources: dict[int, Trace | Workload] = {}
        self._outcomes: dict[Trial, Outcome] = {}
        source = self._source(base.seed)
        self.rate = source.rate
        self.sample = source.make_trace(base.seed) if isinstance(source, Workload) else source
        if not len(self.sample):
            raise ValueError(f"{self.sample.origin} has no requests; a fleet is planned for some")

    def __len__(self) -> int:
        return len(self._outcomes)

    def outcomes(self, purpose: str, trials: Sequence[Trial]) -> list[Outcome]:
        """Of each, in their order."""
        new = [trial for trial in dict.fromkeys(trials) if trial not in self._outcomes]
        jobs = [self._job(trial) for trial in new]
        for trial, job, result in zip(new, jobs, self._run(purpose, jobs) if jobs else [], strict=True):
            self._outcomes[trial] = Outcome.of(result, self.spec, job.source.duration_s)
        return [self._outcomes[trial] for trial in trials]

    def of_design(self, design: Design) -> dict[Trial, Outcome]:
        """Those at full strength that were run."""
        return {t: o for t, o in self._outcomes.items() if t.design == design and not t.loses_one}

    def fits(self, design: Design) -> bool:
        """Whether the pool holds the largest adapter."""
        largest = int(self.sample.ranks[self.sample.adapters].max())
        return self._base.mode == "cached" or self._base.adapter_bytes(largest) <= self.spec.pool_bytes(
            design
        )

    def guess(self, design: Design) -> int:
        """How many servers the load needs by its means and spreads alone: where simulations begin."""
        config, trace = self.spec.config(self._base, design), self.sample
        server = InstanceSnapshot(
            instance_id="any",
            perf_model=config.perf_model,
            kv_tokens_total=config.num_pages * config.page_size,
            max_num_seqs=config.max_num_seqs,
            adapter_bytes_total=float("inf") if config.mode == "cached" else config.device_pool_bytes,
        )
        return desired_instances(demand_of(trace, config), Fleet([server]), self.spec.slo_tpt_ms)

    def _source(self, seed: int) -> Trace | Workload:
        if seed not in self._sources:
            self._sources[seed] = self._source_of(seed)
        return self._sources[seed]

    def _job(self, trial: Trial) -> SimJob:
        source = self._source(trial.seed)
        rate = source.rate * trial.load
        scaled = replace(source, rate=rate) if isinstance(source, Workload) else source.scaled_to(rate)
        kill_at_s = scaled.duration_s / 2 if trial.loses_one else 0.0
        config = self.spec.config(self._base, trial.design)
        config = replace(config, num_instances=trial.num_instances, seed=trial.seed, kill_at_s=kill_at_s)
        return SimJob(config, scaled)


def demand_of(trace: Trace, config: SimConfig) -> Demand:
    """What a meter would have counted over all of a trace."""
    counts = np.bincount(trace.adapters, minlength=len(trace.ranks))
    used = np.flatnonzero(counts)
    prompts, responses = (
        np.bincount(trace.adapters, weights=tokens, minlength=len(trace.ranks))[used] / counts[used]
        for tokens in (trace.prompt_tokens, trace.response_tokens)
    )
    ranks = trace.ranks[used].astype(np.float64)
    return Demand(
        [trace.adapter_names[a] for a in used.tolist()],
        counts[used] / trace.duration_s,
        prompts,
        responses,
        ranks,
        ranks * config.bytes_per_rank,
    )
