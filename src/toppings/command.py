"""The command `toppings`: which verb lives where. A verb's module is imported when it is asked for."""

from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

USER_ERROR = 2

Verbs = dict[str, tuple[str, str]]
"""By name: the module whose Typer `app` has the verb, and what it does, which stands there too."""

CLI, LAB = "toppings.cli", "toppings.lab"
VERBS: Verbs = {
    "serve": (
        f"{CLI}.serving",
        "Serve a base model and its adapters over HTTP.",
    ),
    "route": (
        f"{CLI}.serving",
        "Place requests on many servers of one base model: a streaming reverse proxy.",
    ),
    "up": (
        f"{CLI}.serving",
        "Serve a base model from many engines with Ray Serve.",
    ),
    "adapters": (f"{CLI}.adapters", "The adapters of a model, or of a running server."),
    "top": (
        f"{CLI}.top",
        "Show how a running server or router is: requests, latencies, queue, adapters, servers.",
    ),
    "keys": (f"{CLI}.keys", "The API keys of tenants."),
    "doctor": (
        f"{CLI}.doctor",
        "Tell what this machine, these settings and their state directory can do, and what to change.",
    ),
    "plan": (
        f"{CLI}.profile",
        "Show what `auto` would do with a cold adapter, and the times it predicts for each mode.",
    ),
    "profile": (f"{CLI}.profile", "Measure what decisions rest on."),
    "synth": (f"{CLI}.synth", "Random-weight checkpoints, for benchmarks."),
    "bench": (f"{LAB}.cli", "Latencies of cold requests, here or on a running server."),
    "report": (
        f"{LAB}.cli",
        "Mean prefill, decode and load times of each mode, from the servers' step logs.",
    ),
    "trace": (f"{LAB}.simulation.cli", "Traces of requests: make them, look at them."),
    "simulate": (
        f"{LAB}.simulation.cli",
        "Compare routing policies on servers that are simulated: a trace, or a generated workload.",
    ),
    "reproduce": (
        f"{LAB}.reproduce.cli",
        "The published evaluation again: figures, their data, and the published values.",
    ),
    "version": (f"{CLI}.serving", "Print the version."),
}


class LazyGroup(TyperGroup):
    """A group whose `verbs` are imported when they are asked for, beside those it was given."""

    verbs: ClassVar[Verbs] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), *self.verbs]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """None for a verb that there is not."""
        if cmd_name in self.verbs:
            return load_verb(self.verbs, cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`commands` gets the names of all: a misspelt verb is compared with them."""
        self.commands = {**dict.fromkeys(self.verbs), **self.commands}  # type: ignore[dict-item]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Without importing any of them."""
        own = [(name, command.get_short_help_str(200)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*own, *((name, text) for name, (_, text) in self.verbs.items())])


def load_verb(verbs: Verbs, name: str) -> Any:
    """The verb as a command of its module's `app`."""
    group = typer.main.get_group(import_module(verbs[name][0]).app)
    return group.commands[name]


def lazy_group(verbs: Verbs) -> type[LazyGroup]:
    return type("LazyVerbs", (LazyGroup,), {"verbs": verbs})


app = typer.Typer(
    cls=lazy_group(VERBS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes as long as everything else that a list of verbs needs
    help="Toppings: serve many LoRA adapters of one base model.",
)


@app.callback()
def _verbs() -> None:
    """A group even where no verb is registered."""


def main() -> None:
    """What a user did wrong is told in one line, with exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(USER_ERROR) from None
