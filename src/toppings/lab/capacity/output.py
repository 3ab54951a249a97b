"""A fleet's plan as tables, as JSON and as a figure."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.table import Table

from toppings.lab.capacity.planner import SWING, FleetPlan, Measured
from toppings.lab.capacity.spec import PlanSpec
from toppings.lab.figures import new_figure
from toppings.lab.tables import LAYOUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30


def plan_tables(plan: FleetPlan, spec: PlanSpec) -> Iterator[Table]:
    """The answer, what it was chosen from, and what would change it."""
    yield _answer(plan, spec)
    compared_under = f"{plan.compared_on} servers, {plan.compared_at:.4g} requests/s"
    designs = Table("", "in SLO", box=box.SIMPLE_HEAD, title=f"Chosen from, with {compared_under}", **LAYOUT)
    for design, attainment in sorted(plan.designs, key=lambda each: -each[1]):
        designs.add_row(str(design), f"{attainment:.2%}")
    yield designs
    changes = Table("", "in SLO", box=box.SIMPLE_HEAD, title="What if", **LAYOUT)
    for name, found in plan.sensitivity.items():
        changes.add_row(name, _told(found))
    yield changes


def _answer(plan: FleetPlan, spec: PlanSpec) -> Table:
    title = f"{plan.num_instances} servers for {plan.rate:.4g} requests/s"
    table = Table("", "", box=box.SIMPLE, show_header=False, title=title, **LAYOUT)
    design = plan.design
    for name, value in (
        ("objective", f"{_objectives(spec)} for {spec.attainment:.2%}"),
        ("within it", _told(plan.expected)),
        (f"with {spec.seeds} unseen seeds", _told(plan.unseen)),
        ("routing policy, placement", f"{design.policy}, {design.placement}"),
        ("device pool of each server", f"{plan.pool_bytes / GIB:.1f} GiB"),
        ("key-value cache of each server", f"{plan.kv_cache_tokens:,} tokens"),
        ("99 % of TTFT, of TPT", f"{plan.ttft_p99_ms:,.1f} ms, {plan.tpt_p99_ms:,.1f} ms"),
        ("cost per hour", f"{plan.cost_per_hour:,.2f}"),
        ("cost per million tokens", f"{plan.cost_of_tokens:.3f}"),
        ("per million generated tokens", f"{plan.cost_of_response_tokens:.3f}"),
        ("simulations", f"{plan.num_simulations}"),
    ):
        table.add_row(name, value)
    return table


def _told(found: Measured) -> str:
    return f"{found.attainment:.2%} ±{100 * found.spread:.2f}"


def _objectives(spec: PlanSpec) -> str:
    named = (("TTFT", spec.slo_ttft_ms), ("TPT", spec.slo_tpt_ms))
    return ", ".join(f"{name} {value:g} ms" for name, value in named if math.isfinite(value))


def plan_json(plan: FleetPlan, spec: PlanSpec) -> str:
    """What was asked and the answer; what is infinite becomes null."""
    encoded = msgspec.json.encode({"spec": spec, "plan": plan})
    return msgspec.json.format(encoded, indent=2).decode()


def draw_plan(plan: FleetPlan, spec: PlanSpec) -> "Figure":
    """Attainment by size, the designs that were compared, and what changes do to the chosen fleet."""
    figure, axes = new_figure(3, width=4.6, height=3.6)
    curve, designs, changes = axes[0]
    sizes, attained = zip(*plan.curve, strict=True)
    curve.plot(sizes, [100 * each for each in attained], marker="o", ms=4)
    curve.axhline(100 * spec.attainment, color="gray", ls=":", label="wanted")
    at = plan.rate if spec.num_instances else plan.num_instances
    curve.axvline(at, color="gray", lw=0.8, label="chosen")
    label = f"requests/s on {plan.num_instances} servers" if spec.num_instances else "servers"
    curve.set(xlabel=label, ylabel="within the objectives, %")
    curve.legend()
    ordered = sorted(plan.designs, key=lambda each: each[1])
    designs.barh([str(each) for each, _ in ordered], [100 * attainment for _, attainment in ordered])
    designs.tick_params(axis="y", labelsize=6)
    designs.set(
        xlabel="within the objectives, %",
        title=f"{plan.compared_on} servers, {plan.compared_at:.4g} requests/s",
    )
    found = {"as planned": plan.expected, **plan.sensitivity}
    means = [100 * each.attainment for each in found.values()]
    spreads = [100 * each.spread for each in found.values()]
    bars = changes.bar(range(len(found)), means, yerr=spreads, capsize=4)
    changes.bar_label(bars, fmt="%.1f", fontsize=8)
    changes.set_xticks(range(len(found)), [name.replace(" ", "\n", 1) for name in found], fontsize=8)
    changes.set(title=f"load ±{SWING:.0%}, a loss half-way", ylim=(0, 115))
    return figure
