"""Fig. 19 (60 simulated instances) and Fig. 18 (8 of them): SLO attainment by policy and kernel form."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toppings.lab.figures import draw_means, new_figure
from toppings.lab.reproduce import published
from toppings.lab.reproduce.fleet_runs import (
    FORMS,
    QUANTILES,
    FleetSpec,
    RunRecord,
    attainment,
    load_that_breaks,
    mean_tpt_ms,
    select,
)
from toppings.lab.reproduce.output import NOT_PUBLISHED, Claim, Reproduction, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORM_NAMES = {"bgmv": "BGMV", "mbgmv": "MBGMV"}
OURS = "rank_aware"


def write_simulation(spec: FleetSpec, records: Sequence[RunRecord], out: Path) -> None:
    """A figure per kernel form: attainment and TPT at the first rate, and attainment at all rates."""
    for form in FORMS:
        own = select(records, form=form)
        outcome = Reproduction(
            name=f"simulation-{form}",
            published="Fig. 19",
            claims=_simulation_claims(spec, own, form),
            differs=differences(spec),
            data=data_of(spec, own),
        )
        figure, axes = new_figure(3 if len(spec.rates) > 1 else 2)
        main = select(own, rate=spec.rates[0])
        _draw_bars(axes[0, 0], main, f"{FORM_NAMES[form]}, {spec.rates[0]:g} requests/s")
        _draw_cdf(axes[0, 1], main)
        if len(spec.rates) > 1:
            draw_loads(axes[0, 2], own)
        write(out, outcome, figure)


def write_testbed(spec: FleetSpec, records: Sequence[RunRecord], out: Path) -> None:
    """One figure, a panel per kernel form: attainment at all rates."""
    figure, axes = new_figure(len(FORMS))
    for panel, form in zip(axes[0], FORMS):
        draw_loads(panel, select(records, form=form))
        panel.set_title(f"{FORM_NAMES[form]}, {spec.num_instances} instances")
    outcome = Reproduction(
        name="testbed",
        published="Fig. 18",
        claims=_testbed_claims(spec, records),
        differs=["simulated, not run on eight GPUs", *differences(spec)],
        data=data_of(spec, records),
    )
    write(out, outcome, figure)


def differences(spec: FleetSpec) -> list[str]:
    model = spec.model(FORMS[0])
    prefill = "interrupts decoding, as published" if spec.interrupts else "shares its step with decodes"
    arrivals = Path(spec.trace).name if spec.trace else f"Poisson, {spec.num_adapters:,} adapters"
    return [
        f"step times: {model.origin}",
        f"arrivals: {arrivals}, popularity of the published traces; published: the Azure Functions trace",
        f"lengths: lognormal around {published.RESPONSE_TOKENS:g} response tokens, the published mean",
        f"adapters are loaded ({spec.mode}); the published simulation loads none",
        f"a prefill {prefill}; dlora is our reduction of dLoRA to routing and migration",
        f"{spec.duration_s / 60:g} simulated minutes, {spec.seeds} seeds; published: 1 minute, 1 seed",
    ]


def data_of(spec: FleetSpec, records: Sequence[RunRecord]) -> dict[str, Any]:
    """All runs in numbers; the TPT quantiles of each policy at the first rate, its seeds together."""
    runs = [
        {
            "form": r.form, "policy": r.policy, "rate": r.rate, "seed": r.seed, "slo_ms": r.slo_ms,
            "attainment": r.attainment, "requests": r.summary.num_arrived, "rejected": r.summary.num_rejected,
            "ttft_ms": asdict(r.summary.ttft_ms), "tpt_ms": asdict(r.summary.tpt_ms),
        }
        for r in records
    ]  # fmt: skip
    curves = {
        f"{form} {policy}": [round(q, 2) for q in _quantiles(own)]
        for form in FORMS
        for policy in spec.policies
        if (own := select(records, form=form, policy=policy, rate=spec.rates[0]))
    }
    return {"setting": asdict(spec), "runs": runs, "tpt_quantiles_ms": curves}


# --- claims ---


def spread_text(records: Sequence[RunRecord]) -> str:
    values = [100 * record.attainment for record in records]
    return f"{np.mean(values):.2f} % ({min(values):.2f} … {max(values):.2f})"


def _simulation_claims(spec: FleetSpec, own: Sequence[RunRecord], form: str) -> list[Claim]:
    rate, name = spec.rates[0], FORM_NAMES[form]
    main = select(own, rate=rate)
    claims = []
    for policy in spec.policies:
        there = f"{published.SIMULATION_ATTAINMENT:.0%}" if policy == OURS else NOT_PUBLISHED
        text = spread_text(select(main, policy=policy))
        claims.append(Claim(f"{name}, SLO attainment at {rate:g}/s, {policy}", there, text))
    if OURS in spec.policies:
        ours = mean_tpt_ms(select(main, policy=OURS))
        for policy, cut in published.SIMULATION_TPT_CUT.items():
            if others := select(main, policy=policy):
                text = f"{ours / mean_tpt_ms(others) - 1:+.0%}"
                claims.append(Claim(f"{name}, mean TPT of {OURS} against {policy}", f"-{cut:.0%}", text))
    if len(spec.rates) > 1:
        for policy in spec.policies:
            load, falls = load_that_breaks(select(own, policy=policy), published.SIMULATION_ATTAINMENT)
            text = f"{load:.0f}/s" if falls else f"above {load:.0f}/s"
            if falls and load == min(spec.rates):
                text = f"below {load:.0f}/s"
            claims.append(Claim(f"{name}, load at which {policy} falls under 99 %", NOT_PUBLISHED, text))
    return claims


def _testbed_claims(spec: FleetSpec, records: Sequence[RunRecord]) -> list[Claim]:
    claims = []
    for form in FORMS:
        for rate in spec.rates:
            at_rate = select(records, form=form, rate=rate)
            texts = [f"{p} {attainment(select(at_rate, policy=p)):.1%}" for p in spec.policies]
            gain = published.TESTBED_GAIN.get(rate)
            there = f"{OURS} +{gain:.0%} over the others" if gain else NOT_PUBLISHED
            quantity = f"{FORM_NAMES[form]}, SLO attainment at {rate:g}/s"
            claims.append(Claim(quantity, there, ", ".join(texts)))
    return claims


# --- panels ---


def _quantiles(records: Sequence[RunRecord]) -> list[float]:
    """Of all runs' requests together, from each run's own: exact where runs are of equal size."""
    pooled = np.sort(np.concatenate([record.tpt_quantiles for record in records]))
    return [float(q) for q in np.quantile(pooled, QUANTILES)]


def _policies(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(record.policy for record in records))


def _draw_bars(axes: "Axes", records: Sequence[RunRecord], title: str) -> None:
    """Means over the seeds, with the extremes; the axis begins at zero."""
    policies = _policies(records)
    draw_means(axes, {p: [100 * r.attainment for r in select(records, policy=p)] for p in policies})
    axes.set(ylabel="SLO attainment, %", ylim=(0, 112), title=title)


def _draw_cdf(axes: "Axes", records: Sequence[RunRecord]) -> None:
    slo_ms = records[0].slo_ms
    for policy in _policies(records):
        axes.plot(_quantiles(select(records, policy=policy)), QUANTILES, label=policy)
    axes.axvline(slo_ms, color="gray", ls=":", label="SLO")
    axes.set(xlabel="time per token, ms", ylabel="share of requests", xlim=(0.5 * slo_ms, 1.5 * slo_ms))
    axes.legend(fontsize=8)


def draw_loads(axes: "Axes", records: Sequence[RunRecord]) -> None:
    """Attainment against load, mean and extremes over the seeds."""
    for policy in _policies(records):
        own = select(records, policy=policy)
        rates = sorted({record.rate for record in own})
        values = [[100 * r.attainment for r in select(own, rate=rate)] for rate in rates]
        axes.plot(rates, [np.mean(v) for v in values], marker=".", label=policy)
        axes.fill_between(rates, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.axhline(99, color="gray", ls=":", lw=0.8)
    axes.set(xlabel="requests/s", ylabel="SLO attainment, %", ylim=(0, 103))
    axes.legend(fontsize=8)
