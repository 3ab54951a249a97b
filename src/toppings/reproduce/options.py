"""Options that several verbs of `toppings reproduce` have, each written once."""

from pathlib import Path
from typing import Annotated

import typer

from toppings.sim.loading import MODES

DEFAULT_OUT = Path("reproduction")

Out = Annotated[Path, typer.Option(help="directory for PDF, PNG, JSON and comparison.md")]
Quick = Annotated[bool, typer.Option("--quick", help="small and short: does it work here?")]
PerfModelOption = Annotated[
    str, typer.Option(help="JSON file of `toppings profile batches`, instead of the published machine's")
]
Interrupts = Annotated[
    bool | None,
    typer.Option(
        "--prefill-interrupts/--prefill-shares",
        help="a prefill is a step of its own, or shares one with decodes (default: the first for the "
        "published model only)",
    ),
]
Policies = Annotated[str, typer.Option(help="with commas between")]
Seeds = Annotated[int, typer.Option(min=1, help="repetitions of each run")]
Duration = Annotated[float, typer.Option(help="seconds of simulated arrivals")]
Mode = Annotated[str, typer.Option(help=f"cold adapters: {', '.join(MODES)}")]
TraceFile = Annotated[
    str, typer.Option(help="take arrivals and adapters from this file, scaled to the rates")
]
Processes = Annotated[int, typer.Option(min=1, help="simulations at a time")]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on with the runs that an earlier call left in OUT")
]
