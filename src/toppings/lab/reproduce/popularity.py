"""Fig. 12, left: how requests spread over adapters."""

from pathlib import Path

import numpy as np

from toppings.lab.figures import new_figure
from toppings.lab.reproduce import published
from toppings.lab.reproduce.output import NOT_PUBLISHED, Claim, Reproduction, write
from toppings.lab.simulation.describe import popularity_counts
from toppings.sim.synth.popularity import POPULARITIES, popularity
from toppings.sim.trace import FloatArray, Trace

NUM_ADAPTERS = (128, 256, 512)
CURVES = ("published", "zipf:1", "uniform")


def write_popularity(traces: list[Trace], out: Path) -> None:
    """The generator's curve for the published numbers of adapters, other curves, and traces of the user's."""
    figure, axes = new_figure(1, width=5.5)
    shares = {f"{num} adapters": popularity("published", num) for num in NUM_ADAPTERS}
    shares |= {f"{curve}, {NUM_ADAPTERS[0]}": popularity(curve, NUM_ADAPTERS[0]) for curve in CURVES[1:]}
    for trace in traces:
        counts = popularity_counts(trace)
        shares[trace.origin] = counts / counts.sum()
    low, high = published.TOP_TENTH_SHARE
    claims = []
    for label, share in shares.items():
        x = np.concatenate([[0.0], np.arange(1, len(share) + 1) / len(share)])
        axes[0, 0].plot(x, np.concatenate([[0.0], np.cumsum(share)]), label=label)
        there = f"{low:.0%} … {high:.0%}" if label.endswith(" adapters") else NOT_PUBLISHED
        claims.append(Claim(f"top 10 % of adapters, {label}", there, f"{top_tenth(share):.1%}"))
    axes[0, 0].plot([0.1, 0.1], [low, high], "k", lw=4, label="published, top 10 %")
    axes[0, 0].set(xlabel="share of adapters, most popular first", ylabel="share of requests")
    axes[0, 0].legend(fontsize=8)
    outcome = Reproduction(
        name="popularity",
        published="Fig. 12, left",
        claims=claims,
        differs=[
            "one fitted curve, p(i) ∝ exp(-8.6 x^0.58), x = (i - 0.5) / N, stands for the published traces",
            f"the generator also has {', '.join(name for name in POPULARITIES if name != 'published')}",
        ],
        data={"shares": {label: [round(float(s), 6) for s in share] for label, share in shares.items()}},
    )
    write(out, outcome, figure)


def top_tenth(shares: FloatArray) -> float:
    """Of `shares` [A], most popular first: what part the first tenth takes, the last one of it in part."""
    cumulative = np.concatenate([[0.0], np.cumsum(shares)])
    return float(np.interp(len(shares) / 10, np.arange(len(shares) + 1), cumulative) / cumulative[-1])
