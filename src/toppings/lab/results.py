"""Where results go: checked before anything is measured for them, written with the machine beside them."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from toppings.lab.figures import check_figure_file
from toppings.lab.machine import describe_machine


def check_files(json_file: Path | None, figure: Path | None) -> None:
    """Makes the directories that results go to. Raises ValueError or OSError where results could not be
    written, before anything is measured for them."""
    check_figure_file(figure)
    for file in filter(None, (json_file, figure)):
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("ab").close()
        if is_new:
            file.unlink()


def write_json(file: Path | None, content: dict[str, Any], *, indent: int = 2) -> None:
    """Nothing where there is no file."""
    if file is not None:
        file.write_text(json.dumps({**content, "machine": describe_machine()}, indent=indent) + "\n")


def this_command() -> str:
    """As it was typed."""
    return f"toppings {shlex.join(sys.argv[1:])}"
