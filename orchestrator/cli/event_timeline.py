"""The story of one event: what happened when, how long after what came before, and what it waits for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.cli.support import duration, moment, plain, target
from orchestrator.errors import ValidationError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.database import Database

STYLES = {
    **dict.fromkeys(("retrying", "retried", "expired"), "yellow"),
    **dict.fromkeys(("cancelled", "rescheduled"), "magenta"),
    "delivered": "green",
    "dead": "red",
}
_SHOWN_CHARS = 2000
_WAITS = {
    "rate": "for the rate of its destination",
    "parallel": "for others under way to its destination",
    "breaker": "for the breaker of its destination",
    "pause": "for the end of a pause",
}


def show_event(out: Console, event: dict[str, Any], held_back: str | None) -> None:
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
        ("expires", event["expires_at"] and moment(event["expires_at"], now=now)),
        ("correlation id", event["correlation_id"]),
        ("traceparent", event["traceparent"]),
        ("rescheduled from", event["predecessor"]),
        ("rescheduled to", event["successor"]),
        ("attempts", attempts),
        ("retry policy", event["retry_policy"]),
        ("headers", event["headers"] and json.dumps(event["headers"], ensure_ascii=False)),
        ("payload", _shortened(event["payload"])),
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


class _Step(NamedTuple):
    at: datetime
    what: str
    details: str


def timeline(event: Mapping[str, Any], now: datetime, held_back: str | None) -> Iterator[tuple[str, str, str, str]]:
    """What happened, oldest first, and what is to come: time, how long after the line above, what, details."""
    before: datetime | None = None
    for step in _steps(event, held_back):
        ahead = step.at > now
        after = "" if before is None else f"+{duration(max(0.0, (step.at - before).total_seconds()))}"
        yield moment(step.at.isoformat(), now=now if ahead else None), after, step.what, step.details
        before = step.at


def _steps(event: Mapping[str, Any], held_back: str | None) -> list[_Step]:
    steps = [_Step(_time(event["created_at"]), "accepted", "")]
    due_before = None
    for outcome in event["outcomes"]:
        steps += _attempted(event, outcome, first=due_before is None, due_before=due_before)
        due_before = outcome["due_at"] or due_before
    # A claim looks ahead, so it may come before the time it is for. Sorting is stable.
    steps.sort(key=lambda step: step.at)
    return steps + (_pending(event, held_back, first=due_before is None) if event["due_at"] else [])


def _attempted(
    event: Mapping[str, Any], outcome: Mapping[str, Any], *, first: bool, due_before: str | None
) -> Iterator[_Step]:
    name = f"attempt {outcome['attempt']}"
    if outcome["due_at"] and outcome["due_at"] != due_before:
        yield _Step(_time(outcome["due_at"]), "due", _spread(event) if first else "again")
    if outcome["claimed_at"]:
        yield _Step(_time(outcome["claimed_at"]), "claimed", _by(outcome))
    ended = [f"HTTP {outcome['status_code']}"] if outcome["status_code"] is not None and not outcome["error"] else []
    ended += [str(outcome[key]) for key in ("error", "response") if outcome[key]]
    ended += [f"as {outcome['successor']}"] if outcome["successor"] else []
    ended += [_by(outcome)] if outcome["worker"] and not outcome["claimed_at"] else []
    if outcome["started_at"] is None:
        begun = outcome["due_at"] is not None and outcome["result"] != "expired"
        what = f"{name} {outcome['result']}" if begun else outcome["result"]
        yield _Step(_time(outcome["finished_at"]), what, ", ".join(ended))
        return
    late = [f"{duration(max(0.0, outcome['lateness_ms']) / 1000)} after it was due"]
    waits = sorted((outcome["waited"] or {}).items(), key=lambda wait: -wait[1])
    late += [f"waited {duration(ms / 1000)} {_WAITS.get(kind, f'for {kind}')}" for kind, ms in waits]
    yield _Step(_time(outcome["started_at"]), name, ", ".join(late))
    yield _Step(_time(outcome["finished_at"]), f"{name} {outcome['result']}", ", ".join(ended))


def _pending(event: Mapping[str, Any], held_back: str | None, *, first: bool) -> list[_Step]:
    at = _time(event["due_at"])
    spread = _spread(event) if first else ""
    if event["status"] == "in_flight":
        what, why = f"attempt {event['attempt']} in flight", "claimed by a dispatcher"
    else:
        what, why = f"attempt {event['attempt'] + 1} due", held_back or ""
    return [_Step(at, what, ", ".join(filter(None, (spread, why))))]


def _by(outcome: Mapping[str, Any]) -> str:
    worker = str(outcome["worker"])
    return worker if worker == "by hand" else f"by {worker}"


def _spread(event: Mapping[str, Any]) -> str:
    if event["spread_ms"] is None:
        return ""
    return f"spread: {duration(event['spread_ms'] / 1000)} after it was scheduled"


async def why_held_back(database: Database, event: Mapping[str, Any]) -> str | None:
    """What an event that is due waits for, as things stand; None when nothing holds it back."""
    from orchestrator.database.destinations import Destinations

    if event["status"] not in ("scheduled", "retrying"):
        return None
    if event["waits_for"]:
        return f"waits for event {event['waits_for']}, which has its ordering key and comes first"
    destinations = Destinations(database)
    now = datetime.now(UTC)
    paused_at = (await destinations.standstills()).paused_at
    if paused_at is not None:
        return f"everything is paused since {moment(paused_at, now=now)}"
    topic = event["delivery_type"] == "KAFKA"
    try:
        name = await destinations.governing(f"kafka:{event['destination'] or ''}" if topic else event["destination"])
        found = None if name is None else await destinations.get(name)
    except ValidationError:
        return None  # what psql lets through need be no host
    if found is None:
        return None
    destination = json.loads(found)
    due = _time(event["due_at"]) <= now
    match destination["state"]:
        case "paused":
            return f"{name} is paused since {moment(destination['paused_at'], now=now)}"
        case "breaker_open":
            return f"the breaker of {name} is open, next try {moment(destination['next_try_at'], now=now)}"
        case "breaker_half_open":
            return f"the breaker of {name} is trying another event"
        case "held_by_rate" if due:
            return f"waits for the rate of {name}, {destination['rate_per_second']:g} a second"
        case "held_by_parallel" if due:
            return f"waits for others under way to {name}"
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
