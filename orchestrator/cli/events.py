"""``get``, ``cancel`` and ``reschedule`` one event by its id or external id; ``cancel`` many events by a filter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import click

from orchestrator.cli.bulk_commands import filter_of, narrowing, sweep, sweeping
from orchestrator.cli.event_timeline import show_event, why_held_back
from orchestrator.cli.support import console, exit_with, json_option, moment, print_json, read_event, with_database
from orchestrator.cli.times import a_duration, a_time, iso
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database import Cancelled, Database, Rescheduled

F = TypeVar("F", bound=Callable[..., object])

_PAGE = 1000
_WHY_NOT = {
    "in_flight": "it is being delivered",
    "finished": "it has ended already",
    "not_found": "there is no such event",
}
_INSTEAD = {
    "in_flight": "try again when this attempt has ended",
    "finished": "submit a new event instead",
}


def _which(command: F) -> F:
    """The argument ID or the option --external-id, exactly one of them."""
    command = click.option(
        "--external-id",
        "--external-job-id",
        "external_id",
        metavar="X",
        help="The event's external id, instead of ID.",
    )(command)
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
@click.option("--all", "show_all", is_flag=True, help="With --external-id: show every event, not only the newest.")
@json_option
def get(event_id: str | None, external_id: str | None, show_all: bool, as_json: bool) -> None:
    """Show an event and what happened to it.

    Shows when the event was accepted, due, claimed and attempted, why it waited, and the result of each attempt.
    With --external-id, shows the newest event of that external id. The JSON is one object, or an array with --all.
    """
    by_id = _checked(event_id, external_id)
    if show_all and external_id is None:
        raise click.UsageError("--all: needs --external-id; an ID names one event")

    async def work(database: Database, _: Settings) -> tuple[list[bytes], str | None]:
        if by_id is not None:
            one = await database.event(by_id)
            found = [] if one is None else [one]
        else:
            assert external_id is not None
            found = await _by_external_id(database, external_id, show_all)
        held_back = None if as_json or show_all or not found else await why_held_back(database, read_event(found[0]))
        return found, held_back

    events, held_back = with_database(work)
    if not events:
        raise _no_event(by_id, external_id)
    if as_json:
        print_json(b"[" + b",".join(events) + b"]" if show_all else events[0])
        return
    out = console()
    for event in events if show_all else events[:1]:
        show_event(out, read_event(event), held_back)
    if len(events) > 1 and not show_all:
        out.print("There are older events with this external id: --all shows them.")


def _no_event(event_id: str | None, external_id: str | None) -> OrchestratorError:
    name = f"the external id {external_id!r}" if event_id is None else f"the id {event_id}"
    return OrchestratorError(f"there is no event with {name}")


async def _by_external_id(database: Database, external_id: str, show_all: bool) -> list[bytes]:
    if not show_all:
        return await database.events_by_external_id(external_id, limit=2)
    events: list[bytes] = []
    page = await database.events_by_external_id(external_id, limit=_PAGE)
    while page:
        events += page
        last = read_event(page[-1])
        page = await database.events_by_external_id(external_id, limit=_PAGE, after=(last["scheduled_at"], last["id"]))
    return events


@click.command()
@_which
@narrowing("Events", "Scheduled")
@sweeping
@json_option
def cancel(
    event_id: str | None,
    external_id: str | None,
    source: str | None,
    destination: str | None,
    since: datetime | None,
    until: datetime | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Cancel an event that is not in flight, or all events that match a filter.

    With --external-id, cancels every event of that external id. Exits with 1 if there is none, or if one is being
    delivered or has ended already. Cancelling a cancelled event succeeds.

    With --source, --destination, --from and --until, cancels every live event that matches all of them. The command
    first counts the events, shows a few and asks for confirmation. Exits with 1 if some were left because they are
    being delivered.

    \b
    orchestrator cancel --source shop --destination hooks.example.com --from now --until +1d
    """
    if (event_id, external_id) == (None, None) and (source, destination, since, until) != (None,) * 4:
        which = filter_of(source, destination, since, until)
        exit_with(
            sweep(
                lambda sweeps, **bounds: sweeps.cancel(which, **bounds),
                "Cancel {} events?",
                "cancelled",
                dry_run=dry_run,
                yes=yes,
                as_json=as_json,
            )
        )
        return
    if (source, destination, since, until, dry_run, yes) != (None, None, None, None, False, False):
        raise click.UsageError(
            "--source, --destination, --from, --until, --dry-run, --yes: for many events, without ID"
        )
    if (event_id, external_id) == (None, None):
        raise click.UsageError("expected ID, --external-id, or a filter: --source, --destination, --from or --until")
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


@click.command()
@_which
@click.option(
    "--at", callback=a_time, metavar="TIME", help="New time: RFC 3339 with a zone, or relative: +10s, +1h30m."
)
@click.option(
    "--in", "after", callback=a_duration, metavar="DURATION", help="New time, counted from now: 10s, 1h30m, 2d."
)
@click.option(
    "--expires-at", callback=a_time, metavar="TIME", help="No attempt begins at TIME or later. [default: unchanged]"
)
@json_option
def reschedule(
    event_id: str | None,
    external_id: str | None,
    at: datetime | None,
    after: timedelta | None,
    expires_at: datetime | None,
    as_json: bool,
) -> None:
    """Deliver an event at another time.

    Ends the event and submits a successor in one transaction; each of the two names the other. With --external-id,
    reschedules the only live event of that external id. Exits with 1 if there is none, or if it is being delivered or
    has ended already. Repeating the command changes nothing.
    """
    by_id = _checked(event_id, external_id)
    if (at is None) == (after is None):
        raise click.UsageError("expected either --at or --in")
    scheduled_at = datetime.now(UTC) + after if after is not None else at
    assert scheduled_at is not None

    def work(database: Database, _: Settings) -> Awaitable[Rescheduled | None]:
        return database.reschedule(
            by_id,
            external_id,
            scheduled_at=scheduled_at.isoformat(),
            expires_at=iso(expires_at),
        )

    result = with_database(work)
    if result is None:
        raise _no_event(by_id, external_id)
    if as_json:
        print_json(result._asdict())
    elif result.result == "refused":
        raise OrchestratorError(f"{result.field}: {result.reason}")
    elif result.result in _INSTEAD:
        instead = f"reschedule {result.successor} instead" if result.successor else _INSTEAD[result.result]
        why = f"{_WHY_NOT[result.result]} ({result.status}); {instead}"
        raise OrchestratorError(f"{result.id} was not rescheduled: {why}")
    else:
        due = moment(scheduled_at.isoformat(), now=datetime.now(UTC))
        click.echo(f"{result.id}  {result.result.replace('_', ' ')} as {result.successor}, due {due}")
    exit_with(result.result not in ("refused", *_INSTEAD))
