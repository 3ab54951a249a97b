"""`toppings simulate --validate`."""

import sys
from pathlib import Path

from rich.console import Console

from toppings.lab.figures import check_figure_file, save_all
from toppings.lab.progress import progress_bar
from toppings.lab.results import this_command
from toppings.lab.validation.report import draw, to_json, to_table, verdict
from toppings.lab.validation.validate import ValidationSpec, validate


def run_validation(spec: ValidationSpec, *, is_json: bool, figures: Path | None) -> None:
    """Prints table and verdict, or JSON; the directory `figures` gets a figure and the JSON. Raises as
    `validate`.
    """
    if figures is not None:
        check_figure_file(figures / "validation.pdf")
        figures.mkdir(parents=True, exist_ok=True)
    with progress_bar() as bar:
        results = validate(spec, bar.reach)
    text = to_json(spec, results, this_command())
    if figures is not None:
        (figures / "validation.json").write_text(text)
        save_all(draw(results), figures, "validation", dpi=90)
    if is_json:
        sys.stdout.write(text)
        return
    console = Console()
    for result in results:
        console.print(to_table(result))
    console.print(verdict(results), highlight=False)
