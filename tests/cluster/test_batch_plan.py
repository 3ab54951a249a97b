"""Which batches are timed, in which order, and whether costs can be told apart by them."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppings.cluster.fitting import MIN_OBSERVATIONS, fit_perf_model
from toppings.cluster.perf_model import DECODE_FORMS, FEATURES, LinearModel, PerfModel, batch_features
from toppings.config import ConfigError
from toppings.lab.batches.plan import Rows, StepLimits, decode_batches, prefill_batches
from toppings.lab.batches.steps import (
    MAX_ROUNDS,
    MAX_SECONDS,
    BatchProfile,
    BatchSpec,
    StepTimes,
    take_rounds,
)

ADAPTERS = {f"a{i}": (8, 16, 32, 64)[i % 4] for i in range(32)}
LIMITS = StepLimits(64, 2048, 4096, 20_000)
TRUE = LinearModel(dict(zip(FEATURES, (20.0, 0.5, 0.001, 0.004, 0.01, 0.002, 0.5, 0.02), strict=True)))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plan(num: int = 64) -> tuple[list[Rows], list[Rows]]:
    return decode_batches(ADAPTERS, LIMITS, num, rng(1)), prefill_batches(ADAPTERS, LIMITS, num, 500, rng(2))


class FakeMachine:
    """A clock, and steps that take what `TRUE` says, longer and longer by `drift` per second."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now = 0.0
        self.drift = drift
        self.visits: list[Rows] = []

    def clock(self) -> float:
        return self.now

    def run(self, rows: Rows) -> list[float]:
        self.visits.append(rows)
        ms = TRUE.predict_batch(rows) * (1 + self.drift * self.now)
        self.now += ms / 1e3
        return [ms]

    def measure(self, seconds: float, *plans: list[Rows]) -> tuple[list[StepTimes], int]:
        kinds = [StepTimes(batches, self.run) for batches in plans]
        return kinds, take_rounds(kinds, seconds, rng(), lambda *_: None, clock=self.clock)

    def fit(self, seconds: float) -> PerfModel:
        kinds, _ = self.measure(seconds, *plan())
        return fit_perf_model(*(kind.observations() for kind in kinds), origin="made up")


limits = st.builds(
    StepLimits, st.integers(1, 200), st.integers(1, 4096), st.integers(8, 8192), st.integers(64, 50_000)
)


@given(limits, st.integers(0, 99))
def test_every_batch_fits_one_step(limits: StepLimits, seed: int) -> None:
    decodes = decode_batches(ADAPTERS, limits, 12, rng(seed))
    for rows in decodes:
        assert all((row.num_tokens, row.num_context >= 1) == (1, True) for row in rows)
    prefills = prefill_batches(ADAPTERS, limits, 12, 500, rng(seed))
    for rows in (*decodes, *prefills):
        lengths = [row.num_tokens + row.num_context for row in rows]
        assert 1 <= len(rows) <= limits.max_num_seqs
        assert max(lengths) < limits.max_model_len
        assert sum(lengths) <= limits.max_cached_tokens + len(rows)
        assert all(row.rank == (ADAPTERS[row.adapter] if row.adapter else 0) for row in rows)
    for rows in prefills:
        assert sum(row.num_tokens for row in rows) <= max(2, min(500, limits.max_num_batched_tokens))


def test_no_feature_follows_from_the_others() -> None:
    decodes, prefills = plan()
    for batches, names in ((decodes, DECODE_FORMS["extended"]), (prefills, FEATURES)):
        columns = np.stack([batch_features(rows) for rows in batches])[:, [FEATURES.index(n) for n in names]]
        for i, name in enumerate(names[1:], 1):
            others = np.delete(columns, i, axis=1)
            residual = columns[:, i] - others @ np.linalg.lstsq(others, columns[:, i], rcond=None)[0]
            assert residual.std() > 0.1 * columns[:, i].std(), name


