"""``submit``: one event from options, or many from a file, by the same rules as the API's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import IO, TYPE_CHECKING

import click
import msgspec

from orchestrator.cli.support import (
    console,
    exit_with,
    json_option,
    kept_before,
    moment,
    plain,
    print_json,
    with_database,
)
from orchestrator.cli.times import a_duration, relative
from orchestrator.errors import OrchestratorError, ValidationError
from orchestrator.events.fields import FIELDS
from orchestrator.events.rules import MAX_FRAME_BYTES
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.database import Database, Submitted
    from orchestrator.events.submission import Submission

_BATCH = 1000
_SHOWN_REFUSALS = 20
_TOO_SHORT_FOR_A_SECRET = 5
_OVER = ("cancelled", "rescheduled", "expired", "dead")
_AGAIN = "; nothing was kept, and it may be submitted again"


def _time(option: str, value: str) -> str:
    """RFC 3339 text of ``now``, of ``+10s``, ``+1h30m`` and the like; whatever else is given stays as it is."""
    at = relative(value)
    if at is None and value.startswith("+"):
        raise click.UsageError(f"{option}: expected a time such as +10s, +5m, +1h30m or +2d, got {value!r}")
    return value if at is None else at.isoformat()


def _after(scheduled_at: str, duration: timedelta) -> str | None:
    """The time so long after another; None after what is no time, which is refused itself."""
    from orchestrator.events.times import time_of

    try:
        return (time_of(scheduled_at) + duration).isoformat()
    except (ValueError, OverflowError):
        return None


def _headers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    for value in values:
        if ":" not in value:
            raise click.BadParameter(f"expected 'Name: value', got {_start(value)!r}")
    parts = (value.partition(":") for value in values)
    return {name.strip(): content.strip() for name, _, content in parts} or None


def _start(value: str) -> str:
    """So much of a value as is no credential."""
    return value if len(value) <= _TOO_SHORT_FOR_A_SECRET else f"{value[:_TOO_SHORT_FOR_A_SECRET]}…"


def _spread(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):  # JSON has no way to write it
        raise click.BadParameter(f"expected a number of seconds, got {value}")
    return value


def _about(name: str, *, default: str | None = None) -> str:
    """What a field is, as a help text: the first sentence of its description."""
    about = next(field.about for field in FIELDS if field.name == name)
    first = about.partition(". ")[0].removesuffix(".").replace("`", "")
    return f"{first}." if default is None else f"{first}. [default: {default}]"


@dataclass
class Tally:
    """What became of a file's lines. `results` has the API's form, with the line in place of the index."""

    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    results: list[dict[str, object]] = field(default_factory=list)
    over: Counter[str] = field(default_factory=Counter)  # duplicates that will not be delivered, by their state


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--destination", metavar="URL|TOPIC", help=_about("destination", default="KAFKA: the ready topic"))
@click.option("--delivery-type", metavar="TYPE", help=_about("delivery_type", default="HTTP"))
@click.option("--payload", metavar="JSON", help="What is delivered; @FILE reads it from a file.")
@click.option("--at", metavar="TIME", help="When: RFC 3339 with a zone, or relative: +10s, +1h30m. [default: now]")
@click.option("--expires-at", metavar="TIME", help=_about("expires_at", default="never"))
@click.option(
    "--expires-in", callback=a_duration, metavar="DURATION", help="The same as a time after --at: 10m, 1h30m."
)
@click.option("--source", help=_about("source", default="cli"))
@click.option("--external-id", metavar="X", help=_about("external_job_id"))
@click.option(
    "--header",
    "headers",
    metavar="'NAME: VALUE'",
    multiple=True,
    callback=_headers,
    help="A header to send with the payload; repeatable.",
)
@click.option("--max-retries", type=int, help=_about("max_retries", default="DEFAULT_MAX_RETRIES"))
@click.option("--retry-policy", metavar="NAME", help=_about("retry_policy"))
@click.option("--ordering-key", metavar="KEY", help=_about("ordering_key"))
@click.option("--priority", type=int, metavar="N", help=_about("priority", default="0"))
@click.option("--spread", type=float, metavar="SECONDS", callback=_spread, help=_about("spread_seconds"))
@click.option("--correlation-id", metavar="ID", help=_about("correlation_id"))
@click.option("--traceparent", metavar="TRACE", help=_about("traceparent"))
@json_option
def submit(
    file: IO[bytes] | None,
    destination: str | None,
    delivery_type: str | None,
    payload: str | None,
    at: str | None,
    expires_at: str | None,
    expires_in: timedelta | None,
    source: str | None,
    external_id: str | None,
    headers: dict[str, str] | None,
    max_retries: int | None,
    retry_policy: str | None,
    ordering_key: str | None,
    priority: int | None,
    spread: float | None,
    correlation_id: str | None,
    traceparent: str | None,
    as_json: bool,
) -> None:
    """Submit one event, or a file of them.

    \b
    orchestrator submit --destination https://example.com/hook --payload '{"n": 1}' --at +10s
    orchestrator submit --delivery-type KAFKA --destination reminders --payload '{"n": 1}'
    orchestrator submit events.jsonl
    make-events | orchestrator submit -

    A line of a file is a JSON object as POST /api/v1/events takes it. Lines that are refused do not keep the
    others out; they are named, and the exit code is 1. Submitting a file again changes nothing for events that
    have an external_job_id.
    """
    target = (destination, delivery_type, ordering_key)
    expiry = (expires_at, expires_in)
    retries = (max_retries, retry_policy)
    tracing = (correlation_id, traceparent)
    options = (*target, *expiry, *retries, *tracing, payload, at, source, external_id, headers, priority, spread)
    if file is not None:
        if any(option is not None for option in options):
            raise click.UsageError("a file's lines say everything themselves: leave the other options out")
        _submit_file(file, as_json)
        return
    if (destination is None and delivery_type != "KAFKA") or payload is None:
        raise click.UsageError("expected --destination and --payload, or a FILE (- for standard input)")
    if None not in expiry:
        raise click.UsageError("--expires-at and --expires-in: give one of them")
    scheduled_at = _time("--at", at or "now")
    fields: dict[str, object] = {
        "source": source or "cli",
        "scheduled_at": scheduled_at,
        "expires_at": _after(scheduled_at, expires_in)
        if expires_in
        else expires_at and _time("--expires-at", expires_at),
        "destination": destination,
        "delivery_type": delivery_type,
        "external_job_id": external_id,
        "headers": headers,
        "max_retries": max_retries,
        "retry_policy": retry_policy,
        "ordering_key": ordering_key,
        "priority": priority,
        "spread_seconds": spread,
        "correlation_id": correlation_id,
        "traceparent": traceparent,
    }
    _submit_one(fields, _payload(payload), as_json)


def _payload(given: str) -> bytes:
    if not given.startswith("@"):
        text = given.encode(errors="surrogateescape")
    else:
        with click.open_file(given[1:], "rb") as file:
            text = file.read()
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except RecursionError:
        pass  # told with the event's other faults
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"expected JSON, got {_start(given)!r}: {error}", param_hint="--payload") from None
    return text


def _submit_one(fields: dict[str, object], payload: bytes, as_json: bool) -> None:
    async def work(database: Database, settings: Settings) -> tuple[Submission, Submitted]:
        from orchestrator.events.parsing import parse_submission
        from orchestrator.events.topics import topic_rules

        # Spliced in as it is, since the payload is kept and delivered byte for byte.
        raw = b'%b,"payload":%b}' % (json.dumps(fields).encode()[:-1], payload)
        submission = parse_submission(raw, settings, topic_rules(settings))
        return submission, (await database.submit([submission]))[0]

    submission, kept = with_database(work)
    if kept.result == "refused":
        raise OrchestratorError(f"{kept.field}: {kept.reason}")
    duplicate = kept.result == "duplicate"
    at = submission.scheduled_at.isoformat()
    if as_json:
        status = "duplicate" if duplicate else "scheduled"
        told = {"id": kept.id, "scheduled_at": at, "status": status, "duplicate": duplicate}
        print_json({**told, "event_status": kept.status})
        return
    what = kept_before(kept.status) if duplicate else f"due {moment(at, now=datetime.now(UTC))}"
    click.echo(f"{kept.id}  {what}")


def _submit_file(file: IO[bytes], as_json: bool) -> None:
    tally = Tally()
    show = console(stderr=True)

    async def work(database: Database, settings: Settings) -> None:
        from orchestrator.database import submit_all
        from orchestrator.events.submission import Submission

        with show.status("submitting …") as status:
            for batch in _batches(file, settings):
                valid = [item for _, item in batch if isinstance(item, Submission)]
                kept = iter(await submit_all(database, valid) if valid else [])
                for line, item in batch:
                    _count(tally, line, item if isinstance(item, ValidationError) else next(kept), as_json)
                status.update(f"submitting … {tally.accepted + tally.duplicates:,}")

    with_database(work)
    if as_json:
        print_json(
            {
                "accepted": tally.accepted,
                "duplicates": tally.duplicates,
                "rejected": tally.rejected,
                "results": tally.results,
            }
        )
    else:
        if tally.rejected > _SHOWN_REFUSALS:
            show.print(f"… and {tally.rejected - _SHOWN_REFUSALS:,} more")
        over = ", ".join(f"{count:,} {status}" for status, count in sorted(tally.over.items()))
        duplicates = f"duplicates {tally.duplicates:,}" + (f" ({over})" if over else "")
        click.echo(f"accepted {tally.accepted:,}, {duplicates}, rejected {tally.rejected:,}")
    exit_with(tally.rejected == 0)


def _batches(file: IO[bytes], settings: Settings) -> Iterator[list[tuple[int, Submission | ValidationError]]]:
    """Lists of (line number, what stands there), empty lines left out."""
    from orchestrator.events.parsing import parse_submission
    from orchestrator.events.topics import topic_rules

    topics = topic_rules(settings)

    def parsed() -> Iterator[tuple[int, Submission | ValidationError]]:
        for number, line in enumerate(_lines(file, settings.max_payload_bytes + MAX_FRAME_BYTES + 2), start=1):
            if not line.isspace():
                try:
                    yield number, parse_submission(line, settings, topics)
                except ValidationError as error:
                    yield number, error

    items = parsed()
    while batch := list(islice(items, _BATCH)):
        yield batch


def _lines(file: IO[bytes], most_bytes: int) -> Iterator[bytes]:
    """The lines of a file; of one that is longer, which is refused, so many bytes."""
    while line := file.readline(most_bytes):
        yield line
        while len(line) == most_bytes and not line.endswith(b"\n"):
            line = file.readline(most_bytes)


def _count(tally: Tally, line: int, outcome: ValidationError | Submitted, as_json: bool) -> None:
    if not isinstance(outcome, ValidationError) and outcome.result in ("accepted", "duplicate"):
        duplicate = outcome.result == "duplicate"
        tally.duplicates += duplicate
        tally.accepted += not duplicate
        if as_json:
            status = "duplicate" if duplicate else "scheduled"
            result = {"line": line, "id": outcome.id, "status": status, "duplicate": duplicate}
            tally.results.append({**result, "event_status": outcome.status})
        elif duplicate and outcome.status in _OVER:
            tally.over[outcome.status] += 1
        return
    tally.rejected += 1
    why = outcome.reason or "refused by the database"
    if not isinstance(outcome, ValidationError) and outcome.result == "blocked":
        why += _AGAIN
    reason = {"field": outcome.field or "body", "reason": why}
    if as_json:
        tally.results.append({"line": line, "error": reason})
    elif tally.rejected <= _SHOWN_REFUSALS:
        click.echo(f"line {line}: {reason['field']}: {plain(reason['reason'])}", err=True)
