"""Calibrate, play, simulate, compare: all in one run, since a machine's speed drifts."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from toppings.cluster.perf_model import PerfModel
from toppings.engine.engine import Engine
from toppings.lab.batches.driver import BatchDriver
from toppings.lab.batches.plan import decode_batches, prefill_batches
from toppings.lab.batches.steps import OnProgress
from toppings.lab.players.engine import EnginePlayer, PlayedStep, WallClock
from toppings.lab.players.simulator import SimulatorPlayer
from toppings.lab.validation.calibration import (
    Batches,
    StepBench,
    Timed,
    drift,
    fit,
    measure_loads,
    simulated_batches,
)
from toppings.lab.validation.comparison import LoadResult, Replay
from toppings.lab.validation.loads import LOADS, MEAN_PROMPT, ValidationLoad
from toppings.lab.validation.world import World, make_world
from toppings.sim.settings import SimConfig
from toppings.sim.trace import Trace
from toppings.synth import AdapterShape

NUM_ROUGH = 12
ROUGH_TOKENS = 3 * MEAN_PROMPT
ORIGIN = "measured between the loads of a validation"


@dataclass(frozen=True, kw_only=True)
class ValidationSpec:
    """`model`: a checkpoint's directory (empty: random weights of the shape `preset`). `num_requests`: of
    each load; `num_batches`: so many different ones of each kind are timed for it; `num_threads`: the
    engine's.
    """

    model: str = ""
    preset: str = "small-211m"
    num_adapters: int = 24
    adapters: AdapterShape = field(default_factory=AdapterShape)
    num_requests: int = 40
    replays: int = 3
    num_batches: int = 40
    num_threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_adapters", "num_requests", "replays", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def validate(spec: ValidationSpec, on_progress: OnProgress = lambda *_: None) -> list[LoadResult]:
    """To be called by the main thread, as an engine's process calls its own: OpenMP is slower in others.

    Raises what `make_world` and `build_engine` raise.
    """
    on_progress("making the model and its adapters", 0.0)
    settings = {"num_threads": spec.num_threads, "seed": spec.seed}
    with (
        make_world(spec.model, spec.preset, spec.adapters, spec.num_adapters, **settings) as world,
        ExitStack() as engines,
    ):
        return _Validation(spec, world, engines, on_progress).run()


@dataclass(eq=False)
class _Prepared:
    """A load that can be played; `bench` times batches of another trace of the same kind."""

    load: ValidationLoad
    settings: dict[str, Any]
    config: SimConfig
    engine: Engine | None  # None: each replay needs a fresh one, whose device is empty
    rate: float
    trace: Trace
    bench: StepBench
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
        for number in range(self._spec.replays):
            for index, prepared in enumerate(loads):
                share = (number + index / len(loads)) / self._spec.replays
                self._on_progress(f"{prepared.load.name}, {number + 1} of {self._spec.replays}", share)
                prepared.replays.append(self._replay(prepared))
        return [
            LoadResult(p.load, p.rate, p.settings.get("link_gbps", 0.0), p.config, p.trace, p.replays)
            for p in loads
        ]

    # --- before ---

    def _make_driver(self) -> BatchDriver:
        """Of an engine whose cache has room for twice what any load's has."""
        self._on_progress("building engines", 0.0)
        max_num_seqs = 2 * max(load.max_num_seqs for load in LOADS)
        settings = {"mode": "cached", "max_num_seqs": max_num_seqs, "max_num_batched_tokens": self._chunk}
        engine = self._engines.enter_context(self._world.engine(**settings))
        return BatchDriver(engine, dict(zip(self._world.adapter_names, self._world.adapter_ids)))

    def _rough_model(self) -> PerfModel:
        """Of a few batches: good enough to say how often requests should arrive, and which batches
        they make."""
        self._on_progress("timing a few steps", 0.0)
        world, limits = self._world, self._driver.limits(self._chunk)
        ranks = dict(zip(world.adapter_names, world.ranks.tolist()))
        batches = Batches(
            decode_batches(ranks, limits, NUM_ROUGH, self._rng),
            prefill_batches(ranks, limits, NUM_ROUGH, ROUGH_TOKENS, self._rng),
        )
        return fit(StepBench(self._driver, batches, self._rng).time_all(), ORIGIN)

    def _prepare(self, load: ValidationLoad, rough: PerfModel) -> _Prepared:
        self._on_progress(f"an engine for {load.name}", 0.0)
        num, seed, world = self._spec.num_requests, self._spec.seed, self._world
        settings = load.settings(world, rough)
        kept = None
        if load.is_cold:
            with world.engine(**settings) as engine:
                config = world.sim_config(engine, rough, **settings)
                link = measure_loads(engine, world, MEAN_PROMPT)
            linked = replace(rough, link_gbps=link.gbps)
            config = replace(config, load_latency_ms=link.latency_ms, perf_model=linked)
        else:
            kept = self._engines.enter_context(world.engine(**settings))
            config = world.sim_config(kept, rough, **settings)
        rate = load.utilization * load.saturation_rate(num, config, world.ranks, seed)
        trace, other = (load.make_trace(num, rate, world.ranks, s) for s in (seed, seed + 1))
        batches = simulated_batches(config, other).sample(self._spec.num_batches, self._rng)
        bench = StepBench(self._driver, batches, self._rng)
        return _Prepared(load, settings, config, kept, rate, trace, bench)

    # --- again and again ---

    def _replay(self, prepared: _Prepared) -> Replay:
        if prepared.engine is not None:
            return self._play(prepared, prepared.engine)
        with self._world.engine(**prepared.settings) as engine:
            return self._play(prepared, engine)

    def _play(self, prepared: _Prepared, engine: Engine) -> Replay:
        """Batches are timed all the while, for a machine's speed changes within seconds; the load's clock
        stands still for that.
        """
        steps: list[PlayedStep] = []
        timed: list[Timed] = []

        def note(step: PlayedStep) -> None:
            steps.append(step)
            timed.extend(prepared.bench.time_beside(step.ms))

        player = EnginePlayer(engine, self._world.adapter_ids, WallClock(), on_step=note)
        outcomes = player.play(prepared.trace)
        model = replace(fit(timed, ORIGIN), link_gbps=prepared.config.perf_model.link_gbps)
        simulated = SimulatorPlayer(replace(prepared.config, perf_model=model)).play(prepared.trace)
        return Replay(outcomes, simulated, steps, model, drift(timed, model))
