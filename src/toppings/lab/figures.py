"""Figures, and kinds of panels that several have; matplotlib is imported only where one is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = ("pdf", "png")
MAX_POINTS = 2000
DPI = 150


def new_figure(
    num_columns: int = 1, num_rows: int = 1, *, width: float = 4.2, height: float = 3.2
) -> "tuple[Figure, Any]":
    """A figure and its axes [rows, columns], each of so many inches; without pyplot, which would keep state.
    Raises ValueError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'toppings[figures]'") from error
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def save(figure: "Figure", path: Path, *, dpi: int = DPI) -> None:
    """The suffix of `path` is the file's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def save_all(figure: "Figure", directory: Path, name: str, *, dpi: int = 100) -> None:
    """As PDF and PNG."""
    for suffix in SUFFIXES:
        save(figure, directory / f"{name}.{suffix}", dpi=dpi)


def check_figure_file(path: Path | None) -> None:
    """Raises ValueError where a figure could not be written there, before anything is measured for it."""
    if path is None:
        return
    figure, _ = new_figure()
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(
            f"figure is {path}; its name must end in one of {', '.join('.' + k for k in sorted(kinds))}"
        )


# --- panels ---


def draw_groups(
    axes: "Axes",
    series: Mapping[str, Sequence[float | None]],
    ticks: Sequence[str],
    *,
    label_size: float = 0.0,
    spreads: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """A group of bars at each tick, one of each series; none where a value is None. `label_size` > 0 writes
    the values on the bars, `spreads` are half-lengths of error bars."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        known = [(tick, value) for tick, value in enumerate(values) if value is not None]
        places = [tick + (number - (len(series) - 1) / 2) * width for tick, _ in known]
        errors = None if spreads is None else [spreads[name][tick] for tick, _ in known]
        bars = axes.bar(
            places,
            [value for _, value in known],
            width,
            label=name,
            yerr=errors,
            error_kw={"lw": 0.8, "capsize": 1.5},
        )
        if label_size:
            axes.bar_label(bars, fmt="%.2f", fontsize=label_size)
    axes.set_xticks(range(len(ticks)), ticks)


def draw_means(axes: "Axes", values: Mapping[str, Sequence[float]]) -> None:
    """A bar of each name's mean, labelled, with the extremes of its values."""
    for place, own in enumerate(values.values()):
        mean = float(np.mean(own))
        bar = axes.bar(place, mean, yerr=[[mean - min(own)], [max(own) - mean]], capsize=4)
        axes.bar_label(bar, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(values)), [name.replace("_", "\n") for name in values])
    axes.tick_params(axis="x", labelsize=8)


def draw_cumulative(axes: "Axes", values: NDArray[Any], label: str | None = None, **style: Any) -> None:
    """The cumulative distribution, in no more points than can be seen."""
    shares = np.linspace(0, 1, min(np.size(values), MAX_POINTS))
    axes.plot(np.quantile(values, shares), shares, label=label, **style)
    axes.set(ylabel="share of requests", ylim=(0, 1))
