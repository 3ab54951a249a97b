"""Traces and simulations as tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from toppings.lab.simulation.describe import Description
from toppings.lab.simulation.metrics import RunSummary

MIN_TABLE_WIDTH = 110
LATENCIES = {"TTFT": "ttft_ms", "TPT": "tpt_ms", "E2E": "e2e_ms"}


def print_description(description: Description) -> None:
    table = Table("", description.origin)
    dropped = f" ({description.num_dropped:,} failed ones left out)" if description.num_dropped else ""
    table.add_row("requests", f"{description.num_requests:,}{dropped} in {description.duration_s:,.1f} s")
    table.add_row("rate", f"{description.rate:.3f}/s; gaps have CV {description.gap_cv:.2f}")
    for window, value in description.dispersion.items():
        table.add_row(f"index of dispersion, {window} s", "too short" if value is None else f"{value:.2f}")
    for name, lengths in (("prompt", description.prompt_tokens), ("response", description.response_tokens)):
        quantiles = f"p50 {lengths.p50:.0f}, p90 {lengths.p90:.0f}, p99 {lengths.p99:.0f}"
        table.add_row(f"{name} tokens", f"mean {lengths.mean:.1f}, {quantiles}")
    table.add_row("adapters", f"{description.num_adapters_used:,} of {description.num_adapters:,} asked for")
    shares = ", ".join(f"top {percent} %: {share:.1%}" for percent, share in description.top_share.items())
    table.add_row("popularity", shares)
    table.add_row(
        "ranks", ", ".join(f"{rank}: {share:.1%}" for rank, share in description.rank_share.items())
    )
    Console().print(table)


def print_summaries(summaries: Sequence[RunSummary]) -> None:
    """One row per policy: means over its seeds, and the attainment's range."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in ("in SLO", *(f"{name}\n{kind}" for name in LATENCIES for kind in ("mean", "p99"))):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("busy", "warm", "lost"):
        table.add_column(name, justify="right")
    for policy in dict.fromkeys(summary.policy for summary in summaries):
        table.add_row(policy, *_cells([s for s in summaries if s.policy == policy]))
    console = Console()
    console.width = max(console.width, MIN_TABLE_WIDTH)
    console.print(table)
    if any(summary.tenants for summary in summaries):
        console.print(_tenant_table(summaries))
    print(
        f"{len(summaries)} runs; latencies in ms, SLO {summaries[0].slo_tpt_ms:.1f} ms per token\n"
        "busy: part of the servers' time, warm: requests whose adapter was on the device, lost: rejected"
    )


def _tenant_table(summaries: Sequence[RunSummary]) -> Table:
    """One row per run and tenant."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in (
        "policy",
        "seed",
        "tenant",
        "weight",
        "tokens",
        "ended",
        "TTFT\nmean",
        "TTFT\np99",
        "TPT\nmean",
        "SLO",
    ):
        table.add_column(name, no_wrap=True)
    for run in summaries:
        for each in run.tenants:
            shares = f"{each.token_share:.1%}", f"{each.num_ended:,} of {each.num_arrived:,}"
            times = (each.ttft_ms.mean, each.ttft_ms.p99, each.tpt_ms.mean)
            latencies = [f"{ms:,.1f}" for ms in times]
            table.add_row(
                run.policy,
                str(run.seed),
                each.name,
                f"{each.weight:g}",
                *shares,
                *latencies,
                f"{each.slo_attainment:.1%}",
            )
    return table


def _cells(runs: Sequence[RunSummary]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    shares = [run.slo_attainment for run in runs]
    spread = f"\n{min(shares):.1%} … {max(shares):.1%}" if len(runs) > 1 else ""
    stats = [[getattr(run, name) for run in runs] for name in LATENCIES.values()]
    return [
        f"{mean(shares):.2%}{spread}",
        *(f"{mean([getattr(s, kind) for s in each]):,.1f}" for each in stats for kind in ("mean", "p99")),
        f"{mean([run.busy_share for run in runs]):.0%}",
        f"{mean([run.adapter_hit_rate for run in runs]):.0%}",
        f"{sum(run.num_rejected for run in runs)}",
    ]
