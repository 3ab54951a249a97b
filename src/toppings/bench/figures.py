"""Results as bar figures; matplotlib is imported only where one is drawn."""

from pathlib import Path
from typing import Any

from toppings.bench.comparison import LOADS, Comparison
from toppings.bench.report import Report
from toppings.bench.summary import METRICS
from toppings.bench.tables import link_note

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


def _tick(mode: str, cpu_share: float | None) -> str:
    return f"{mode}\n{cpu_share:.0%} of layers on CPU" if cpu_share else mode


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
