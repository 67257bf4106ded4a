"""``dead-letters``: events that ran out of attempts, or that a receiver refused for good."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli.bulk_commands import filter_of, narrowing, sweep, sweeping, with_filter
from orchestrator.cli.event_timeline import show_event
from orchestrator.cli.support import (
    console,
    duration,
    json_option,
    plain,
    print_json,
    read_event,
    target,
    with_database,
)
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.database import Filter

F = TypeVar("F", bound=Callable[..., object])

_MAX_RATE = 100_000


def _filtered(command: F) -> F:
    command = click.option(
        "--reason", metavar="TEXT", help="Dead letters whose reason contains TEXT, in upper or lower case."
    )(command)
    return narrowing("Dead letters", "Died")(command)


@click.group("dead-letters")
def dead_letters() -> None:
    """List, show, redrive and purge events that ran out of attempts.

    Events that a receiver refused for good are dead letters too.
    """


@dead_letters.command("list")
@_filtered
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Maximum number to list.")
@json_option
def list_dead_letters(limit: int, as_json: bool, **filters: Any) -> None:
    """List dead letters, the latest first."""
    which = filter_of(**filters)
    # One more than asked for tells whether there are more.
    found = with_filter(lambda database, _: database.dead_letters(which, limit=limit + 1))
    if as_json:
        print_json(b"[" + b",".join(found[:limit]) + b"]")
        return
    if not found:
        console().print("There are no dead letters." if which == filter_of() else "No dead letter matches the filter.")
        return
    from rich.table import Table
    from rich.text import Text

    now = datetime.now(UTC)
    table = Table("died", "id", "source", "attempts", "destination", "reason", box=None, pad_edge=False)
    for letter in map(json.loads, found[:limit]):
        died_s = (now - datetime.fromisoformat(letter["died_at"])).total_seconds()
        table.add_row(
            f"{duration(max(0.0, died_s))} ago",
            letter["id"],
            Text(plain(letter["source"])),
            str(letter["attempts"]),
            Text(plain(target(letter))),
            Text(plain(letter["reason"])),
        )
    out = console()
    out.print(table)
    if len(found) > limit:
        out.print(f"There are more: --limit {min(10_000, limit * 5)}")


@dead_letters.command()
@click.argument("event_id", metavar="ID", type=click.UUID)
@json_option
def show(event_id: object, as_json: bool) -> None:
    """Show a dead event and every attempt."""
    found = with_database(lambda database, _: database.event(str(event_id)))
    if found is None:
        raise OrchestratorError(f"there is no event with the id {event_id}")
    event = read_event(found)
    if event["status"] != "dead":
        raise OrchestratorError(f"{event_id} is not dead: its status is {event['status']}; see orchestrator get")
    if as_json:
        print_json(found)
    else:
        show_event(console(), event, None)


@dead_letters.command()
@click.argument("event_id", metavar="[ID]", type=click.UUID, required=False)
@_filtered
@click.option("--rate", type=float, metavar="N", help="Make N events due per second. [default: all at once]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Redrive at most N events. [default: all]")
@sweeping
@json_option
def redrive(
    event_id: object | None,
    rate: float | None,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """Redrive dead events: one, those that match a filter, or all.

    Each event gets as many attempts as it had at first and keeps its history. The limits of its destination hold.

    \b
    orchestrator dead-letters redrive --destination hooks.example.com --from -1h --rate 50
    """
    which = filter_of(**filters)
    if event_id is not None:
        if which != filter_of() or (rate, limit, dry_run) != (None, None, False):
            raise click.UsageError("ID: names one event; leave --rate, --limit, --dry-run and the filter out")
        _redrive_one(str(event_id), as_json)
        return
    if rate is not None and not 0 < rate <= _MAX_RATE:
        raise click.UsageError(f"--rate: expected more than 0 and at most {_MAX_RATE:,} a second, got {rate}")
    sweep(
        lambda sweeps, **bounds: sweeps.redrive(which, rate=rate, **bounds),
        "Redrive {} dead events?",
        "redriven",
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
        limit=limit,
    )


def _redrive_one(event_id: str, as_json: bool) -> None:
    result = with_database(lambda database, _: database.redrive(event_id))
    if result is None:
        raise OrchestratorError(f"there is no event with the id {event_id}")
    if result != "redriven":
        why = {
            "expired": "it has expired",
            "purged": "it was purged",
            "refused": "events may not be delivered to its topic; see KAFKA_ALLOW_TOPICS",
        }.get(result, f"it is not dead ({result})")
        raise OrchestratorError(f"{event_id} was not redriven: {why}")
    if as_json:
        print_json({"id": event_id, "result": result})
    else:
        click.echo(f"{event_id}  redriven")


@dead_letters.command()
@_filtered
@sweeping
@json_option
def purge(dry_run: bool, yes: bool, as_json: bool, **filters: Any) -> None:
    """Purge the dead letters that match a filter.

    A purged dead letter can no longer be listed or redriven. Its event stays dead until retention drops it.
    """
    which: Filter = filter_of(**filters)
    if which == filter_of():
        raise click.UsageError(
            "expected a filter: --source, --destination, --from, --until or --reason; for all, --until now"
        )
    sweep(
        lambda sweeps, **bounds: sweeps.purge(which, **bounds),
        "Purge {} dead letters?",
        "purged",
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )
