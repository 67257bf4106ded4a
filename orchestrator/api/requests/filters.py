"""Filters by which requests select many events, and the bounds of what one call does with them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from orchestrator.api.openapi.parts import COUNT, NAME, TIME, UUID, Schema, closed, nullable
from orchestrator.api.problems import Problem
from orchestrator.api.requests.destination_settings import EXACT_NAME_PATTERN, MAX_DESTINATION_CHARS, NAME_PATTERN
from orchestrator.api.requests.fields import Field, number, unprocessable, whole
from orchestrator.api.requests.queries import as_json
from orchestrator.database import Filter
from orchestrator.database.bulk_calls import Swept
from orchestrator.events.rules import MAX_NAME_CHARS
from orchestrator.events.submission import OutOfRangeError
from orchestrator.events.times import EXPECTED_TIME, ScheduledAt, in_utc, scheduled_at_fault

MAX_LOOKED_AT = 10_000
MAX_REASON_CHARS = 1000
GROUPS = ("minute", "source", "destination")
NARROWING = ("source", "destination", "from", "until")

_NO_NUL = r"\A[^\x00]*\Z"
_A_GROUP = f"(?:{'|'.join(GROUPS)})"
_BY_PATTERN = f"^{_A_GROUP}(?:,{_A_GROUP})*$"


def _text(column: str, about: str, most: int) -> Field:
    wire = Annotated[str, msgspec.Meta(min_length=1, max_length=most, pattern=_NO_NUL)]
    schema = {**NAME, "maxLength": most, "description": about}
    return Field(column, f"a string of 1 to {most} characters without NUL", schema, wire)


def _time(column: str, about: str) -> Field:
    return Field(column, EXPECTED_TIME, {**TIME, "description": about}, ScheduledAt)


def _or_null(field: Field) -> Field:
    """The field, or null: a client may send back the null of an answer."""
    return Field(field.column, f"{field.expected}, or null", nullable(field.schema), field.wire | None)


def _anchored(pattern: str) -> str:
    return rf"\A{pattern[1:-1]}\Z"


def _destination(about: str, pattern: str) -> Field:
    wire = Annotated[str, msgspec.Meta(max_length=MAX_DESTINATION_CHARS, pattern=_anchored(pattern))]
    schema = {"type": "string", "maxLength": MAX_DESTINATION_CHARS, "pattern": pattern, "description": about}
    return Field("destination", "a host such as example.com or example.com:8443, or kafka: and a topic", schema, wire)


def _narrowing(what: str, time: str) -> dict[str, Field]:
    to = f"{what} to this host, with its port unless that is the usual one, or to `kafka:` and a topic; `*` stands for"
    return {
        "source": _text("source", f"{what} of this source only.", MAX_NAME_CHARS),
        "destination": _destination(f"{to} any characters.", NAME_PATTERN),
        "from": _time("since", f"{what} {time} then or later."),
        "until": _time("until", f"{what} {time} before then."),
    }


_EVENTS = _narrowing("Events", "scheduled for")
_REASON = {"reason": _text("reason", "Those whose reason contains this text, in any case.", MAX_REASON_CHARS)}
_DRY_RUN = Field(
    "dry_run",
    "true or false",
    {"type": "boolean", "default": False, "description": "Change nothing, and report what would be changed."},
    bool,
)
_UUID = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")]
_AFTER = Field("after", "a UUID", {**UUID, "description": "The `next_after` of the call before."}, _UUID)
_CALL = {
    "dry_run": _DRY_RUN,
    "limit": whole("limit", "How many to look at in this call, at most.", 1, MAX_LOOKED_AT),
    "after": _or_null(_AFTER),
}

RESCHEDULE = {
    "scheduled_at": _time("scheduled_at", "When to deliver it instead, with a zone."),
    "expires_at": _or_null(_time("expires_at", "No attempt begins then or later; absent or null: as before.")),
}
CANCEL = _EVENTS | _CALL
DEAD_LETTERS = _narrowing("Dead letters", "that died") | _REASON
PURGE = DEAD_LETTERS | _CALL
REDRIVE = PURGE | {
    "rate_per_second": number("rate", "How many attempts begin a second; absent: all at once.", 0.000001, 100_000),
    "start_at": _or_null(_time("start_at", "The `next_start_at` of the call before, to go on at the same rate.")),
}
COUNTS = {
    "by": Field(
        "by",
        f"some of {', '.join(GROUPS)}, with commas between them",
        {"type": "string", "pattern": _BY_PATTERN, "description": "By what to group the counts, separated by commas."},
        Annotated[str, msgspec.Meta(pattern=_anchored(_BY_PATTERN))],
    )
} | _narrowing("Counts", "of")
COUNTS["destination"] = _destination("Counts of this host, or of `kafka:` and this topic.", EXACT_NAME_PATTERN)


def filter_of(values: Mapping[str, Any]) -> Filter:
    """The filter among the values of a request. Raises a 409 problem for an empty range of times."""
    since, until = values.get("since"), values.get("until")
    if since is not None and until is not None and since >= until:
        reason = f"expected a time after from, {since.isoformat()}, got {until.isoformat()}"
        raise Problem("empty-range", f"until: {reason}", errors=[("until", reason)])
    return Filter(**{name: _as_text(values[name]) for name in Filter._fields if name in values})


def times_of(values: Mapping[str, Any]) -> tuple[str, str | None]:
    """The times of a reschedule. Raises a 409 problem for a time at which no event may be scheduled."""
    scheduled_at, expires_at = values["scheduled_at"], values.get("expires_at")
    for name, at in (("scheduled_at", scheduled_at), ("expires_at", expires_at)):
        if at is not None and (fault := scheduled_at_fault(at)):
            raise OutOfRangeError([(name, fault)])
    return in_utc(scheduled_at).isoformat(), None if expires_at is None else in_utc(expires_at).isoformat()


def require_some(values: Mapping[str, Any], table: Mapping[str, Field], names: tuple[str, ...]) -> None:
    """Raises a 422 problem for a request that would select everything."""
    if not any(table[name].column in values for name in names):
        raise unprocessable([("body", f"expected at least one of {', '.join(names)}: this is never done to all")])


def call_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The other bounds of a call, as arguments."""
    call = {name: _as_text(values[name]) for name in ("dry_run", "after", "rate", "start_at") if name in values}
    return call | {"limit": int(values.get("limit", MAX_LOOKED_AT))}


