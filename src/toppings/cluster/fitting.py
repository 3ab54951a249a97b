"""Fits performance models to measured steps, by least squares, and judges them on held-out ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.perf_model import (
    DECODE_FORMS,
    FEATURES,
    PREFILL_FORMS,
    FitReport,
    FloatArray,
    LinearModel,
    PerfModel,
    batch_features,
)

MIN_OBSERVATIONS = 8
HELD_OUT_SHARE = 0.3
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured step: what was in its batch, and the ms it took."""

    rows: tuple[BatchRow, ...]
    ms: float


def fit_perf_model(
    decode: Sequence[Observation],
    prefill: Sequence[Observation],
    *,
    origin: str,
    held_out_share: float = HELD_OUT_SHARE,
    seed: int = 0,
) -> PerfModel:
    """Every form fitted to the same batches; the one with the best held-out R2 is the one that is used.

    Raises ValueError where there are fewer than `MIN_OBSERVATIONS` steps of a kind.
    """
    decode_forms = _fit_forms(decode, DECODE_FORMS, "decode", held_out_share, seed)
    prefill_forms = _fit_forms(prefill, PREFILL_FORMS, "prefill", held_out_share, seed)
    return PerfModel(
        origin=origin,
        decode_forms=decode_forms,
        prefill_forms=prefill_forms,
        decode_form=_best(decode_forms),
        prefill_form=_best(prefill_forms),
    )


def _fit_forms(
    observations: Sequence[Observation],
    forms: dict[str, tuple[str, ...]],
    kind: str,
    held_out_share: float,
    seed: int,
) -> dict[str, LinearModel]:
    if len(observations) < MIN_OBSERVATIONS:
        raise ValueError(f"{len(observations)} {kind} steps to fit; at least {MIN_OBSERVATIONS} are needed")
    features = np.stack([batch_features(o.rows) for o in observations])
    ms = np.array([o.ms for o in observations])
    fitted, held_out = hold_out(len(ms), held_out_share, seed)
    models = {}
    for form, names in forms.items():
        model = fit_linear(features[fitted], ms[fitted], names)
        report = evaluate(model, features[held_out], ms[held_out], num_fitted=len(fitted))
        models[form] = LinearModel(model.coefficients, report)
    return models


def hold_out(num: int, share: float = HELD_OUT_SHARE, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Which of `num` steps are fitted to, and which are held out of the fit to judge it: indices of both."""
    order = np.random.default_rng(seed).permutation(num)
    num_held_out = max(2, round(share * num))
    return order[num_held_out:], order[:num_held_out]


def fit_linear(
    features: FloatArray, ms: FloatArray, names: Sequence[str], *, non_negative: bool = True
) -> LinearModel:
    """Least squares of `ms` [N] on the named columns of `features` [N, F].

    With `non_negative` no coefficient is below zero: of the unconstrained solutions over subsets of the
    columns, the best that happens to be non-negative, which is the exact optimum (all are tried, being few).
    """
    columns = [FEATURES.index(name) for name in names]
    subsets = (
        subset
        for size in range(len(columns), 0, -1)
        for subset in combinations(columns, size)
        if non_negative or size == len(columns)
    )
    best: tuple[float, dict[str, float]] = (float(ms @ ms), {})
    for subset in subsets:
        solution = _solve(features[:, subset], ms)
        if non_negative and (solution < 0).any():
            continue
        residual = ms - features[:, subset] @ solution
        coefficients = {FEATURES[i]: float(c) for i, c in zip(subset, solution, strict=True)}
        best = min(best, (float(residual @ residual), coefficients), key=lambda fit: fit[0])
    return LinearModel(best[1])


def _solve(columns: FloatArray, ms: FloatArray) -> FloatArray:
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)  # token counts dwarf the constant column
    solution: FloatArray = np.linalg.lstsq(columns / scale, ms, rcond=None)[0] / scale
    return solution


def evaluate(model: LinearModel, features: FloatArray, ms: FloatArray, *, num_fitted: int) -> FitReport:
    """R2 (1 - residual / variance) and mean |error| / measured on `features` [N, F] and `ms` [N]."""
    error = model.predict(features) - ms
    spread = ms - ms.mean()
    variance = float(spread @ spread)
    r2 = 1 - float(error @ error) / variance if variance > 0 else float(not error.any())
    return FitReport(r2, float(np.mean(np.abs(error) / ms)), num_fitted, len(ms))


def _best(forms: dict[str, LinearModel]) -> str:
    return max(forms, key=lambda form: forms[form].fit.r2 if forms[form].fit else 0.0)  # type: ignore[union-attr]
