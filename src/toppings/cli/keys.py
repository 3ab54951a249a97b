"""The verbs `keys`: the API keys of tenants, in the tenants file that servers and routers read."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from toppings.tenants.expiry import HINT, read_instant
from toppings.tenants.file import parse, read_text
from toppings.tenants.keys import add_key, revoke_key

app = typer.Typer(no_args_is_help=True)
keys_app = typer.Typer(no_args_is_help=True, help="The API keys of tenants.")
app.add_typer(keys_app, name="keys")

TenantsFile = Annotated[Path, typer.Option(help="YAML file of tenants and their keys")]

Expires = Annotated[str, typer.Option(help=f"until when it opens: {HINT} (default: for ever)")]


@keys_app.command("add")
def add(tenant: str, *, tenants_file: TenantsFile, expires: Expires = "") -> None:
    """Make a key for TENANT and print it, this once: the file has only its hash."""
    key = add_key(tenants_file, tenant, expires)
    typer.echo(key.text)
    until = f", which expires at {key.entry.expires}" if expires else ""
    typer.echo(f"key {key.entry.id} of tenant {tenant}{until}; it is shown this once", err=True)


@keys_app.command("list")
def list_keys(*, tenants_file: TenantsFile) -> None:
    """Show the ids of all keys, whose they are, and from when to when. A key begins with tk- and its id."""
    file, now = parse(read_text(tenants_file), str(tenants_file)), datetime.now(UTC)
    table = Table("id", "tenant", "created", "expires")
    for key in file.keys:
        gone = "" if key.tenant in file.tenants else " (no such tenant: it opens nothing)"
        is_over = bool(key.expires) and read_instant(key.expires) <= now
        until = f"{key.expires} (expired)" if is_over else key.expires or "never"
        table.add_row(key.id, f"{key.tenant}{gone}", key.created, until)
    Console().print(table)


@keys_app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], *, tenants_file: TenantsFile) -> None:
    """The key with this ID opens nothing any more; servers see that within a second or two."""
    key = revoke_key(tenants_file, key_id)
    typer.echo(f"revoked key {key.id} of tenant {key.tenant}")