def test_adapters_are_shared_in_some_batches_and_distinct_in_others() -> None:
    shares = [len({row.adapter for row in rows}) / len(rows) for rows in plan()[0] if len(rows) >= 8]
    assert min(shares) < 0.2
    assert max(shares) > 0.7


def test_every_batch_is_run_once_a_round_in_another_order() -> None:
    decodes, prefills = plan(10)
    machine = FakeMachine()
    _, num_rounds = machine.measure(1e3, decodes, prefills)
    assert num_rounds == MAX_ROUNDS
    orders = [machine.visits[i : i + 20] for i in range(0, 20 * MAX_ROUNDS, 20)]
    assert all(Counter(order) == Counter(decodes + prefills) for order in orders)
    assert len({tuple(order) for order in orders}) == MAX_ROUNDS


def test_time_is_kept() -> None:
    machine = FakeMachine()
    machine.measure(5.0, *plan())
    assert 5.0 < machine.now < 5.0 + 2.0  # at most the step that was under way


@pytest.mark.parametrize(
    ("slowness", "is_enough"), [(1.0, True), (2000.0, False)], ids=["slow", "hopelessly slow"]
)
def test_a_slow_machine_is_measured_until_a_fit_is_possible_or_the_limit(
    slowness: float, is_enough: bool
) -> None:
    class Slow(FakeMachine):
        def run(self, rows: Rows) -> list[float]:
            self.now += slowness
            return super().run(rows)

    machine = Slow()
    kinds, _ = machine.measure(0.1, *plan())
    assert all(kind.is_enough for kind in kinds) == is_enough
    assert min(len(kind.observations()) for kind in kinds) in ((MIN_OBSERVATIONS,) if is_enough else (0, 1))
    assert is_enough or machine.now > MAX_SECONDS


def test_costs_are_found_from_the_planned_batches() -> None:
    model = FakeMachine().fit(1e3)
    assert model.prefill.vector == pytest.approx(TRUE.vector, rel=1e-3)
    assert model.decode_forms["extended"].fit.r2 == pytest.approx(1.0)  # type: ignore[union-attr]


def test_a_machine_that_slows_down_by_a_quarter_slows_all_costs_alike() -> None:
    steady, drifting = FakeMachine().fit(60.0), FakeMachine(drift=0.25 / 60).fit(60.0)
    ratios = [
        drifting.decode.coefficients[name] / steady.decode.coefficients[name]
        for name in ("steps", "tokens", "context_tokens")
    ]
    assert 1.0 < min(ratios) < max(ratios) < min(1.25, 1.05 * min(ratios))
    assert drifting.decode.fit.r2 > 0.98  # type: ignore[union-attr]


def test_held_out_steps_in_the_json_are_those_the_model_was_judged_on() -> None:
    kinds, _ = FakeMachine(drift=0.02).measure(60.0, *plan())
    decode, prefill = (kind.observations() for kind in kinds)
    model = fit_perf_model(decode, prefill, origin="made up", seed=5)
    content = BatchProfile(model, decode, prefill, seed=5).to_json()
    for kind, form in (("decode", model.decode), ("prefill", model.prefill)):
        steps = [step for step in content["steps"][kind] if step["is_held_out"]]
        ms = np.array([step["ms"] for step in steps])
        error = form.predict(np.array([step["features"] for step in steps])) - ms
        assert form.fit is not None
        assert len(steps) == form.fit.num_held_out
        assert 1 - error @ error / ((ms - ms.mean()) ** 2).sum() == pytest.approx(form.fit.r2, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchSpec(seconds=0), "seconds is 0; it must be above 0, at most 240"),
        (lambda: BatchSpec(seconds=1e4), "seconds is 10000"),
        (lambda: BatchSpec(ranks=(0,)).adapters, "each must be at least 1"),
        (lambda: BatchSpec(targets=("z",)).adapters, "target 'z' is unknown"),
    ],
)
def test_bad_specification_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make()
