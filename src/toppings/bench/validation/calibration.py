"""What steps and loads take on this machine, measured between the loads, on batches such as they make."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from toppings.bench.batch_driver import BatchDriver
from toppings.bench.batch_plan import Rows
from toppings.bench.validation.world import World
from toppings.cluster.fitting import fit_linear
from toppings.cluster.perf_model import (
    DECODE_FORMS,
    PREFILL_FORMS,
    BatchRow,
    LinearModel,
    PerfModel,
    batch_features,
)
from toppings.core import AddRequest, Admission, Batch, BatchItem, SamplingParams
from toppings.engine.engine import Engine
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace

Times = NDArray[np.float64]
FORM = "extended"


@dataclass(frozen=True)
class Batches:
    """Decode batches and prefill batches; a step that does both is one of each."""

    decode: list[Rows]
    prefill: list[Rows]

    def __add__(self, other: "Batches") -> "Batches":
        return Batches(self.decode + other.decode, self.prefill + other.prefill)

    def sample(self, num: int, rng: Generator) -> "Batches":
        """At most `num` of each kind."""
        return Batches(*(_sample(kind, num, rng) for kind in (self.decode, self.prefill)))


def _sample(batches: list[Rows], num: int, rng: Generator) -> list[Rows]:
    return [batches[i] for i in rng.choice(len(batches), min(num, len(batches)), replace=False)]


def simulated_batches(config: SimConfig, trace: Trace) -> Batches:
    """The batches of every step that the simulated server runs; adapters are named as in the trace."""
    simulator, batches = Simulator(replace(config, is_stepwise=True), trace), Batches([], [])
    scheduler = simulator.instances[0].scheduler
    schedule = scheduler.schedule

    def note(now: float) -> Batch:
        batch = schedule(now)
        for kind, is_decode in ((batches.decode, True), (batches.prefill, False)):
            rows = tuple(_row(item, trace) for item in batch.items if item.is_decode == is_decode)
            if rows:
                kind.append(rows)
        return batch

    scheduler.schedule = note  # type: ignore[method-assign]
    simulator.run()
    return batches


def _row(item: BatchItem, trace: Trace) -> BatchRow:
    adapter = item.request.adapter_id
    assert adapter is not None
    name, rank = trace.adapter_names[adapter], int(trace.ranks[adapter])
    return BatchRow(rank, name, item.num_tokens, item.request.num_computed_tokens)


class StepBench:
    """Times the same batches round after round, in an order drawn anew for each."""

    def __init__(self, driver: BatchDriver, batches: Batches, rng: Generator) -> None:
        self._driver, self._batches, self._rng = driver, batches, rng
        self._visits = [
            (is_decode, i) for is_decode in (True, False) for i in range(len(self._of(is_decode)))
        ]

    def _of(self, is_decode: bool) -> list[Rows]:
        return self._batches.decode if is_decode else self._batches.prefill

    def take_round(self) -> Times:
        """ms of each batch [B], decode batches first."""
        times = np.zeros(len(self._visits))
        for number in self._rng.permutation(len(times)):
            is_decode, index = self._visits[number]
            time_ms = self._driver.decode_ms if is_decode else self._driver.prefill_ms
            times[number] = np.mean(time_ms(self._of(is_decode)[index]))
        return times

    def fit(self, rounds: Sequence[Times], origin: str) -> PerfModel:
        """A model of the mean over the rounds: what counts for a load is the sum of its steps."""
        ms, num_decode = np.mean(rounds, axis=0), len(self._batches.decode)
        return PerfModel(
            origin=origin,
            decode_forms={FORM: _fit(self._batches.decode, ms[:num_decode], DECODE_FORMS[FORM])},
            prefill_forms={FORM: _fit(self._batches.prefill, ms[num_decode:], PREFILL_FORMS[FORM])},
            decode_form=FORM,
            prefill_form=FORM,
        )


def _fit(batches: list[Rows], ms: Times, features: Sequence[str]) -> LinearModel:
    return fit_linear(np.stack([batch_features(rows) for rows in batches]), ms, features)


def drift(before: Times, after: Times) -> float:
    """By how much the same batches took longer: 0.1 is 10 %."""
    return float(after.sum() / before.sum() - 1)


@dataclass(frozen=True)
class LinkTimes:
    """A load takes `latency_ms` and its bytes at `gbps`, 10^9 bytes per second."""

    latency_ms: float
    gbps: float


def measure_loads(engine: Engine, world: World, num_tokens: int) -> LinkTimes:
    """Loads every adapter while a step prefills `num_tokens` with it, as a load of the engine's mode does.

    The device must have room for some of the adapters only. Raises RuntimeError where none is cold.
    """
    names = count()
    points = []
    for adapter_id in world.adapter_ids:
        if engine.adapters.try_acquire(adapter_id, 0.0) is not Admission.READY:
            raise RuntimeError(f"adapter {adapter_id} finds no room on a device that nobody uses")
        load = engine.adapters.load_of(adapter_id)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest(f"load-{next(names)}", [1] * num_tokens, sampling, adapter_id))
        while engine.has_requests:
            engine.step()
        engine.adapters.release(adapter_id)
        engine.poll()
        if load is not None and (landed_at := load.landed_at[-1]) is not None:
            points.append((load.num_bytes, (landed_at - load.started_at) * 1e3))
    if not points:
        raise RuntimeError("every adapter was on the device already: its loads cannot be timed")
    return _fit_link(np.array(points))


def _fit_link(points: Times) -> LinkTimes:
    """Least squares over (bytes, ms) [N, 2]; neither part is below zero."""
    num_bytes, ms = points.T
    slope, latency_ms = np.polyfit(num_bytes, ms, 1) if len(set(num_bytes)) > 1 else (0.0, -1.0)
    if latency_ms < 0 or slope <= 0:
        slope, latency_ms = float((num_bytes @ ms) / (num_bytes @ num_bytes)), 0.0
    return LinkTimes(float(latency_ms), 1 / (slope * 1e6))
