"""Results as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from toppings.lab.summary import LoadSummary, Stats

UNKNOWN = "-"
LAYOUT: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "collapse_padding": True,
    "pad_edge": False,
}


def link_note(link_gbps: Sequence[float]) -> str:
    """To stand wherever numbers do that were measured with an emulated link; else empty."""
    speeds = ", ".join(f"{gbps:g}" for gbps in link_gbps if gbps)
    return f"emulated link, {speeds} GB/s" if speeds else ""


def with_link_note(text: str, link_gbps: Sequence[float]) -> str:
    note = link_note(link_gbps)
    return f"{text} ({note})" if note else text


def summary_table(summary: LoadSummary, title: str) -> Table:
    table = Table("", "mean", "p50", "p99", box=box.SIMPLE_HEAD, title=title, **LAYOUT)
    for name, latency in summary.latencies().items():
        table.add_row(f"{name.upper()} ms", *(each_of(latency)))
    table.add_section()
    average = UNKNOWN if summary.average_s is None else f"{summary.average_s:.4f}"
    table.add_row("average time s", average)
    table.add_row("total time s", f"{summary.total_s:.3f}")
    table.add_row("tokens/s", f"{summary.tokens_per_s:.1f}")
    if summary.mean_prompt_tokens is not None:
        table.add_row("prompt tokens", f"{summary.mean_prompt_tokens:g}")
    table.add_row("requests, errors", f"{summary.num_requests}, {summary.num_errors}")
    return table


def each_of(latency: Stats | None) -> list[str]:
    return [UNKNOWN] * 3 if latency is None else [f"{value:.2f}" for value in latency.named().values()]
