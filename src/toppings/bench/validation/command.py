"""`toppings simulate --validate`."""

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from toppings.bench.figures import check_figure_file
from toppings.bench.validation.report import draw, to_json, to_table, verdict
from toppings.bench.validation.validate import ValidationSpec, validate

FIGURE_SUFFIXES = ("pdf", "png")


def run_validation(spec: ValidationSpec, *, is_json: bool, figures: Path | None) -> None:
    """Prints table and verdict, or JSON; the directory `figures` gets a figure and the JSON. Raises as
    `validate`.
    """
    if figures is not None:
        check_figure_file(figures / f"validation.{FIGURE_SUFFIXES[0]}")
        figures.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        results = validate(spec, lambda what, share: progress.update(task, description=what, completed=share))
    text = to_json(spec, results, f"toppings {shlex.join(sys.argv[1:])}")
    if figures is not None:
        (figures / "validation.json").write_text(text)
        for suffix in FIGURE_SUFFIXES:
            draw(results, figures / f"validation.{suffix}")
    if is_json:
        sys.stdout.write(text)
        return
    console = Console()
    for result in results:
        console.print(to_table(result))
    console.print(verdict(results), highlight=False)
