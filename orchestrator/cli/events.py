"""``get`` and ``cancel``: one event, by its id or the client's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from orchestrator.cli.story import STYLES, timeline, why_held_back
from orchestrator.cli.support import (
    console,
    duration,
    exit_with,
    json_option,
    moment,
    plain,
    print_json,
    target,
    with_database,
)
from orchestrator.config import Settings
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.database import Cancelled, Database

F = TypeVar("F", bound=Callable[..., object])

_PAGE = 1000
_SHOWN_CHARS = 2000
_WHY_NOT = {
    "in_flight": "it is being delivered just now",
    "finished": "it has ended already",
    "not_found": "there is no such event",
}


def _which(command: F) -> F:
    """The argument ID or the option --external-id, exactly one of them."""
    command = click.option("--external-id", metavar="X", help="The client's own name for it, instead of ID.")(command)
    return click.argument("event_id", metavar="ID", required=False)(command)


def _checked(event_id: str | None, external_id: str | None) -> str | None:
    """The id in its usual form; None when the external id is given."""
    if (event_id is None) == (external_id is None):
        raise click.UsageError("expected either ID or --external-id")
    if event_id is None:
        return None
    try:
        return str(UUID(event_id))
    except ValueError:
        example = "019c1347-d2fb-705e-a717-2a27dd38d28f"
        raise click.UsageError(
            f"ID: expected a UUID such as {example}, got {event_id!r}; or use --external-id"
        ) from None


@click.command()
@_which
@click.option("--all", "show_all", is_flag=True, help="With --external-id: every event, not the newest alone.")
@json_option
def get(event_id: str | None, external_id: str | None, show_all: bool, as_json: bool) -> None:
    """Show an event and what happened to it.

    When it was accepted, due, claimed and attempted, what it waited for, and what came of each attempt.
    With --external-id the newest event of that name; its JSON is one object, or an array with --all.
    """
    by_id = _checked(event_id, external_id)
    if show_all and external_id is None:
        raise click.UsageError("--all: goes with --external-id; an ID names one event")

    async def work(database: Database, _: Settings) -> tuple[list[bytes], str | None]:
        if by_id is not None:
            one = await database.event(by_id)
            found = [] if one is None else [one]
        else:
            assert external_id is not None
            found = await _by_external_id(database, external_id, show_all)
        held_back = None if as_json or show_all or not found else await why_held_back(database, json.loads(found[0]))
        return found, held_back

    events, held_back = with_database(work)
    if not events:
        name = f"the external id {external_id!r}" if by_id is None else f"the id {by_id}"
        raise OrchestratorError(f"there is no event with {name}")
    if as_json:
        print_json(b"[" + b",".join(events) + b"]" if show_all else events[0])
        return
    out = console()
    for event in events if show_all else events[:1]:
        _show(out, json.loads(event), held_back)
    if len(events) > 1 and not show_all:
        out.print("There are older events with this external id: --all shows them.")


async def _by_external_id(database: Database, external_id: str, show_all: bool) -> list[bytes]:
    if not show_all:
        return await database.events_by_external_id(external_id, limit=2)
    events: list[bytes] = []
    page = await database.events_by_external_id(external_id, limit=_PAGE)
    while page:
        events += page
        last = json.loads(page[-1])
        page = await database.events_by_external_id(external_id, limit=_PAGE, after=(last["scheduled_at"], last["id"]))
    return events


def _show(out: Console, event: dict[str, Any], held_back: str | None) -> None:
    from rich.table import Table
    from rich.text import Text

    now = datetime.now(UTC)
    status = event["status"]
    out.print(Text.assemble("event ", (event["id"], "bold"), "  ", (status.replace("_", " "), STYLES.get(status, ""))))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    attempts = str(event["attempt"])
    if event["attempt"] <= event["max_retries"] + 1:  # a redriven event has more
        attempts += f" of at most {event['max_retries'] + 1}"
    for name, value in (
        ("source", event["source"]),
        ("external id", event["external_job_id"]),
        ("delivery", event["delivery_type"]),
        ("destination", target(event)),
        ("ordering key", event["ordering_key"]),
        ("priority", event["priority"] or None),
        ("scheduled", moment(event["scheduled_at"], now=now)),
        ("spread", event["spread_seconds"] and f"over {duration(event['spread_seconds'])}"),
        ("attempts", attempts),
        ("retry policy", event["retry_policy"]),
        ("headers", event["headers"] and json.dumps(event["headers"], ensure_ascii=False)),
        ("payload", _shortened(json.dumps(event["payload"], ensure_ascii=False))),
    ):
        if value is not None:
            facts.add_row(name, Text(plain(value)))
    out.print(facts)
    lines = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for justify in ("left", "right", "left"):
        lines.add_column(no_wrap=True, justify=justify)
    lines.add_column(overflow="fold")
    for at, after, what, details in timeline(event, now, held_back):
        style = STYLES.get(what.rpartition(" ")[2], "")
        lines.add_row(Text(at), Text(after, style="dim"), Text(what, style=style), Text(plain(details)))
    out.print(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}… ({len(text):,} characters)"


@click.command()
@_which
@json_option
def cancel(event_id: str | None, external_id: str | None, as_json: bool) -> None:
    """Cancel an event that has not been claimed yet.

    With --external-id, every event of that name. Exits with 1 when there is none, or when one is being
    delivered or has ended already; an event that was cancelled before counts as cancelled.
    """
    by_id = _checked(event_id, external_id)

    async def work(database: Database, _: Settings) -> list[Cancelled]:
        if by_id is not None:
            return [await database.cancel(by_id)]
        assert external_id is not None
        return await database.cancel_external(external_id)

    results = with_database(work)
    told = [{"id": each.id, "result": each.result, "status": each.status} for each in results]
    if as_json:
        print_json(told[0] if by_id is not None else told)
    elif not results:
        raise OrchestratorError(f"there is no event with the external id {external_id!r}")
    else:
        for each in results:
            if each.result not in _WHY_NOT:
                click.echo(f"{each.id}  {each.result.replace('_', ' ')}")
                continue
            status = f" ({each.status})" if each.result == "finished" else ""
            click.echo(f"Error: {each.id} was not cancelled: {_WHY_NOT[each.result]}{status}", err=True)
    exit_with(bool(results) and not any(each.result in _WHY_NOT for each in results))
