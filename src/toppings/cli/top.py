"""The verb `top`: how a server or router is, in a terminal, by what its dashboard shows."""

import re
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from toppings.access import read_api_key
from toppings.bad_input import shown
from toppings.options import ApiKey, ApiKeyFile
from toppings.remote import RemoteError, RemoteServer

app = typer.Typer(no_args_is_help=True)

TIMEOUT_S = 10.0
MAX_ROWS = 12
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.2, 3600.0
PIPED_WIDTH = 110

MAX_NAME_CHARS, MAX_LINE_CHARS = 48, 1000
STRANGE = re.compile(r"[^\x20-\x7e\u00a0-\U0010ffff]")

Section = dict[str, Any]


@app.command()
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="a running server or router")],
    *,
    once: Annotated[bool, typer.Option("--once", help="show it once and end")] = False,
    interval: Annotated[float, typer.Option(help="seconds between two looks")] = 1.0,
    api_key: ApiKey = "",
    api_key_file: ApiKeyFile = "",
) -> None:
    """Show how a running server or router is: requests, latencies, queue, adapters, servers."""
    if not MIN_INTERVAL_S <= interval <= MAX_INTERVAL_S:
        raise ValueError(
            f"interval is {interval:g}; it must be from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds"
        )
    server = RemoteServer(url, read_api_key(api_key, api_key_file), timeout_s=TIMEOUT_S)
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    first = server.dashboard()
    if once:
        console.print(_shown(first))
        return
    try:
        with Live(_shown(first), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            for found in _looks(server, interval):
                live.update(found, refresh=True)
    except KeyboardInterrupt:
        return


def _looks(server: RemoteServer, interval: float) -> Iterator[Group | str]:
    """One after the other, for ever; of a server that is away, why it cannot be looked at."""
    while True:
        time.sleep(interval)
        try:
            yield _shown(server.dashboard())
        except RemoteError as error:
            yield _safe(f"{error}; asking again", MAX_LINE_CHARS)


def _shown(told: Section) -> Group:
    about, now = told["about"], told["now"]
    parts: list[Any] = [_head(about, told["state"]), _figures(now, told)]
    if told.get("servers") is not None:
        parts.append(_servers(told["servers"]))
    parts += [_queue(told["queue"]), _adapters(told["adapters"], about["kind"])]
    return Group(*parts)


def _safe(text: str, max_chars: int = MAX_NAME_CHARS) -> str:
    """As it may be printed: a name is neither markup nor a terminal's command."""
    return escape(STRANGE.sub("?", shown(text, max_chars)))


def _head(about: Section, state: Section) -> str:
    what = (
        f"{about['model']}, mode {about['mode']}"
        if about["kind"] == "server"
        else f"router, {about['policy']}"
    )
    reason = f": {state['reason']}" if state["reason"] else ""
    return _safe(f"{what} ({about['version']}): {state['word']}{reason}", MAX_LINE_CHARS)


def _figures(now: Section, told: Section) -> Table:
    latency, cache = told["latency"], told.get("cache")
    table = Table(
        "open", "running", "waiting", "requests/s", "tokens/s", "TTFT p50/p99", "TPT p50/p99", "KV cache"
    )
    in_use = f"{100 * cache['used'] / max(1, cache['total']):.0f} %" if cache else "-"
    numbers = [f"{now[name]:,}" for name in ("open", "running", "waiting")]
    rates = [f"{now[f'{name}_per_s']:g}" for name in ("requests", "tokens")]
    table.add_row(*numbers, *rates, _pair(latency["ttft"]), _pair(latency["tpt"]), in_use)
    return table


def _pair(latency: Section) -> str:
    return "/".join("-" if ms is None else f"{ms:g}" for ms in (latency["p50_ms"], latency["p99_ms"])) + " ms"


def _servers(servers: list[Section]) -> Table:
    table = Table("server", "state", "running", "waiting", "from here", "on device", "url")
    for each in servers:
        numbers = [f"{each[name]:,}" for name in ("running", "waiting", "in_flight", "on_device")]
        table.add_row(_safe(each["id"]), each["state"], *numbers, _safe(each["url"]))
    return table


def _queue(queue: Section) -> Table | str:
    if not queue["rows"]:
        return "no open requests"
    table = Table("tenant", "model", "waiting", "running")
    for row in queue["rows"][:MAX_ROWS]:
        counts = (f"{row['waiting']:,}", f"{row['running']:,}")
        table.add_row(_safe(row["tenant"] or "-"), _safe(row["model"] or "-"), *counts)
    return table


def _adapters(adapters: Section | None, kind: str) -> Group | str:
    if adapters is None:
        return "no engine"
    places = ("device", "host") if kind == "router" else ("device", "loading", "host", "reading")
    counts = ", ".join(f"{adapters[place]:,} {place}" for place in places)
    sums = f"adapters: {adapters['registered']:,} registered; {counts}"
    if not adapters["rows"]:
        return sums
    if kind == "router":
        table = Table("adapter", "requests", "on device", "on host")
        for row in adapters["rows"][:MAX_ROWS]:
            holders = (", ".join(row["device"]), ", ".join(row["host"]))
            table.add_row(_safe(row["name"]), f"{row['requests']:,}", *map(_safe, holders))
        return Group(sums, table)
    table = Table("adapter", "where", "layers", "running", "waiting", "hits")
    for row in adapters["rows"][:MAX_ROWS]:
        counts_of = [f"{row[name]:,}" for name in ("running", "waiting", "hits")]
        table.add_row(_safe(row["name"]), row["place"], f"{row['layers']}/{row['num_layers']}", *counts_of)
    return Group(sums, table)
