"""``stats``: events by state, and counts in a range of time."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.bulk_commands import filter_of, narrowing, with_filter
from orchestrator.cli.support import console, duration, json_option, moment, plain, print_json, with_database
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.database import Database, Filter

_WATCH_S = 1.0
_GROUPS = ("minute", "source", "destination")
_MOST_COUNTS = 50_000
_STATES = (
    ("scheduled", "wait for their first attempt"),
    ("retrying", "failed, and wait for the next attempt"),
    ("in_flight", "claimed by a dispatcher"),
    ("backlog", "due, but not claimed yet"),
    ("dead_letters", "ran out of attempts"),
)


def _groups(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    groups = value.split(",")
    for group in groups:
        if group not in _GROUPS:
            raise click.BadParameter(f"expected some of {','.join(_GROUPS)}, got {group!r}")
    return sorted(set(groups), key=_GROUPS.index)


@click.command()
@click.option("--watch", is_flag=True, help="Refresh every second, with rates, until Ctrl-C.")
@click.option(
    "--by", callback=_groups, metavar="GROUPS", help="Group counts by one or more of minute,source,destination."
)
@narrowing("Counts", "Counts")
@json_option
def stats(watch: bool, by: list[str] | None, as_json: bool, **filters: Any) -> None:
    """Show events by state, or counts by time, source and destination.

    With --by or a filter, shows how many events were accepted, delivered and so on in the last hour, or from --from
    until --until. Maintenance gives new counts their source and destination once a minute.

    \b
    orchestrator stats --by destination --from -1d
    """
    if watch and as_json:
        raise click.UsageError("--watch and --json: JSON is printed only once; leave one of them out")
    which = filter_of(**filters)
    if by is not None or which != filter_of():
        if watch:
            raise click.UsageError("--watch: shows only states; leave --by and the filter out")
        _show_counts(by or [], which, as_json)
        return
    if watch:
        with_database(_watch)
        return
    found = with_database(lambda database, _: database.statistics())
    if as_json:
        print_json(found)
    else:
        console().print(_table(json.loads(found), None))


def _show_counts(by: list[str], which: Filter, as_json: bool) -> None:
    found = with_filter(lambda database, _: database.statistics_by(by, which, limit=_MOST_COUNTS + 1))
    if len(found) > _MOST_COUNTS:
        raise OrchestratorError(f"--by: gives more than {_MOST_COUNTS:,} counts; name fewer groups, or narrow --from")
    if as_json:
        print_json(b"[" + b",".join(found) + b"]")
        return
    counts = [json.loads(each) for each in found]
    if not counts:
        console().print("There are no counts in this range.")
        return
    from rich.table import Table
    from rich.text import Text

    names = sorted({each["name"] for each in counts})
    rows: dict[tuple[str, ...], dict[str, int]] = {}
    for each in counts:
        rows.setdefault(tuple(each[group] for group in by), {})[each["name"]] = each["value"]
    table = Table(*by, box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for key, values in rows.items():
        groups = (moment(text)[:16] if group == "minute" else plain(text) for group, text in zip(by, key, strict=True))
        table.add_row(*map(Text, groups), *(f"{values[name]:,}" if name in values else "" for name in names))
    console().print(table)


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
        return  # Ctrl-C ends it


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
        ("breakers open", found["breakers_open"], "destinations that fail; each is tried from time to time"),
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
