"""What a verb leaves: a figure as PDF and PNG, the JSON behind it, and the table over all of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from toppings.lab.figures import save_all
from toppings.lab.machine import describe_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_FILE = "comparison.md"
NOT_PUBLISHED = "—"


@dataclass(frozen=True)
class Claim:
    """One quantity: the published value, as text, beside ours."""

    quantity: str
    published: str
    ours: str


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """`published` names the figure or table; `differs` says in what ours is another experiment; `data` is
    what the figure shows.
    """

    name: str
    published: str
    claims: Sequence[Claim]
    differs: Sequence[str]
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        content = {"reproduces": f"Toppings, USENIX ATC 2025, {self.published}", **asdict(self)}
        return json.dumps({**content, "machine": describe_machine()}, indent=1) + "\n"


def write(out: Path, outcome: Reproduction, figure: "Figure") -> None:
    """Into the directory `out`, whose `comparison.md` then holds all that were ever written there."""
    save_all(figure, out, outcome.name)
    (out / f"{outcome.name}.json").write_text(outcome.to_json())
    (out / TABLE_FILE).write_text(comparison_table(out))
    _show(outcome)


def comparison_table(out: Path) -> str:
    """Markdown: the claims of every outcome in `out`."""
    lines = ["| figure | quantity | published | here |", "|---|---|---|---|"]
    for file in sorted(out.glob("*.json")):
        for content in _outcomes_in(file):
            for claim in content["claims"]:
                cells = (content["published"], claim["quantity"], claim["published"], claim["ours"])
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _outcomes_in(file: Path) -> list[dict[str, Any]]:
    """One, or none where the file is something else."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return []
    return [content] if isinstance(content, dict) and "reproduces" in content else []


def _show(outcome: Reproduction) -> None:
    table = Table("quantity", "published", "here", box=box.SIMPLE_HEAD, title_justify="left")
    table.title = f"{outcome.name} ({outcome.published})"
    for claim in outcome.claims:
        table.add_row(claim.quantity, claim.published, claim.ours)
    console = Console()
    console.print(table)
    for difference in outcome.differs:
        console.print(f"  differs: {difference}", markup=False, highlight=False)
