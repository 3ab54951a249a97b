"""What the scripts in benchmarks/ have in common: their options, and the JSON line that they end in."""

import argparse
import json
from pathlib import Path
from typing import Any

from toppings.lab.results import check_files


def make_parser(description: str | None, toy: str, *, figure: str = "") -> argparse.ArgumentParser:
    """With `--toy` and `--json`, and `--figure` where that is explained."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help=f"{toy}: checks that it runs")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    if figure:
        parser.add_argument("--figure", type=Path, help=f"draw {figure} to this file (needs matplotlib)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Ends the script where its results could not be written."""
    options = parser.parse_args()
    try:
        check_files(options.json, getattr(options, "figure", None))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def finish(options: argparse.Namespace, benchmark: str, **result: Any) -> None:
    """The result as one line, and in the file that was asked for."""
    content = {"benchmark": benchmark, **result}
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))
