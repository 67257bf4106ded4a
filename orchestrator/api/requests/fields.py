"""The fields of requests, defined once for the check and for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from starlette.requests import Request

from orchestrator.api.http import MAX_FIELDS_BYTES, read_json
from orchestrator.api.openapi.parts import Schema
from orchestrator.api.problems import Problem
from orchestrator.api.requests.queries import invalid
from orchestrator.events.faults import MAX_FAULTS
from orchestrator.events.json_text import utf8_fault
from orchestrator.events.quoting import kind_of, shown
from orchestrator.events.times import with_usual_time


class Field(NamedTuple):
    """`column` is its name in the database, `schema` its OpenAPI schema, `wire` the type that is checked."""

    column: str
    expected: str
    schema: Schema
    wire: Any


def number(column: str, about: str, least: float, most: float) -> Field:
    schema = {"type": "number", "minimum": least, "maximum": most, "description": about}
    return Field(
        column, f"{_plain(least)} to {_plain(most)}", schema, Annotated[float, msgspec.Meta(ge=least, le=most)]
    )


def _plain(number: float) -> str:
    return f"{number:f}".rstrip("0").rstrip(".") or "0"


def whole(column: str, about: str, least: int, most: int) -> Field:
    bound = msgspec.Meta(ge=least, le=most)
    wire = Annotated[int, bound] | Annotated[float, msgspec.Meta(ge=least, le=most, multiple_of=1)]
    schema = {"type": "integer", "minimum": least, "maximum": most, "description": about}
    return Field(column, f"a whole number from {least} to {most}", schema, wire)


async def read_fields(request: Request, max_bytes: int) -> dict[str, msgspec.Raw]:
    """The fields of a body other than an event: a small JSON object. Raises a 4xx problem."""
    return fields_of(await read_json(request.scope, request.receive, min(max_bytes, MAX_FIELDS_BYTES)))


def fields_of(raw: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a body that is a JSON object. Raises a 400 or 422 problem."""
    if utf8_fault(raw) is not None:
        raise _malformed("expected UTF-8")
    try:
        return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise invalid("body", f"expected a JSON object, got {kind_of(raw)}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _malformed(str(error)) from None


def _malformed(reason: str) -> Problem:
    return Problem("malformed-json", reason, errors=[("body", reason)])


def unprocessable(faults: list[tuple[str, str]]) -> Problem:
    """The 422 problem that names the broken rules, given as (field, reason)."""
    return Problem("validation", "; ".join(": ".join(fault) for fault in faults[:3]), errors=faults[:MAX_FAULTS])


async def body_values(request: Request, table: Mapping[str, Field], max_bytes: int, *required: str) -> dict[str, Any]:
    """The values of a JSON body, by column. Raises a problem that names every rule that it breaks."""
    return _values(await read_fields(request, max_bytes), table, required)


def query_values(request: Request, table: Mapping[str, Field]) -> dict[str, Any]:
    """The values of the query parameters that are in the table, by column. Raises a 422 problem."""
    given = {name: text for name, text in request.query_params.items() if name in table}
    return _values({name: msgspec.Raw(msgspec.json.encode(text)) for name, text in given.items()}, table, ())


def _value(raw: msgspec.Raw, wire: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=wire)
    except msgspec.ValidationError:
        return msgspec.json.decode(with_usual_time(raw), type=wire)


def _values(given: Mapping[str, msgspec.Raw], table: Mapping[str, Field], required: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    faults = [(name, f"required: {table[name].expected}") for name in required if name not in given]
    for name, raw in given.items():
        if len(faults) == MAX_FAULTS:
            break
        field = table.get(name)
        if field is None:
            faults.append((shown(name), f"unknown field; expected {', '.join(table)}"))
            continue
        try:
            values[field.column] = _value(raw, field.wire)
        except (msgspec.DecodeError, RecursionError):
            faults.append((name, f"expected {field.expected}, got {shown(raw)}"))
    if faults:
        raise unprocessable(faults)
    return values
