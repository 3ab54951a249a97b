"""Figures of traces and of simulations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from toppings.lab.figures import draw_cumulative, draw_means, new_figure
from toppings.lab.simulation.describe import dispersion, popularity_counts, window_counts
from toppings.lab.simulation.metrics import RunSummary, latencies_of
from toppings.sim.records import SimResult
from toppings.sim.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.0, 3.6


def draw_trace(trace: Trace) -> "Figure":
    """Arrivals over time, dispersion by scale, lengths, popularity."""
    figure, axes = new_figure(2, 2, width=WIDTH, height=HEIGHT)
    _draw_rate(axes[0, 0], trace)
    _draw_dispersion(axes[0, 1], trace)
    _draw_lengths(axes[1, 0], trace)
    _draw_popularity(axes[1, 1], trace)
    figure.suptitle(f"{trace.origin}: {len(trace):,} requests, {trace.rate:.3g}/s")
    return figure


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
        draw_cumulative(axes, tokens, label)
    axes.set(xscale="log", xlabel="tokens")
    axes.legend()


def _draw_popularity(axes: "Axes", trace: Trace) -> None:
    counts = popularity_counts(trace)
    axes.plot(np.arange(1, len(counts) + 1) / len(counts), np.cumsum(counts) / counts.sum())
    axes.set(xlabel="share of adapters, most popular first", ylabel="share of requests", ylim=(0, 1))


def draw_attainment(summaries: Sequence[RunSummary]) -> "Figure":
    """SLO attainment of each policy: the mean over its seeds, with its extremes."""
    figure, axes = new_figure(width=WIDTH, height=HEIGHT)
    shares: dict[str, list[float]] = {}
    for summary in summaries:
        shares.setdefault(summary.policy, []).append(100 * summary.slo_attainment)
    draw_means(axes[0, 0], shares)
    axes[0, 0].set(ylabel="SLO attainment, %", ylim=(0, 112))
    return figure


def draw_tpt(results: Sequence[SimResult]) -> "Figure":
    """Cumulative distribution of the time per token, one line per policy, its seeds together."""
    figure, axes = new_figure(width=WIDTH, height=HEIGHT)
    for policy in dict.fromkeys(result.config.policy for result in results):
        times = [latencies_of(result).tpt for result in results if result.config.policy == policy]
        draw_cumulative(axes[0, 0], np.concatenate(times), policy)
    slo_ms = results[0].config.slo_tpt_ms
    if np.isfinite(slo_ms):
        axes[0, 0].axvline(slo_ms, color="gray", ls=":", label="SLO")
        axes[0, 0].set_xlim(0, 3 * slo_ms)
    axes[0, 0].set(xlabel="time per token, ms")
    axes[0, 0].legend()
    return figure