def answer_of(swept: Swept, **more: int | str | None) -> Response:
    """The answer: what one call did, and where the next one goes on."""
    told = {"seen": swept.seen, "matched": swept.matched, **more}
    return as_json(msgspec.json.encode({**told, "examples": swept.examples, "next_after": swept.next_after}))


def _as_text(value: Any) -> Any:
    return in_utc(value).isoformat() if isinstance(value, datetime) else value


def body_schema(table: Mapping[str, Field], *required: str, some_of: tuple[str, ...] = ()) -> Schema:
    schema = closed({name: field.schema for name, field in table.items()}, *(table.keys() - set(required)))
    return schema | ({"anyOf": [{"required": [name]} for name in some_of]} if some_of else {})


def swept_schema(**more: Schema) -> Schema:
    return closed(
        {
            "seen": {**COUNT, "description": "How many this call has looked at."},
            "matched": {**COUNT, "description": "How many of them match the filter."},
            **more,
            "examples": {"type": "array", "items": UUID, "description": "Some of those that match the filter."},
            "next_after": {**nullable(UUID), "description": "The `after` of the next call; null: this was the last."},
        }
    )


def parameters(table: Mapping[str, Field]) -> tuple[Schema, ...]:
    return tuple(_parameter(name, field.schema) for name, field in table.items())


def _parameter(name: str, schema: Schema) -> Schema:
    """OpenAPI tools show the description of a parameter, not that of its schema."""
    bare = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, "in": "query", "description": schema["description"], "schema": bare}
