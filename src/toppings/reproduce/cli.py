"""`toppings reproduce VERB`: one verb per published figure or table, and `all`."""

from collections.abc import Callable

import typer

from toppings.reproduce import fleet_verbs, machine_verbs
from toppings.reproduce.fleet_runs import FleetSpec
from toppings.reproduce.options import DEFAULT_OUT, Out, PerfModelOption, Processes, Quick

reproduce_app = typer.Typer(
    no_args_is_help=True,
    help="The published evaluation again: figures, their data, and the published values.",
)
VERBS: dict[str, Callable[..., None]] = {
    "modes": machine_verbs.modes,
    "steps": machine_verbs.steps,
    "popularity": machine_verbs.popularity,
    "ipc": machine_verbs.ipc,
    "cpu": machine_verbs.cpu,
    "models": machine_verbs.models,
    "testbed": fleet_verbs.published_testbed,
    "simulation": fleet_verbs.simulation,
}
for name, verb in VERBS.items():
    reproduce_app.command(name)(verb)


@reproduce_app.command("all")
def reproduce_all(
    out: Out = DEFAULT_OUT,
    config: machine_verbs.ConfigFile = None,
    perf_model: PerfModelOption = FleetSpec.perf_model,
    processes: Processes = 1,
    quick: Quick = False,
) -> None:
    """Every verb in turn, what is measured first: leave the machine alone meanwhile."""
    machine_verbs.ipc(out, quick)
    machine_verbs.cpu(out, quick)
    machine_verbs.modes(out, config, quick=quick)
    machine_verbs.steps(out)
    machine_verbs.models(out, config, quick=quick)
    machine_verbs.popularity(out)
    fleet_verbs.published_testbed(out, perf_model=perf_model, processes=processes, quick=quick)
    fleet_verbs.simulation(out, perf_model=perf_model, processes=processes, quick=quick)
