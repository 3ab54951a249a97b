"""What steps and loads take on this machine now, measured on batches such as the loads make."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fitting import fit_linear
from toppings.cluster.perf_model import DECODE_FORMS, PREFILL_FORMS, LinearModel, PerfModel, batch_features
from toppings.core import Admission, Batch, BatchItem
from toppings.engine.engine import Engine
from toppings.lab.batches.driver import BatchDriver
from toppings.lab.batches.plan import Rows
from toppings.lab.validation.world import World
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace

Points = NDArray[np.float64]
FORM = "extended"
CALIBRATION_SHARE = 0.6
"""Time that goes to timing batches, over the time of a load's steps."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A batch of decodes or one of prefills, and what its step took, ms."""

    is_decode: bool
    rows: Rows
    ms: float


@dataclass(frozen=True)
class Batches:
    """Decode batches and prefill batches; a step that does both is one of each."""

    decode: list[Rows]
    prefill: list[Rows]

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

    def note(now: float, *, admits: bool = True) -> Batch:
        batch = schedule(now, admits=admits)
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
    """Times batches over and over, in an order drawn anew for each round."""

    def __init__(self, driver: BatchDriver, batches: Batches, rng: Generator) -> None:
        self._driver, self._rng = driver, rng
        self._visits = [(True, rows) for rows in batches.decode] + [(False, rows) for rows in batches.prefill]
        self._order: list[int] = []
        self._owed_s = 0.0

    def time_next(self) -> Timed:
        if not self._order:
            self._order = self._rng.permutation(len(self._visits)).tolist()
        is_decode, rows = self._visits[self._order.pop()]
        times = self._driver.decode_ms(rows) if is_decode else self._driver.prefill_ms(rows)
        return Timed(is_decode, rows, sum(times) / len(times))

    def time_all(self) -> list[Timed]:
        return [self.time_next() for _ in self._visits]

    def time_beside(self, ms: float) -> list[Timed]:
        """To be called after each step of a load, with what it took: a share of that goes to batches."""
        timed = []
        self._owed_s += CALIBRATION_SHARE * ms / 1e3
        while self._owed_s > 0:
            started_at = time.perf_counter()
            timed.append(self.time_next())
            self._owed_s -= time.perf_counter() - started_at
        return timed


def fit(steps: Sequence[Timed], origin: str) -> PerfModel:
    """By least squares over all of them, whose mean the model has: what counts for a load is the steps' sum.

    Raises ValueError where there is no step of a kind.
    """
    return PerfModel(
        origin=origin,
        decode_forms={FORM: _fit([s for s in steps if s.is_decode], DECODE_FORMS[FORM])},
        prefill_forms={FORM: _fit([s for s in steps if not s.is_decode], PREFILL_FORMS[FORM])},
        decode_form=FORM,
        prefill_form=FORM,
    )


def _fit(steps: Sequence[Timed], names: Sequence[str]) -> LinearModel:
    if not steps:
        raise ValueError("no step of a kind was timed; give the loads more requests")
    features = np.stack([batch_features(step.rows) for step in steps])
    return fit_linear(features, np.array([step.ms for step in steps]), names)


def drift(steps: Sequence[Timed], model: PerfModel) -> float:
    """By how much the machine was slower in the second half of these steps than in the first: 0.1 is 10 %."""
    first, second = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    return _slowness(second, model) / _slowness(first, model) - 1


def _slowness(steps: Sequence[Timed], model: PerfModel) -> float:
    """What they took over what the model says."""
    predicted = [(model.decode if s.is_decode else model.prefill).predict_batch(s.rows) for s in steps]
    return sum(step.ms for step in steps) / sum(predicted)


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
    return fit_link(np.array(points))


def fit_link(points: Points) -> LinkTimes:
    """Least squares over (bytes, ms) [N, 2]; neither part is below zero."""
    num_bytes, ms = points.T
    slope, latency_ms = np.polyfit(num_bytes, ms, 1) if len(set(num_bytes)) > 1 else (0.0, -1.0)
    if latency_ms < 0 or slope <= 0:
        slope, latency_ms = float((num_bytes @ ms) / (num_bytes @ num_bytes)), 0.0
    return LinkTimes(float(latency_ms), float(1 / (slope * 1e6)))
