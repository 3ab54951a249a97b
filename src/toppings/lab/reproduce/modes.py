"""Fig. 13 and 14 (latencies by loading mode), and Fig. 15 (what the steps of each mode spend time on)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toppings.lab.figures import draw_groups, new_figure
from toppings.lab.modes.comparison import ModesComparison
from toppings.lab.modes.figures import draw_report
from toppings.lab.modes.report import ModeSteps, StepReport
from toppings.lab.reproduce import published
from toppings.lab.reproduce.output import NOT_PUBLISHED, Claim, Reproduction, write
from toppings.lab.summary import METRICS
from toppings.lab.tables import link_note, with_link_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOAD_NAMES = {"sequential": "one after another", "poisson": "Poisson arrivals"}
EXPECTED_ORDER = ("cached", "cpu_assisted", "on_demand")


def write_modes(comparison: ModesComparison, out: Path) -> None:
    """A panel per load, a group of bars per metric: mean latencies over those of `cached`."""
    figure, axes = new_figure(len(LOAD_NAMES), width=6.0)
    for kind, panel in zip(LOAD_NAMES, axes[0]):
        _draw_ratios(panel, comparison, kind)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(with_link_note("Mean latency of cold requests over cached", [comparison.link_gbps]))
    outcome = Reproduction(
        name="modes",
        published="Fig. 13, 14",
        claims=_mode_claims(comparison),
        differs=_mode_differences(comparison),
        data=_without_requests(comparison.to_json()),
    )
    write(out, outcome, figure)


def ratios_of(comparison: ModesComparison, kind: str) -> dict[str, dict[str, float]]:
    """Mode to metric to mean over that of `cached`."""
    return {
        result.mode: {metric: each["mean"] for metric, each in comparison.ratios(result, kind).items()}
        for result in comparison.results
    }


def _mode_claims(comparison: ModesComparison) -> list[Claim]:
    claims = []
    for mode, ratios in ratios_of(comparison, "poisson").items():
        if mode != "cached" and ratios:
            there = published.MODE_RATIOS.get(mode)
            text = _joined(there.values()) if there else NOT_PUBLISHED
            claims.append(Claim(f"{mode}, TTFT / TPT / E2E over cached", text, _joined(ratios.values())))
    return claims


def _joined(values: Any) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _mode_differences(comparison: ModesComparison) -> list[str]:
    spec = comparison.spec
    return [
        "published: Llama-2-7B on an A100 at 9 requests/s, rank 64; here: this machine and "
        + (Path(spec.base.engine.model).name or "the demo model"),
        _link_difference(comparison),
        "modes take turns, request by request, so that a drift of the machine hits all alike"
        if comparison.is_interleaved
        else "one mode's server after another: ratios carry the machine's drift",
        f"{spec.num_adapters} adapters of rank {spec.ranks}, cold ones on {spec.home}, "
        f"{comparison.rps:g} requests/s, {spec.load.prompt_tokens} prompt tokens",
        "`pipelined`, `cpu_shrink` and `auto` have no published counterpart",
    ]


def _link_difference(comparison: ModesComparison) -> str:
    spec, note = comparison.spec, link_note([comparison.link_gbps])
    if note:
        return note + (f": a load takes {spec.load_ratio:g} cached prefills" if spec.load_ratio else "")
    if spec.base.engine.device == "cpu":
        return "no link between host and device: a load is a copy in memory"
    return f"the link of this machine's {spec.base.engine.device} device"


def _without_requests(content: dict[str, Any]) -> dict[str, Any]:
    """The single requests are left out: the spec and the seed make them again."""
    for mode in content["modes"].values():
        for kind in LOAD_NAMES:
            mode[kind].pop("requests", None)
    content["spec"]["modes"] = list(content["spec"]["modes"])
    return content


def _draw_ratios(axes: "Axes", comparison: ModesComparison, kind: str) -> None:
    ratios = ratios_of(comparison, kind)
    series = {mode: [own.get(metric, 0.0) for metric in METRICS] for mode, own in ratios.items()}
    draw_groups(axes, series, [metric.upper() for metric in METRICS], label_size=6)
    for bars in axes.containers if kind == "poisson" else ():
        if (there := published.MODE_RATIOS.get(str(bars.get_label()))) is not None:
            places = [bar.get_x() + bar.get_width() / 2 for bar in bars]
            label = "published" if bars.get_label() == "on_demand" else None
            axes.plot(places, [there[metric] for metric in METRICS], "kD", mfc="none", ms=5, label=label)
    axes.axhline(1.0, color="gray", lw=0.8, ls=":")
    axes.set(ylabel="mean over cached", title=LOAD_NAMES[kind])
    axes.margins(y=0.12)


def write_steps(report: StepReport, out: Path) -> None:
    outcome = Reproduction(
        name="steps",
        published="Fig. 15",
        claims=_step_claims(report.modes),
        differs=[
            "published: Llama-2-7B on an A100; here: whatever wrote the step logs",
            link_note(report.link_gbps) or "no emulated link",
        ],
        data=report.to_json(),
    )
    write(out, outcome, draw_report(report))


def _step_claims(modes: Sequence[ModeSteps]) -> list[Claim]:
    prefill = {mode.mode: mode.prefill_ms for mode in modes if mode.prefill_ms is not None}
    claims = []
    if all(mode in prefill for mode in EXPECTED_ORDER):
        known = [prefill[mode] for mode in EXPECTED_ORDER]
        verdict = "holds" if known == sorted(known) else "does not hold"
        text = " / ".join(f"{ms:.2f}" for ms in known)
        claims.append(Claim("mean prefill, ms", " < ".join(EXPECTED_ORDER), f"{text}: {verdict}"))
    for mode in modes:
        times = (mode.prefill_ms, mode.decode_ms, mode.load_ms, mode.overlapped_load_ms)
        text = " / ".join(NOT_PUBLISHED if ms is None else f"{ms:.2f}" for ms in times)
        quantity = f"{mode.mode}, mean ms of prefill / decode / load / overlapped load"
        claims.append(Claim(quantity, NOT_PUBLISHED, text))
    return claims
