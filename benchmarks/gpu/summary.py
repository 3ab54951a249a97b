"""What came out of all.sh: a line per script, figures where matplotlib is installed, and the exit status.

    python benchmarks/gpu/summary.py FOLDER NAME…

Reads FOLDER/NAME.json of each script. Exits with 1 where a script left no result or an aim was missed.
"""

import sys
from pathlib import Path
from typing import Any

from common import read_json

from toppings.lab.figures import draw_groups, new_figure, save


def print_line(name: str, result: dict[str, Any] | None) -> bool:
    """True where the script ended with all aims met."""
    if result is None:
        print(f"{name:16} FAILED: no result, see {name}.log")
        return False
    if result.get("is_partial"):
        print(f"{name:16} STOPPED: a part of its result is in {name}.json, see {name}.log")
        return False
    missed = [aim for aim in result["aims"] if not aim["is_met"]]
    failures = result.get("failures", {})
    print(f"{name:16} {len(result['aims']) - len(missed)} of {len(result['aims'])} aims met")
    for aim in missed:
        print(f"{'':16}   {aim['what']}: {aim['value']:.4g}, aim {aim['limit']}")
    for what, error in failures.items():
        print(f"{'':16}   {what} FAILED: {error}")
    return not (missed or failures)


def draw(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """aims.png: each aim's figure over its limit; cold_start.png and workloads.png: times by mode."""
    try:
        new_figure()
    except ValueError as error:
        print(f"no figures: {error}")
        return
    aims = [(name, aim) for name, result in results.items() for aim in result["aims"]]
    bounded = [(name, aim) for name, aim in aims if float(aim["limit"].split()[1])]
    if bounded:
        figure, [[axes]] = new_figure(width=9, height=1 + 0.25 * len(bounded))
        shares = [aim["value"] / float(aim["limit"].split()[1]) for _, aim in bounded]
        colors = ["tab:green" if aim["is_met"] else "tab:red" for _, aim in bounded]
        axes.barh([f"{name}: {aim['what']} {aim['limit']}" for name, aim in bounded], shares, color=colors)
        axes.axvline(1.0, color="black", lw=0.8)
        axes.set(xlabel="figure over its limit")
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        save(figure, folder / "aims.png")
    if (cold := results.get("cold_start")) is not None and cold["ttft_ms"]:
        draw_modes(cold["ttft_ms"], "first token, ms", folder / "cold_start.png")
    if (workloads := results.get("workloads")) is not None and "over_cached" in workloads:
        over = {
            mode: {f"{case}: {m}": ratio for case, each in by_case.items() for m, ratio in each.items()}
            for mode, by_case in workloads["over_cached"].items()
        }
        draw_modes(over, "mean over cached", folder / "workloads.png")


def draw_modes(values: dict[str, dict[str, float]], label: str, file: Path) -> None:
    """A group of bars a case, a bar a mode."""
    cases = list(next(iter(values.values())))
    figure, axes = new_figure(width=2 + 1.4 * len(cases), height=4.0)
    series = {mode: [by_case[case] for case in cases] for mode, by_case in values.items()}
    draw_groups(axes[0, 0], series, cases)
    axes[0, 0].tick_params(axis="x", labelrotation=20, labelsize=7)
    axes[0, 0].set(ylabel=label)
    axes[0, 0].legend(fontsize=7)
    save(figure, file)


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    results = {name: read_json(folder / f"{name}.json") for name in names}
    are_met = [print_line(name, result) for name, result in results.items()]
    draw(folder, {name: result for name, result in results.items() if result is not None})
    return 0 if all(are_met) else 1


if __name__ == "__main__":
    sys.exit(main())
