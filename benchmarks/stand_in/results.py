"""What one trial observed, a row per setting over its seeds, and the rows as a table and as a figure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

from rich import box
from rich.table import Table

from toppings.lab.figures import draw_groups, new_figure, save
from toppings.lab.outcome import Outcome
from toppings.lab.summary import Latencies

WARM_UP_SHARE = 0.15
REFERENCE = "rank_aware"

Row = dict[str, Any]


@dataclass(frozen=True)
class Observed:
    """The requests in order of arrival, on the servers' clock. `rank_counts` are per server."""

    outcomes: Sequence[Outcome]
    rank_counts: Sequence[Counter[int]]
    details: dict[str, Any] = field(default_factory=dict)

    def measures(self, duration_s: float, slo_ms: float) -> dict[str, float]:
        """Of the requests after the warm-up; a refused one does not attain the SLO. Raises ValueError where
        none was answered.
        """
        counted = [outcome for outcome in self.outcomes if outcome.sent_at >= WARM_UP_SHARE * duration_s]
        latencies = Latencies.of(counted)
        stats = latencies.stats()
        if not latencies.tpt.size:
            raise ValueError(
                f"none of {len(counted)} requests was answered; take a higher rate or a longer time"
            )
        mean_ranks = [mean_rank(counts) for counts in self.rank_counts if counts]
        return {
            "attainment": int((latencies.tpt <= slo_ms).sum()) / len(counted),
            "tpt_ms": stats["tpt"].mean,
            "tpt_p99_ms": stats["tpt"].p99,
            "ttft_ms": stats["ttft"].mean,
            "mean_rank_stdev": pstdev(mean_ranks),
        }

    def rank_mix(self) -> list[Row]:
        """Of each server, what it served: requests, their mean rank, the share of each rank."""
        ranks = sorted(set().union(*self.rank_counts))
        return [
            {
                "requests": counts.total(),
                "mean_rank": round(mean_rank(counts), 2),
                "rank_share": {str(r): round(counts[r] / max(1, counts.total()), 4) for r in ranks},
            }
            for counts in self.rank_counts
        ]


def mean_rank(counts: Counter[int]) -> float:
    return sum(rank * count for rank, count in counts.items()) / max(1, counts.total())


def make_row(settings: Row, trials: Sequence[Observed], duration_s: float, slo_ms: float) -> Row:
    """Means over the seeds; with `_stdev` of what is compared. The rank mix is that of the first seed."""
    measured = [trial.measures(duration_s, slo_ms) for trial in trials]
    row = {**settings, "slo_ms": slo_ms, **{key: fmean(m[key] for m in measured) for key in measured[0]}}
    for key in ("attainment", "tpt_ms"):
        row[f"{key}_stdev"] = _spread([m[key] for m in measured])
    row["attainment_by_seed"] = [m["attainment"] for m in measured]
    row["servers"] = trials[0].rank_mix()
    return row | trials[0].details


def compare(rows: Sequence[Row]) -> None:
    """Add to each row what it attains above `rank_aware` over the same loads, seed by seed."""
    references = {_setting(row): row for row in rows if row["policy"] == REFERENCE}
    for row in rows:
        reference = references.get(_setting(row))
        if reference is not None and row is not reference:
            pairs = zip(row["attainment_by_seed"], reference["attainment_by_seed"])
            gains = [mine - theirs for mine, theirs in pairs]
            row["gain"], row["gain_stdev"] = fmean(gains), _spread(gains)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _setting(row: Row) -> tuple[Any, ...]:
    return row["clock"], row["arrivals"], row["kernel"], row["pool"], row["rate"]


def results_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left", pad_edge=False
    )
    table.add_column("policy", no_wrap=True)
    headings = ("SLO attained", f"above {REFERENCE}", "TPT ms", "p99", "TTFT ms", "rank spread")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = (
        "±: standard deviation over seeds; above: of the differences seed by seed; "
        "rank spread: standard deviation over servers of the mean rank served"
    )
    setting = None
    for row in rows:
        if _setting(row) != setting:
            setting = _setting(row)
            table.add_section()
            table.add_row(
                f"{row['kernel']}, {row['rate']:g}/s {row['arrivals']}, pool {row['pool']}, {row['clock']}",
                style="bold",
            )
        table.add_row(f" {row['policy']}", *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    gain = f"{100 * row['gain']:+.1f} ±{100 * row['gain_stdev']:.1f}" if "gain" in row else "-"
    return [
        f"{100 * row['attainment']:.1f} ±{100 * row['attainment_stdev']:.1f} %",
        gain,
        f"{row['tpt_ms']:.1f} ±{row['tpt_ms_stdev']:.1f}",
        f"{row['tpt_p99_ms']:.1f}",
        f"{row['ttft_ms']:.0f}",
        f"{row['mean_rank_stdev']:.1f}",
    ]


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Per clock, arrivals, kernel and pool a line of panels: attainment and TPT, a group of bars per rate."""
    lines = list(dict.fromkeys(_setting(row)[:-1] for row in rows))
    figure, panels = new_figure(2, len(lines), width=6.0, height=3.4)
    for line, (attainment, tpt) in zip(lines, panels):
        shown = [row for row in rows if _setting(row)[:-1] == line]
        clock, arrivals, kernel, pool = line
        adapters, gbps = pool.split("@")
        where = f"{kernel} form, {arrivals}, pool of {adapters} at {gbps} GB/s"
        where += ", over HTTP" if clock == "http" else ""
        slo_ms = shown[0]["slo_ms"]
        _draw_bars(attainment, shown, "attainment", 100.0)
        attainment.set(ylabel="requests within the SLO, %", title=where, ylim=(0, 105))
        _draw_bars(tpt, shown, "tpt_ms", 1.0)
        tpt.axhline(slo_ms, color="black", lw=0.8, ls=":")
        tpt.set(ylabel="mean time per token, ms", title=f"{where} (dotted: SLO {slo_ms:.1f} ms)")
    figure.suptitle(title)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save(figure, path, dpi=64)


def _draw_bars(panel: Any, rows: Sequence[Row], key: str, scale: float) -> None:
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    by_rate = {(row["policy"], row["rate"]): row for row in rows}
    policies = dict.fromkeys(row["policy"] for row in rows)
    values, spreads = (
        {policy: [scale * by_rate[policy, rate][name] for rate in rates] for policy in policies}
        for name in (key, f"{key}_stdev")
    )
    draw_groups(panel, values, [f"{rate:g} requests/s" for rate in rates], spreads=spreads)
