"""Results as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from toppings.cluster.perf_model import LinearModel, PerfModel
from toppings.lab.modes.comparison import ADAPTIVE_MODE, LOADS, REFERENCE_MODE, Comparison, ModeResult
from toppings.lab.modes.report import Report
from toppings.lab.summary import METRICS, Latency, LoadSummary

UNKNOWN = "-"
_LAYOUT: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "collapse_padding": True,
    "pad_edge": False,
}


def link_note(link_gbps: Sequence[float]) -> str:
    """To stand wherever numbers do that were measured with an emulated link; else empty."""
    speeds = ", ".join(f"{gbps:g}" for gbps in link_gbps if gbps)
    return f"emulated link, {speeds} GB/s" if speeds else ""


def summary_table(summary: LoadSummary, title: str) -> Table:
    table = Table("", "mean", "p50", "p99", box=box.SIMPLE_HEAD, title=title, **_LAYOUT)
    for name, latency in summary.latencies().items():
        table.add_row(f"{name.upper()} ms", *(_each(latency)))
    table.add_section()
    average = UNKNOWN if summary.average_s is None else f"{summary.average_s:.4f}"
    table.add_row("average time s", average)
    table.add_row("total time s", f"{summary.total_s:.3f}")
    table.add_row("tokens/s", f"{summary.tokens_per_s:.1f}")
    if summary.mean_prompt_tokens is not None:
        table.add_row("prompt tokens", f"{summary.mean_prompt_tokens:g}")
    table.add_row("requests, errors", f"{summary.num_requests}, {summary.num_errors}")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Per load and metric one row per mode, so that what is compared stands below each other."""
    title = _title("Loading modes", [comparison.link_gbps])
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=0, **_LAYOUT)  # fits a terminal of 80 columns
    headings = ("mean", "p50", "p99", "mean x", "p50 x", "p99 x", "pair x", "avg s", "total s")
    _add_columns(table, headings)
    for kind in LOADS:
        table.add_row("sequential" if kind == "sequential" else f"Poisson {comparison.rps:g}/s", style="bold")
        for name in METRICS:
            table.add_row(f" {name.upper()} ms", style="bold")
            for result in comparison.results:
                table.add_row(*_mode_row(comparison, result, kind, name))
    table.caption = _caption(comparison)
    return table


def _mode_row(comparison: Comparison, result: ModeResult, kind: str, name: str) -> list[str]:
    """Average and total time are those of whole requests: they stand in the rows of E2E."""
    summary = result.loads[kind]
    ratios = comparison.ratios(result, kind).get(name)
    cells = [result.mode, *_each(summary.latencies()[name])]
    cells += [f"{ratio:.2f}" for ratio in ratios.values()] if ratios else [UNKNOWN] * 3
    paired = comparison.paired_ratios(result, kind)[name].get(REFERENCE_MODE)
    cells.append(UNKNOWN if paired is None else f"{paired:.2f}")
    if name != METRICS[-1]:
        return cells
    average = UNKNOWN if summary.average_s is None else f"{summary.average_s:.3f}"
    return [*cells, average, f"{summary.total_s:.2f}"]


def _caption(comparison: Comparison) -> str:
    spec = comparison.spec
    summaries = [summary for result in comparison.results for summary in result.loads.values()]
    parts = [
        f"x: over {REFERENCE_MODE}, pair x: median of requests' ratios",
        f"{spec.load.num_requests} requests each, {spec.num_adapters} adapters",
        f"cold ones on {spec.home}",
        f"{spec.load.prompt_tokens} prompt and {spec.load.max_tokens} generated tokens",
        f"{sum(summary.num_errors for summary in summaries)} errors",
        link_note([comparison.link_gbps]),
        "modes took turns" if comparison.is_interleaved else "mode after mode",
        *(_over_best_fixed(comparison, kind) for kind in LOADS),
    ]
    return "; ".join(part for part in parts if part)


def _over_best_fixed(comparison: Comparison, kind: str) -> str:
    """Such as "auto over the best fixed mode, sequential: TTFT 1.01 (pipelined)"; empty without `auto`."""
    metric = METRICS[0]
    best = comparison.best_fixed(kind, metric)
    for result in comparison.results:
        ratio = comparison.paired_ratios(result, kind)[metric].get("best_fixed")
        if result.mode == ADAPTIVE_MODE and best and ratio is not None:
            return f"auto over the best fixed mode, {kind}: {metric.upper()} {ratio:.2f} ({best.mode})"
    return ""


def _title(text: str, link_gbps: Sequence[float]) -> str:
    note = link_note(link_gbps)
    return f"{text} ({note})" if note else text


def _add_columns(table: Table, headings: Sequence[str]) -> None:
    table.add_column("mode", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _each(latency: Latency | None) -> list[str]:
    return [UNKNOWN] * 3 if latency is None else [f"{value:.2f}" for value in latency.named().values()]


def report_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=_title("Engine steps, mean ms", report.link_gbps), **_LAYOUT)
    table.caption = (
        "load: waited for, a part of prefill; overlapped: load while computing; on CPU: share of layers"
    )
    headings = ("prefill", "decode", "load", "overlapped", "on CPU", "prefills", "decodes")
    _add_columns(table, headings)
    for mode in report.modes:
        times = (mode.prefill_ms, mode.decode_ms, mode.load_ms, mode.overlapped_load_ms)
        share = UNKNOWN if mode.cpu_share is None else f"{mode.cpu_share:.1%}"
        counts = (str(mode.num_prefills), str(mode.num_decodes))
        table.add_row(mode.mode, *(UNKNOWN if t is None else f"{t:.2f}" for t in times), share, *counts)
    return table


def perf_model_table(model: PerfModel) -> Table:
    """How each form does on the steps that were held out of its fit, and what it says that features cost."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Step costs, {model.origin}", **_LAYOUT)
    for heading in ("step", "form"):
        table.add_column(heading, no_wrap=True)
    for heading in ("R²", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ms")
    for kind, forms, used in (
        ("decode", model.decode_forms, model.decode_form),
        ("prefill", model.prefill_forms, model.prefill_form),
    ):
        for name, form in forms.items():
            mark = " *" if name == used else ""
            table.add_row(kind, name + mark, *_standing(form), _terms(form))
        table.add_section()
    fits = [forms[next(iter(forms))].fit for forms in (model.decode_forms, model.prefill_forms)]
    counts = [f"{fit.num_held_out} of {fit.num_fitted + fit.num_held_out}" for fit in fits if fit]
    table.caption = f"on held-out batches ({' decodes, '.join(counts)} prefills); *: the form that is used"
    return table


def _standing(form: LinearModel) -> tuple[str, str]:
    if form.fit is None:
        return UNKNOWN, UNKNOWN
    return f"{form.fit.r2:.3f}", f"{form.fit.mean_relative_error:.1%}"


def _terms(form: LinearModel) -> str:
    terms = [
        _digits(ms) if name == "steps" else f"{_digits(ms * 1e3)}us·{name}"
        for name, ms in form.coefficients.items()
        if ms
    ]
    return " + ".join(terms)


def _digits(value: float) -> str:
    """Three that count, without an exponent."""
    return f"{float(f'{value:.3g}'):g}"
