"""The comparison of loading modes, and step times by mode, as bars."""

from typing import TYPE_CHECKING, Any

from toppings.lab.figures import draw_groups, new_figure
from toppings.lab.modes.comparison import LOADS, ModesComparison
from toppings.lab.modes.report import StepReport
from toppings.lab.summary import METRICS
from toppings.lab.tables import with_link_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = (
    ("prefill_ms", "prefill"),
    ("decode_ms", "decode"),
    ("load_ms", "load (waited for)"),
    ("overlapped_load_ms", "load (overlapped)"),
)


def draw_comparison(comparison: ModesComparison) -> "Figure":
    """One panel per load and metric, one bar per mode; written on them, the ratio to `cached`."""
    figure, axes = new_figure(len(METRICS), len(LOADS), width=4.0, height=3.5)
    for kind, row in zip(LOADS, axes):
        for metric, panel in zip(METRICS, row):
            _draw_panel(panel, comparison, kind, metric)
    figure.suptitle(with_link_note("Mean latency of cold requests by loading mode", [comparison.link_gbps]))
    return figure


def _draw_panel(panel: Any, comparison: ModesComparison, kind: str, metric: str) -> None:
    means, labels = [], []
    for result in comparison.results:
        latency = result.loads[kind].latencies()[metric]
        ratio = comparison.ratios(result, kind).get(metric)
        means.append(latency.mean if latency else 0.0)
        labels.append("" if ratio is None else f"{ratio['mean']:.2f}x")
    modes = [result.mode for result in comparison.results]
    panel.bar_label(panel.bar(modes, means, color="tab:blue"), labels)
    panel.set_title(
        "one after another" if kind == "sequential" else f"Poisson, {comparison.rps:g} requests/s"
    )
    panel.set_ylabel(f"{metric.upper()}, ms")
    panel.tick_params(axis="x", labelrotation=20)
    panel.margins(y=0.12)


def draw_report(report: StepReport) -> "Figure":
    """Groups of bars per mode; a time that a log does not tell has no bar."""
    figure, axes = new_figure(width=9, height=4.5)
    panel = axes[0, 0]
    series = {label: [getattr(mode, name) for mode in report.modes] for name, label in SERIES}
    draw_groups(panel, series, [_tick(mode.mode, mode.cpu_share) for mode in report.modes], label_size=7)
    panel.set_ylabel("mean, ms")
    panel.set_title(with_link_note("Engine steps by loading mode", report.link_gbps))
    panel.legend()
    return figure


def _tick(mode: str, cpu_share: float | None) -> str:
    return f"{mode}\n{cpu_share:.0%} of layers\non CPU" if cpu_share else mode
