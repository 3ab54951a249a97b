"""Results as bar figures; matplotlib is imported only where one is drawn."""

from pathlib import Path
from typing import Any

import numpy as np

from toppings.cluster.fitting import Observation
from toppings.cluster.perf_model import FEATURES, LinearModel, batch_features
from toppings.lab.batches.steps import BatchProfile
from toppings.lab.modes.comparison import LOADS, Comparison
from toppings.lab.modes.report import Report
from toppings.lab.summary import METRICS
from toppings.lab.tables import link_note

SERIES = (
    ("prefill_ms", "prefill"),
    ("decode_ms", "decode"),
    ("load_ms", "load (waited for)"),
    ("overlapped_load_ms", "load (overlapped)"),
)


def check_figure_file(path: Path | None) -> None:
    """Raises ValueError where a figure could not be written there, before anything is measured for it."""
    if path is None:
        return
    pyplot = _pyplot()
    kinds = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close("all")
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(
            f"figure is {path}; its name must end in one of {', '.join('.' + k for k in sorted(kinds))}"
        )


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """One panel per load and metric, one bar per mode; written on them, the ratio to `cached`."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(LOADS), len(METRICS), figsize=(12, 7), layout="constrained")
    for kind, row in zip(LOADS, axes):
        for metric, panel in zip(METRICS, row):
            _draw_panel(panel, comparison, kind, metric)
    note = link_note([comparison.link_gbps])
    figure.suptitle("Mean latency of cold requests by loading mode" + (f" ({note})" if note else ""))
    _save(pyplot, figure, path)


def _draw_panel(panel: Any, comparison: Comparison, kind: str, metric: str) -> None:
    means, labels = [], []
    for result in comparison.results:
        latency = result.loads[kind].latencies()[metric]
        ratio = comparison.ratios(result, kind).get(metric)
        means.append(latency.mean_ms if latency else 0.0)
        labels.append("" if ratio is None else f"{ratio['mean']:.2f}x")
    modes = [result.mode for result in comparison.results]
    panel.bar_label(panel.bar(modes, means, color="tab:blue"), labels)
    panel.set_title(
        "one after another" if kind == "sequential" else f"Poisson, {comparison.rps:g} requests/s"
    )
    panel.set_ylabel(f"{metric.upper()}, ms")
    panel.tick_params(axis="x", labelrotation=20)
    panel.margins(y=0.12)


def draw_report(report: Report, path: Path) -> None:
    """Groups of bars per mode; a time that a log does not tell has no bar."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(SERIES)
    for index, (name, label) in enumerate(SERIES):
        known = [
            (i, getattr(mode, name)) for i, mode in enumerate(report.modes) if getattr(mode, name) is not None
        ]
        places = [i + (index - (len(SERIES) - 1) / 2) * width for i, _ in known]
        panel.bar_label(panel.bar(places, [v for _, v in known], width, label=label), fmt="%.2f", fontsize=7)
    panel.set_xticks(range(len(report.modes)), [_tick(mode.mode, mode.cpu_share) for mode in report.modes])
    panel.set_ylabel("mean, ms")
    note = link_note(report.link_gbps)
    panel.set_title("Engine steps by loading mode" + (f" ({note})" if note else ""))
    panel.legend()
    _save(pyplot, figure, path)


def draw_batch_profile(profile: BatchProfile, path: Path) -> None:
    """Above, decode time against each published form's feature, with its line, and measured against predicted
    by the extended model; below, prefill: measured against predicted. Darker: held out of the fit."""
    pyplot = _pyplot()
    model = profile.model
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), layout="constrained")
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
    _save(pyplot, figure, path)


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


def _tick(mode: str, cpu_share: float | None) -> str:
    return f"{mode}\n{cpu_share:.0%} of layers\non CPU" if cpu_share else mode


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'toppings[figures]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
