"""The comparison of loading modes, and step times by mode, as tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from toppings.lab.modes.comparison import ADAPTIVE_MODE, LOADS, REFERENCE_MODE, ModeResult, ModesComparison
from toppings.lab.modes.report import StepReport
from toppings.lab.summary import METRICS
from toppings.lab.tables import LAYOUT, UNKNOWN, each_of, link_note, with_link_note


def comparison_table(comparison: ModesComparison) -> Table:
    """Per load and metric one row per mode, so that what is compared stands below each other."""
    title = with_link_note("Loading modes", [comparison.link_gbps])
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=0, **LAYOUT)  # fits a terminal of 80 columns
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


def _mode_row(comparison: ModesComparison, result: ModeResult, kind: str, name: str) -> list[str]:
    """Average and total time are those of whole requests: they stand in the rows of E2E."""
    summary = result.loads[kind]
    ratios = comparison.ratios(result, kind).get(name)
    cells = [result.mode, *each_of(summary.latencies()[name])]
    cells += [f"{ratio:.2f}" for ratio in ratios.values()] if ratios else [UNKNOWN] * 3
    paired = comparison.paired_ratios(result, kind)[name].get(REFERENCE_MODE)
    cells.append(UNKNOWN if paired is None else f"{paired:.2f}")
    if name != METRICS[-1]:
        return cells
    average = UNKNOWN if summary.average_s is None else f"{summary.average_s:.3f}"
    return [*cells, average, f"{summary.total_s:.2f}"]


def _caption(comparison: ModesComparison) -> str:
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


def _over_best_fixed(comparison: ModesComparison, kind: str) -> str:
    """Such as "auto over the best fixed mode, sequential: TTFT 1.01 (pipelined)"; empty without `auto`."""
    metric = METRICS[0]
    best = comparison.best_fixed(kind, metric)
    for result in comparison.results:
        ratio = comparison.paired_ratios(result, kind)[metric].get("best_fixed")
        if result.mode == ADAPTIVE_MODE and best and ratio is not None:
            return f"auto over the best fixed mode, {kind}: {metric.upper()} {ratio:.2f} ({best.mode})"
    return ""


def _add_columns(table: Table, headings: Sequence[str]) -> None:
    table.add_column("mode", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def report_table(report: StepReport) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=with_link_note("Engine steps, mean ms", report.link_gbps), **LAYOUT
    )
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
