"""``rejects``: records from Kafka that did not become events."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import IO, TYPE_CHECKING, TypeVar

import click

from orchestrator.cli.support import console, json_option, kept_before, moment, plain, print_json, with_database
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database import Submitted
    from orchestrator.database.rejects import KeptReject, Rejects

T = TypeVar("T")

_SHOWN_CHARS = 2000


def _with_rejects(work: Callable[[Rejects, Settings], Awaitable[T]]) -> T:
    from orchestrator.database.rejects import Rejects

    return with_database(lambda database, ours: work(Rejects(database), ours))


async def _found(rejects: Rejects, number: int) -> KeptReject:
    found = await rejects.get(number)
    if found is None:
        raise OrchestratorError(f"there is no reject {number}; orchestrator rejects list shows all")
    return found


@click.group()
def rejects() -> None:
    """List, show and resubmit records from Kafka that did not become events.

    The database keeps their bytes and the reason: no record that was read from Kafka is thrown away.
    """


@rejects.command("list")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="Maximum number to list.")
@click.option("--before", metavar="NUMBER", type=int, help="List smaller numbers only, for the next page.")
@json_option
def list_rejects(limit: int, before: int | None, as_json: bool) -> None:
    """List rejects, newest first."""
    found = _with_rejects(lambda rejects, _: rejects.page(limit=limit, before=before))
    if as_json:
        print_json(b"[" + b",".join(found) + b"]")
        return
    if not found:
        console().print("There are no rejects." if before is None else "There are no more.")
        return
    from rich.table import Table

    table = Table("reject", "received", "record", "what is wrong", "resubmitted as", box=None, pad_edge=False)
    for each in map(json.loads, found):
        table.add_row(
            str(each["reject"]),
            moment(each["received_at"]),
            f"{each['topic']} {each['partition']}:{each['offset']}",
            plain(f"{each['field']}: {each['reason']}"),
            each["event_id"] or "",
        )
    console().print(table)
    if len(found) == limit:
        console().print(f"For more: orchestrator rejects list --before {each['reject']}")


@rejects.command()
@click.argument("number", type=int)
@click.option("--raw", is_flag=True, help="Print only the bytes of its value, to correct them in a file.")
@json_option
def show(number: int, raw: bool, as_json: bool) -> None:
    """Show a reject and the record as it was sent."""
    found = _with_rejects(lambda rejects, _: _found(rejects, number))
    if raw:
        click.echo(found.value or b"", nl=False)
    elif as_json:
        _, *fields = found._fields
        print_json({"reject": number} | {name: getattr(found, name) for name in fields})  # bytes become base64
    else:
        rows = {
            "reject": str(found.number),
            "record": f"topic {found.topic}, partition {found.partition}, offset {found.offset}",
            "received": moment(found.received_at),
            "what is wrong": f"{found.field}: {found.reason}",
            "resubmitted": f"{moment(found.resubmitted_at)} as {found.event_id}" if found.event_id else "no",
            "key": _text(found.key),
            "value": _text(found.value),
        }
        for name, told in rows.items():
            click.echo(f"{name:<14} {plain(told)}")


def _text(sent: bytes | None) -> str:
    if sent is None:
        return "none"
    text = sent[:_SHOWN_CHARS].decode(errors="backslashreplace")
    return text if len(sent) <= _SHOWN_CHARS else f"{text}… ({len(sent):,} bytes; see --raw)"


@rejects.command()
@click.argument("number", type=int)
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--again", is_flag=True, help="Resubmit even if it was resubmitted before.")
@json_option
def resubmit(number: int, file: IO[bytes] | None, again: bool, as_json: bool) -> None:
    """Submit a reject again, unchanged, or corrected from FILE (- for standard input).

    \b
    orchestrator rejects show 7 --raw > event.json
    orchestrator rejects resubmit 7 event.json

    Unchanged is right if it was refused for something that exists now, such as its retry policy.
    """
    corrected = None if file is None else file.read()

    async def work(rejects: Rejects, ours: Settings) -> Submitted:
        from orchestrator.events.parsing import parse_submission
        from orchestrator.events.topics import topic_rules

        found = await _found(rejects, number)
        if found.topic == ours.topic_processing:
            raise OrchestratorError(f"reject {number} is a command: send it to {found.topic} again")
        if found.event_id is not None and not again:
            raise OrchestratorError(f"reject {number} was resubmitted before, as {found.event_id}; use --again")
        value = found.value if corrected is None else corrected
        if value is None:
            raise OrchestratorError(f"reject {number} has no value; give the correct value in a file")
        return await rejects.resubmit(number, parse_submission(value, ours, topic_rules(ours)))

    kept = _with_rejects(work)
    duplicate = kept.result == "duplicate"
    if as_json:
        print_json({"reject": number, "id": kept.id, "duplicate": duplicate, "event_status": kept.status})
    else:
        click.echo(f"{kept.id}  {kept_before(kept.status) if duplicate else 'accepted'}")
