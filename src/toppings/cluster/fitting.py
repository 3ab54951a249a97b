"""Fits performance models to measured steps, by least squares, and judges them on held-out ones."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from toppings.least_squares import fit_non_negative

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


def fit_linear(features: FloatArray, ms: FloatArray, names: Sequence[str]) -> LinearModel:
    """Least squares of `ms` [N] on the named columns of `features` [N, F]; no coefficient is below zero."""
    found = fit_non_negative(features[:, [FEATURES.index(name) for name in names]], ms).tolist()
    return LinearModel({name: value for name, value in zip(names, found, strict=True) if value})


def evaluate(model: LinearModel, features: FloatArray, ms: FloatArray, *, num_fitted: int) -> FitReport:
    """R2 (1 - residual / variance) and mean |error| / measured on `features` [N, F] and `ms` [N]."""
    error = model.predict(features) - ms
    spread = ms - ms.mean()
    variance = float(spread @ spread)
    r2 = 1 - float(error @ error) / variance if variance > 0 else float(not error.any())
    return FitReport(r2, float(np.mean(np.abs(error) / ms)), num_fitted, len(ms))


def _best(forms: dict[str, LinearModel]) -> str:
    return max(forms, key=lambda form: forms[form].fit.r2 if forms[form].fit else 0.0)  # type: ignore[union-attr]
