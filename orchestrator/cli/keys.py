"""``keys``: the keys of the HTTP API."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import click

from orchestrator.cli.support import console, exit_with, json_option, moment, print_json, with_database
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database import Database

_SCOPES = ("read", "submit", "admin")


def _name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,63}", value) is None:
        raise click.BadParameter(f"expected 1 to 63 letters, digits, '.', '_' and '-', got {value!r}")
    return value


@click.group()
def keys() -> None:
    """Manage the keys of the HTTP API."""


@keys.command()
@click.argument("name", callback=_name)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(_SCOPES),
    multiple=True,
    required=True,
    help="What the key may do. Repeat for more.",
)
@json_option
def create(name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Create a key and print it once: the database keeps only its hash.

    NAME says who uses the key. Scopes: `read` queries, `submit` submits and cancels, `admin` does everything.
    """
    from orchestrator.api.auth import key_hash, new_key

    key = new_key()
    wanted = sorted(set(scopes))

    async def work(database: Database, _: Settings) -> None:
        if name in {each["name"] for each in map(json.loads, await database.list_api_keys())}:
            raise OrchestratorError(f"there is a key named {name!r}; revoke it first: orchestrator keys revoke {name}")
        await database.create_api_key(name, key_hash(key), wanted)

    with_database(work)
    if as_json:
        print_json({"name": name, "scopes": wanted, "key": key})
        return
    click.echo(key)
    console(stderr=True).print(
        f"Key [bold]{name}[/] has the scopes: {', '.join(wanted)}. It is not shown again; keep it now.\n"
        "Send it as `Authorization: Bearer …` or `X-API-Key: …`."
    )


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys: their names and scopes, never the keys themselves."""
    found = with_database(lambda database, _: database.list_api_keys())
    if as_json:
        print_json(b"[" + b",".join(found) + b"]")
        return
    if not found:
        console().print("There are no keys. Create one with: orchestrator keys create NAME --scope submit")
        return
    from rich.table import Table

    table = Table("name", "scopes", "created", box=None, pad_edge=False)
    for key in map(json.loads, found):
        table.add_row(key["name"], ", ".join(key["scopes"]), moment(key["created_at"]))
    console().print(table)


@keys.command()
@click.argument("name", callback=_name)
@json_option
def revoke(name: str, as_json: bool) -> None:
    """Delete a key; running APIs notice within ten seconds. Exits with 1 if there is no key of that name."""
    revoked = with_database(lambda database, _: database.revoke_api_key(name))
    if as_json:
        print_json({"name": name, "revoked": revoked})
    elif revoked:
        console().print(f"Key [bold]{name}[/] is revoked.")
    else:
        raise OrchestratorError(f"there is no key named {name!r}; orchestrator keys list shows all")
    exit_with(revoked)
