"""Calibrate, play, simulate, compare: all in one run, since a machine's speed drifts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from toppings.bench.batch_driver import BatchDriver
from toppings.bench.batch_plan import decode_batches, prefill_batches
from toppings.bench.validation.calibration import (
    Batches,
    StepBench,
    Times,
    drift,
    measure_loads,
    simulated_batches,
)
from toppings.bench.validation.comparison import LoadResult, Replay
from toppings.bench.validation.loads import LOADS, MEAN_PROMPT, Load
from toppings.bench.validation.play import Step, Timings, play
from toppings.bench.validation.world import World, make_world
from toppings.cluster.perf_model import PerfModel
from toppings.engine.engine import Engine
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace
from toppings.synth import AdapterShape

OnProgress = Callable[[str], None]
"""Called with what begins now."""

NUM_ROUGH = 12
ROUGH_TOKENS = 3 * MEAN_PROMPT
ORIGIN = "measured between the loads of a validation"


@dataclass(frozen=True, kw_only=True)
class ValidationSpec:
    """`model`: a checkpoint's directory (empty: random weights of the shape `preset`). `seconds`: in which a
    load's requests arrive; `num_batches`: how many of each kind a round times; `num_threads`: the engine's.
    """

    model: str = ""
    preset: str = "small-211m"
    num_adapters: int = 24
    adapters: AdapterShape = field(default_factory=AdapterShape)
    seconds: float = 16.0
    replays: int = 3
    num_batches: int = 40
    num_threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_adapters", "replays", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds:g}; it must be above 0")


def validate(spec: ValidationSpec, on_progress: OnProgress = lambda _: None) -> list[LoadResult]:
    """To be called by the main thread, as an engine's process calls its own: OpenMP is slower in others.

    Raises what `make_world` and `build_engine` raise.
    """
    on_progress("making the model and its adapters")
    settings = {"num_threads": spec.num_threads, "seed": spec.seed}
    with (
        make_world(spec.model, spec.preset, spec.adapters, spec.num_adapters, **settings) as world,
        ExitStack() as engines,
    ):
        return _Validation(spec, world, engines, on_progress).run()


@dataclass(eq=False)
class _Prepared:
    """A load that can be played; `batches` are those of another trace of the same kind."""

    load: Load
    settings: dict[str, Any]
    config: SimConfig
    engine: Engine | None  # None: each replay needs a fresh one, whose device is empty
    rate: float
    trace: Trace
    batches: Batches
    replays: list[Replay] = field(default_factory=list)


class _Validation:
    def __init__(
        self, spec: ValidationSpec, world: World, engines: ExitStack, on_progress: OnProgress
    ) -> None:
        self._spec, self._world, self._engines, self._on_progress = spec, world, engines, on_progress
        self._rng = np.random.default_rng(spec.seed)
        self._chunk = max(load.chunk for load in LOADS)
        self._driver = self._make_driver()

    def run(self) -> list[LoadResult]:
        rough = self._rough_model()
        loads = [self._prepare(load, rough) for load in LOADS]
        num = self._spec.num_batches
        batches = sum((p.batches.sample(num, self._rng) for p in loads), Batches([], []))
        bench = StepBench(self._driver, batches.sample(num, self._rng), self._rng)
        before = self._take_round(bench)
        for number in range(self._spec.replays):
            for prepared in loads:
                self._on_progress(f"{prepared.load.name}, {number + 1} of {self._spec.replays}")
                timings, steps = self._play(prepared)
                after = self._take_round(bench)
                replay = _replay(
                    prepared, timings, steps, bench.fit([before, after], ORIGIN), drift(before, after)
                )
                prepared.replays.append(replay)
                before = after
        return [LoadResult(p.load, p.rate, p.config, p.trace, p.replays) for p in loads]

    # --- before ---

    def _make_driver(self) -> BatchDriver:
        """Of an engine whose cache has room for twice what any load's has."""
        self._on_progress("building engines")
        max_num_seqs = 2 * max(load.max_num_seqs for load in LOADS)
        settings = {"mode": "cached", "max_num_seqs": max_num_seqs, "max_num_batched_tokens": self._chunk}
        engine = self._engines.enter_context(_engine(self._world, settings))
        return BatchDriver(engine, dict(zip(self._world.adapter_names, self._world.adapter_ids)))

    def _rough_model(self) -> PerfModel:
        """Of a few batches: good enough to say how often requests should arrive, and which batches
        they make."""
        self._on_progress("timing a few steps")
        world, limits = self._world, self._driver.limits(self._chunk)
        ranks = dict(zip(world.adapter_names, world.ranks.tolist()))
        batches = Batches(
            decode_batches(ranks, limits, NUM_ROUGH, self._rng),
            prefill_batches(ranks, limits, NUM_ROUGH, ROUGH_TOKENS, self._rng),
        )
        bench = StepBench(self._driver, batches, self._rng)
        return bench.fit([bench.take_round()], ORIGIN)

    def _prepare(self, load: Load, rough: PerfModel) -> _Prepared:
        self._on_progress(f"{load.name}: an engine, and a rate")
        spec, world = self._spec, self._world
        settings = load.settings(world, rough)
        if load.is_cold:
            with _engine(world, settings) as engine:
                config = world.sim_config(engine, rough, **settings)
                link = measure_loads(engine, world, MEAN_PROMPT)
            config = replace(
                config, load_latency_ms=link.latency_ms, perf_model=replace(rough, link_gbps=link.gbps)
            )
            kept = None
        else:
            kept = self._engines.enter_context(_engine(world, settings))
            config = world.sim_config(kept, rough, **settings)
        rate = load.utilization * load.saturation_rate(config, world.ranks, spec.seed)
        trace, other = (
            load.make_trace(rate, spec.seconds, world.ranks, seed) for seed in (spec.seed, spec.seed + 1)
        )
        if not len(trace):
            raise ValueError(
                f"no request arrives within {spec.seconds:g} s at {rate:.3g}/s; give more seconds"
            )
        return _Prepared(load, settings, config, kept, rate, trace, simulated_batches(config, other))

    # --- again and again ---

    def _take_round(self, bench: StepBench) -> Times:
        self._on_progress("calibrating")
        return bench.take_round()

    def _play(self, prepared: _Prepared) -> tuple[Timings, list[Step]]:
        world = self._world
        if prepared.engine is not None:
            return play(prepared.engine, prepared.trace, world.adapter_ids)
        with _engine(world, prepared.settings) as engine:
            return play(engine, prepared.trace, world.adapter_ids)


@contextmanager
def _engine(world: World, settings: dict[str, Any]) -> Iterator[Engine]:
    engine = world.build(**settings)
    try:
        yield engine
        engine.check_integrity()
    finally:
        engine.close()


def _replay(
    prepared: _Prepared, timings: Timings, steps: list[Step], model: PerfModel, change: float
) -> Replay:
    model = replace(model, link_gbps=prepared.config.perf_model.link_gbps)
    result = Simulator(replace(prepared.config, perf_model=model), prepared.trace).run()
    return Replay(timings, Timings.of(result), steps, model, change)
