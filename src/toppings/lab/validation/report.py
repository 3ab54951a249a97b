"""A validation as a table, as JSON and as a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich import box
from rich.table import Table

from toppings.lab.figures import draw_cumulative, new_figure
from toppings.lab.machine import describe_machine
from toppings.lab.outcome import Outcome
from toppings.lab.summary import Latencies
from toppings.lab.tables import link_note
from toppings.lab.validation.comparison import (
    THROUGHPUT,
    LoadResult,
    MeasureError,
    Replay,
    misses,
)
from toppings.lab.validation.validate import ValidationSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = ("ttft", "tpt")
COLUMNS = ("", "engine", "simulator", "error", "aim", "", "engine's own spread")


def to_table(result: LoadResult) -> Table:
    """Medians over the replays; the spread is of the engine's replays among themselves."""
    table = Table(box=box.SIMPLE_HEAD, title=_title(result), title_justify="left", caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name else "left")
    for comparison in result.comparisons():
        table.add_row(*_cells(comparison))
    table.caption = (
        f"machine's drift within a replay: {_percents([replay.drift for replay in result.replays])}\n"
        f"model's error on the engine's very steps: {_percents([r.step_error for r in result.replays])}"
    )
    return table


def verdict(results: Sequence[LoadResult]) -> str:
    """One line, and one more for each aim that was missed."""
    num_aims = sum(c.aim is not None for result in results for c in result.comparisons())
    missed = misses(results)
    lines = [f"{num_aims - len(missed)} of {num_aims} errors are within their aims"]
    lines += [f"missed: {load}, {c.measure}: {c.error:+.1%}, aim {c.aim:.0%}" for load, c in missed]
    return "\n".join(lines)


def _title(result: LoadResult, *, separator: str = "; ") -> str:
    load = f"{len(result.trace)} requests, {result.rate:.2f}/s, mode {result.load.mode}"
    parts = (result.load.name, load, link_note([result.link_gbps]))
    return separator.join(part for part in parts if part)


def _cells(comparison: MeasureError) -> tuple[str, ...]:
    unit = "" if comparison.measure == THROUGHPUT else " ms"
    aim = "" if comparison.aim is None else f"{comparison.aim:.0%}"
    is_within = "" if comparison.aim is None else "yes" if comparison.is_within else "NO"
    return (
        f"{comparison.measure}{unit}",
        f"{comparison.engine:,.1f}",
        f"{comparison.simulated:,.1f}",
        f"{comparison.error:+.1%}",
        aim,
        is_within,
        f"{comparison.spread:.1%}",
    )


def _percents(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.1%}" for value in values)


def to_json(spec: ValidationSpec, results: Sequence[LoadResult], command: str) -> str:
    """All that the table says, each replay with its model, and the latencies behind the figure."""
    content = {
        "command": command,
        "machine": describe_machine(),
        "spec": spec,
        "verdict": verdict(results).splitlines(),
        "loads": [_load_json(result) for result in results],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


def _load_json(result: LoadResult) -> dict[str, Any]:
    config = msgspec.to_builtins(result.config)
    del config["perf_model"]  # each replay has its own
    return {
        "load": result.load,
        "rate": result.rate,
        "num_requests": len(result.trace),
        "emulated_link_gbps": result.link_gbps or None,
        "config": config,
        "comparisons": [{**msgspec.to_builtins(c), "is_within": c.is_within} for c in result.comparisons()],
        "replays": [_replay_json(replay) for replay in result.replays],
    }


def _replay_json(replay: Replay) -> dict[str, Any]:
    return {
        "errors": replay.errors(),
        "drift": replay.drift,
        "step_error": replay.step_error,
        "decode_ms": replay.model.decode.coefficients,
        "prefill_ms": replay.model.prefill.coefficients,
        "link_gbps": replay.model.link_gbps,
        "latencies_ms": {"engine": _rounded(replay.engine), "simulator": _rounded(replay.simulated)},
    }


def _rounded(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    return {name.upper(): np.round(ms, 2).tolist() for name, ms in Latencies.of(outcomes).named().items()}


def draw(results: Sequence[LoadResult]) -> "Figure":
    """Cumulative distributions of the engine's replays and of their simulations, one column per load."""
    figure, axes = new_figure(len(results), len(DRAWN))
    for column, result in enumerate(results):
        for row, name in enumerate(DRAWN):
            _draw_panel(axes[row][column], result, name)
        axes[0][column].set_title(_title(result, separator="\n"), fontsize=9)
    axes[0][0].legend()
    return figure


def _draw_panel(panel: "Axes", result: LoadResult, name: str) -> None:
    for number, replay in enumerate(result.replays):
        for outcomes, label, style in (
            (replay.engine, "engine", {"color": "tab:gray", "lw": 1.5}),
            (replay.simulated, "simulator", {"color": "tab:red", "lw": 1, "ls": "--"}),
        ):
            ms = getattr(Latencies.of(outcomes), name)
            draw_cumulative(panel, ms, None if number else label, drawstyle="steps-post", **style)
    panel.set(xlabel=f"{name.upper()}, ms", xlim=(0, None))
