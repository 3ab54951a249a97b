"""Figures of traces and of simulations; matplotlib is imported where one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toppings.lab.simulation.describe import dispersion, popularity_counts, window_counts
from toppings.lab.simulation.metrics import Summary, tpt_ms
from toppings.sim.records import SimResult
from toppings.sim.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 2000


def _new_figure(num_columns: int, num_rows: int = 1) -> "tuple[Figure, Any]":
    """Without pyplot, which would keep state. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib; install toppings[figures]") from error
    figure = Figure(figsize=(5 * num_columns, 3.6 * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def draw_trace(trace: Trace, path: Path) -> None:
    """Arrivals over time, dispersion by scale, lengths, popularity. The suffix of `path` is the file's
    format.
    """
    figure, axes = _new_figure(2, 2)
    _draw_rate(axes[0, 0], trace)
    _draw_dispersion(axes[0, 1], trace)
    _draw_lengths(axes[1, 0], trace)
    _draw_popularity(axes[1, 1], trace)
    figure.suptitle(f"{trace.origin}: {len(trace):,} requests, {trace.rate:.3g}/s")
    figure.savefig(path)


def _draw_rate(axes: "Axes", trace: Trace) -> None:
    window_s = max(1.0, trace.duration_s / 300)
    counts = window_counts(trace.arrivals_s, window_s, trace.duration_s)
    axes.plot(np.arange(len(counts)) * window_s, counts / window_s, lw=0.8)
    axes.set(xlabel="time, s", ylabel="arrivals per second", ylim=(0, None))


def _draw_dispersion(axes: "Axes", trace: Trace) -> None:
    windows = np.geomspace(0.1, max(0.2, trace.duration_s / 10), 25)
    points = [(w, d) for w in windows if (d := dispersion(trace.arrivals_s, w, trace.duration_s)) is not None]
    axes.loglog(*zip(*points), marker=".") if points else None
    axes.axhline(1.0, color="gray", lw=0.8, ls=":", label="Poisson")
    axes.set(xlabel="window, s", ylabel="index of dispersion")
    axes.legend()


def _draw_lengths(axes: "Axes", trace: Trace) -> None:
    for label, tokens in (("prompt", trace.prompt_tokens), ("response", trace.response_tokens)):
        axes.plot(*_distribution(tokens), label=label)
    axes.set(xscale="log", xlabel="tokens", ylabel="share of requests", ylim=(0, 1))
    axes.legend()


def _draw_popularity(axes: "Axes", trace: Trace) -> None:
    counts = popularity_counts(trace)
    axes.plot(np.arange(1, len(counts) + 1) / len(counts), np.cumsum(counts) / counts.sum())
    axes.set(xlabel="share of adapters, most popular first", ylabel="share of requests", ylim=(0, 1))


def _distribution(values: Any) -> tuple[Any, Any]:
    """Points of the cumulative distribution, no more than can be seen."""
    shares = np.linspace(0, 1, min(len(values), MAX_POINTS))
    return np.quantile(values, shares), shares


def draw_attainment(summaries: Sequence[Summary], path: Path) -> None:
    """SLO attainment of each policy: the mean over its seeds, with its extremes."""
    figure, axes = _new_figure(1)
    policies = list(dict.fromkeys(summary.policy for summary in summaries))
    values = [[100 * s.slo_attainment for s in summaries if s.policy == policy] for policy in policies]
    means = [float(np.mean(v)) for v in values]
    below = [mean - min(v) for mean, v in zip(means, values)]
    above = [max(v) - mean for mean, v in zip(means, values)]
    axes[0, 0].bar(policies, means, yerr=[below, above], capsize=4)
    axes[0, 0].set(ylabel="SLO attainment, %", ylim=(0, 100))
    axes[0, 0].tick_params(axis="x", rotation=30)
    figure.savefig(path)


def draw_tpt(results: Sequence[SimResult], path: Path) -> None:
    """Cumulative distribution of the time per token, one line per policy, its seeds together."""
    figure, axes = _new_figure(1)
    for policy in dict.fromkeys(result.config.policy for result in results):
        times = [tpt_ms(result) for result in results if result.config.policy == policy]
        axes[0, 0].plot(*_distribution(np.concatenate(times)), label=policy)
    slo_ms = results[0].config.slo_tpt_ms
    if np.isfinite(slo_ms):
        axes[0, 0].axvline(slo_ms, color="gray", ls=":", label="SLO")
        axes[0, 0].set_xlim(0, 3 * slo_ms)
    axes[0, 0].set(xlabel="time per token, ms", ylabel="share of requests", ylim=(0, 1))
    axes[0, 0].legend()
    figure.savefig(path)
