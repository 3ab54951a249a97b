"""How far the simulator is from the engine, and whether that is within the aims."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from toppings.cluster.perf_model import PerfModel, batch_features
from toppings.lab.outcome import Outcome
from toppings.lab.players.engine import PlayedStep
from toppings.lab.summary import Latencies, summarize
from toppings.lab.validation.loads import ValidationLoad
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

    engine: list[Outcome]
    simulated: list[Outcome]
    steps: list[PlayedStep]
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

    def _predict(self, step: PlayedStep) -> float:
        return self.model.step_ms(decode=batch_features(step.decode), prefill=batch_features(step.prefill))

    def errors(self) -> dict[str, float]:
        """Simulated over measured, less 1, by measure."""
        engine, simulated = measures(self.engine), measures(self.simulated)
        return {name: simulated[name] / value - 1 for name, value in engine.items()}


@dataclass(frozen=True)
class MeasureError:
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
    load: ValidationLoad
    rate: float
    link_gbps: float  # of the emulated link; 0: none
    config: SimConfig
    trace: Trace
    replays: list[Replay]

    def comparisons(self) -> list[MeasureError]:
        engine = [measures(replay.engine) for replay in self.replays]
        simulated = [measures(replay.simulated) for replay in self.replays]
        errors = [replay.errors() for replay in self.replays]
        rows = []
        for name in engine[0]:
            values = [measured[name] for measured in engine]
            rows.append(
                MeasureError(
                    name,
                    median(values),
                    median(s[name] for s in simulated),
                    median(e[name] for e in errors),
                    (max(values) - min(values)) / median(values),
                    AIMS.get(name),
                )
            )
        return rows


def measures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Generated tokens per second from the first arrival to the last token; latencies in ms."""
    named = {THROUGHPUT: summarize(outcomes).tokens_per_s}
    for name, stats in Latencies.of(outcomes).stats().items():
        named |= {f"{name.upper()} {kind}": value for kind, value in stats.named().items()}
    return named


def misses(results: Sequence[LoadResult]) -> list[tuple[str, MeasureError]]:
    """What is not within its aim, with the name of its load."""
    return [(r.load.name, c) for r in results for c in r.comparisons() if not c.is_within]
