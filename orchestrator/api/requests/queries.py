"""What the endpoints of queries share: answers, pages, and refusals of parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.problems import Problem
from orchestrator.events.json_text import pruned
from orchestrator.events.quoting import shown
from orchestrator.events.times import EARLIEST

# A place in a list: a microsecond and the id of an event. Opaque to clients; every string of this form is accepted.
CURSOR_PATTERN = "^[0-9a-f]{46}$"
DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)
_CURSOR = re.compile(CURSOR_PATTERN.strip("^$"))
_MICROSECOND = timedelta(microseconds=1)


def as_json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def invalid(field: str, reason: str) -> Problem:
    return Problem("validation", f"{field}: {reason}", errors=[(field, reason)])


def whole_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A parameter of the query. Raises a 422 problem."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if _WHOLE.fullmatch(text) is None or not least <= int(text) <= most:
        raise invalid(name, f"expected a whole number from {least} to {most}, got {shown(text)!r}")
    return int(text)


def page_limit(request: Request) -> int:
    return whole_number(request, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)


def page_place(request: Request) -> tuple[int, tuple[str, str] | None]:
    """The size of a page, and the time and id after which it starts. Raises a 400 or 422 problem."""
    limit = page_limit(request)
    cursor = request.query_params.get("cursor")
    if cursor is None:
        return limit, None
    if _CURSOR.fullmatch(cursor) is None:
        reason = f"expected the value of `next` of the page before, got {shown(cursor)!r}"
        raise Problem("bad-cursor", f"cursor: {reason}", errors=[("cursor", reason)])
    at = EARLIEST + int(cursor[:14], 16) * _MICROSECOND
    return limit, (at.isoformat(), str(UUID(cursor[14:])))


def page_of(name: str, found: Sequence[bytes], limit: int, time_field: str) -> bytes:
    """A page of items in order of a time and an id. `found` has one more than `limit` if there is a next page."""
    following = b'"%b"' % _cursor(found[limit - 1], time_field) if len(found) > limit else b"null"
    return b'{"%b":[%b],"next":%b}' % (name.encode(), b",".join(found[:limit]), following)


def _cursor(item: bytes, time_field: str) -> bytes:
    try:
        fields = msgspec.json.decode(item, type=dict[str, msgspec.Raw])
    except RecursionError:  # PostgreSQL accepts deeper payloads than the API does
        fields = msgspec.json.decode(pruned(item) or b"{}", type=dict[str, msgspec.Raw])
    micros = (msgspec.json.decode(fields[time_field], type=datetime) - EARLIEST) // _MICROSECOND
    return b"%014x%b" % (micros, msgspec.json.decode(fields["id"], type=str).replace("-", "").encode())
