"""Timed steps against the performance models that were fitted to them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from toppings.cluster.fitting import Observation
from toppings.cluster.perf_model import FEATURES, LinearModel, batch_features
from toppings.lab.batches.steps import BatchProfile
from toppings.lab.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_batch_profile(profile: BatchProfile) -> "Figure":
    """Above, decode time against each published form's feature, with its line, and measured against predicted
    by the extended model; below, prefill: measured against predicted. Darker: held out of the fit."""
    model = profile.model
    figure, axes = new_figure(3, 2, width=4.0, height=3.5)
    decode = (profile.decode, profile.held_out(profile.decode))
    for panel, form, feature in zip(axes[0], ("bgmv", "mbgmv"), ("padded_ranks", "rank_sum")):
        _draw_line(panel, *decode, model.decode_forms[form], feature)
        panel.set_title(_fit_title("decode", form, model.decode_forms[form]))
    prefill = (profile.prefill, profile.held_out(profile.prefill))
    predicted = [("decode", *decode, model.decode_forms, "extended", axes[0][2])]
    for panel, form in zip(axes[1], ("bgmv", "mbgmv", "extended")):
        predicted.append(("prefill", *prefill, model.prefill_forms, form, panel))
    for kind, steps, held_out, forms, form, panel in predicted:
        _draw_predicted(panel, steps, held_out, forms[form])
        panel.set_title(_fit_title(kind, form, forms[form]))
    figure.suptitle(f"Step times and performance models ({model.details.get('model')}; {model.origin})")
    return figure


def _draw_line(
    panel: Any, steps: list[Observation], held_out: set[int], model: LinearModel, feature: str
) -> None:
    column = FEATURES.index(feature)
    values = [float(batch_features(step.rows)[column]) for step in steps]
    _scatter(panel, values, [step.ms for step in steps], held_out)
    ends = np.array([0.0, max(values)])
    intercept, slope = (model.coefficients.get(name, 0.0) for name in ("steps", feature))
    panel.plot(ends, intercept + slope * ends, color="tab:red")
    panel.set_xlabel("sequences x largest rank" if feature == "padded_ranks" else "sum of ranks")
    panel.set_ylabel("measured, ms")


def _draw_predicted(panel: Any, steps: list[Observation], held_out: set[int], model: LinearModel) -> None:
    predicted = [model.predict_batch(step.rows) for step in steps]
    measured = [step.ms for step in steps]
    _scatter(panel, predicted, measured, held_out)
    end = max(predicted + measured)
    panel.plot([0, end], [0, end], color="tab:red")
    panel.set_xlabel("predicted, ms")
    panel.set_ylabel("measured, ms")


def _scatter(panel: Any, x: list[float], y: list[float], held_out: set[int]) -> None:
    for is_held_out, alpha, label in ((False, 0.35, "fitted"), (True, 1.0, "held out")):
        chosen = [i for i in range(len(x)) if (i in held_out) == is_held_out]
        panel.scatter(
            [x[i] for i in chosen], [y[i] for i in chosen], s=14, color="tab:blue", alpha=alpha, label=label
        )
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend()


def _fit_title(kind: str, form: str, model: LinearModel) -> str:
    fit = model.fit
    return f"{kind}, {form}" + (f": R² {fit.r2:.3f}, error {fit.mean_relative_error:.0%}" if fit else "")
