"""``stats`` and ``dead-letters``: how the whole is doing."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.support import (
    console,
    duration,
    json_option,
    moment,
    plain,
    print_json,
    target,
    with_database,
)
from orchestrator.config import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.database import Database

_WATCH_S = 1.0
_STATES = (
    ("scheduled", "wait for their first attempt"),
    ("retrying", "failed, and wait for the next attempt"),
    ("in_flight", "claimed by a dispatcher"),
    ("backlog", "due, and claimed by nobody yet"),
    ("dead_letters", "ran out of attempts"),
)


@click.command()
@click.option("--watch", is_flag=True, help="Show it anew every second, with rates, until Ctrl-C.")
@json_option
def stats(watch: bool, as_json: bool) -> None:
    """Show how many events are in which state."""
    if watch and as_json:
        raise click.UsageError("--watch and --json: one document is printed once; leave one of them out")
    if watch:
        with_database(_watch)
        return
    found = with_database(lambda database, _: database.statistics())
    if as_json:
        print_json(found)
    else:
        console().print(_table(json.loads(found), None))


async def _watch(database: Database, settings: Settings) -> None:
    from rich.live import Live

    before: dict[str, Any] | None = None
    try:
        with Live(console=console(), auto_refresh=False) as live:
            while True:
                found = json.loads(await database.statistics())
                live.update(_table(found, before), refresh=True)
                before = found
                await asyncio.sleep(_WATCH_S)
    except asyncio.CancelledError:
        return  # Ctrl-C is how it ends


def _table(found: dict[str, Any], before: dict[str, Any] | None) -> Table:
    from rich.table import Table

    now = datetime.fromisoformat(found["at"])
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, about in _STATES:
        alarming = name == "dead_letters" and found[name] > 0
        table.add_row(name.replace("_", " "), f"{found[name]:,}", about, style="red" if alarming else None)
    for name, count, about in (
        ("paused", found["destinations_paused"], "destinations, until they are resumed"),
        ("breakers open", found["breakers_open"], "destinations that fail, and are tried now and then"),
    ):
        if count:
            table.add_row(name, f"{count:,}", about, style="yellow")
    if found["paused_at"]:
        table.add_row("paused", "all", f"since {moment(found['paused_at'], now=now)}", style="magenta")
    if found["oldest_due_at"]:
        late_s = (now - datetime.fromisoformat(found["oldest_due_at"])).total_seconds()
        table.add_row("oldest due", duration(late_s), "how long the oldest of the backlog has been due")
    if found["next_due_at"]:
        table.add_row("next due", moment(found["next_due_at"], now=now), "")
    table.add_section()
    for name, total in found["totals"].items():
        about = "in all"
        if before is not None:
            passed_s = (now - datetime.fromisoformat(before["at"])).total_seconds()
            about += f", {(total - before['totals'][name]) / passed_s:,.0f} a second"
        table.add_row(name, f"{total:,}", about)
    return table


@click.command("dead-letters")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Most to list.")
@json_option
def dead_letters(limit: int, as_json: bool) -> None:
    """List events that ran out of attempts.

    Those that their receivers refused for good are among them. The latest come first.
    """
    # One more than asked for tells whether there are more.
    found = with_database(lambda database, _: database.dead_letters(limit=limit + 1))
    if as_json:
        print_json(b"[" + b",".join(found[:limit]) + b"]")
        return
    if not found:
        console().print("There are no dead letters.")
        return
    from rich.table import Table
    from rich.text import Text

    now = datetime.now(UTC)
    table = Table("died", "id", "attempts", "destination", "reason", box=None, pad_edge=False)
    for letter in map(json.loads, found[:limit]):
        died_s = (now - datetime.fromisoformat(letter["died_at"])).total_seconds()
        table.add_row(
            f"{duration(max(0.0, died_s))} ago",
            letter["id"],
            str(letter["attempts"]),
            Text(plain(target(letter))),
            Text(plain(letter["reason"])),
        )
    out = console()
    out.print(table)
    if len(found) > limit:
        out.print(f"There are more: --limit {limit * 5}")
