"""How far the simulator is from the engine, and whether that is within the aims."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from toppings.cluster.perf_model import PerfModel, batch_features
from toppings.lab.simulation.metrics import Stats
from toppings.lab.validation.loads import Load
from toppings.lab.validation.play import Step, Timings
from toppings.sim.settings import SimConfig
from toppings.sim.trace import Trace

THROUGHPUT = "tokens/s"
AIMS = {THROUGHPUT: 0.05, "TTFT mean": 0.10, "TPT mean": 0.10} | dict.fromkeys(
    ("TTFT p99", "TPT p99", "E2E p99"), 0.20
)
"""Largest relative error that is aimed at; what is not named here is shown without an aim."""


@dataclass(frozen=True, eq=False)
class Replay:
    """One time through the engine, and the simulation with the model that was measured meanwhile.

    `drift`: by how much the machine was slower in the second half of it than in the first.
    """

    engine: Timings
    simulated: Timings
    steps: list[Step]
    model: PerfModel
    drift: float

    @property
    def step_error(self) -> float:
        """The model's time for the very steps that the engine ran, over what they took, less 1; but for
        steps with a load.
        """
        steps = [step for step in self.steps if not step.is_cold]
        predicted = sum(self._predict(step) for step in steps)
        return predicted / sum(step.ms for step in steps) - 1

    def _predict(self, step: Step) -> float:
        return self.model.step_ms(decode=batch_features(step.decode), prefill=batch_features(step.prefill))

    def errors(self) -> dict[str, float]:
        """Simulated over measured, less 1, by measure."""
        engine, simulated = measures(self.engine), measures(self.simulated)
        return {name: simulated[name] / value - 1 for name, value in engine.items()}


@dataclass(frozen=True)
class Comparison:
    """One measure, as medians over the replays. `spread`: how far the engine's own replays are apart, over
    their median.
    """

    measure: str
    engine: float
    simulated: float
    error: float
    spread: float
    aim: float | None

    @property
    def is_within(self) -> bool:
        return self.aim is None or abs(self.error) <= self.aim


@dataclass(frozen=True, eq=False)
class LoadResult:
    load: Load
    rate: float
    link_gbps: float  # of the emulated link; 0: none
    config: SimConfig
    trace: Trace
    replays: list[Replay]

    def comparisons(self) -> list[Comparison]:
        engine = [measures(replay.engine) for replay in self.replays]
        simulated = [measures(replay.simulated) for replay in self.replays]
        errors = [replay.errors() for replay in self.replays]
        rows = []
        for name in engine[0]:
            values = [measured[name] for measured in engine]
            rows.append(
                Comparison(
                    name,
                    median(values),
                    median(s[name] for s in simulated),
                    median(e[name] for e in errors),
                    (max(values) - min(values)) / median(values),
                    AIMS.get(name),
                )
            )
        return rows


def measures(timings: Timings) -> dict[str, float]:
    """Generated tokens per second from the first arrival to the last token; latencies in ms."""
    span_s = float(timings.ended_at.max() - timings.arrived_at.min())
    named = {THROUGHPUT: float(timings.num_tokens.sum()) / span_s}
    for name, ms in latencies_ms(timings).items():
        stats = Stats.of(ms)
        named |= {f"{name} {kind}": getattr(stats, kind) for kind in ("mean", "p50", "p99")}
    return named


def latencies_ms(timings: Timings) -> "dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]":
    """Of each request [N]; TPT is E2E over generated tokens."""
    e2e = (timings.ended_at - timings.arrived_at) * 1e3
    ttft = (timings.first_token_at - timings.arrived_at) * 1e3
    return {"TTFT": ttft, "TPT": e2e / timings.num_tokens, "E2E": e2e}


def misses(results: Sequence[LoadResult]) -> list[tuple[str, Comparison]]:
    """What is not within its aim, with the name of its load."""
    return [(r.load.name, c) for r in results for c in r.comparisons() if not c.is_within]
