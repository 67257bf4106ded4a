"""Reading and cancelling events."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from uuid import UUID

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.auth import Guard
from orchestrator.api.problems import Problem
from orchestrator.api.queries import as_json, invalid, page_limit
from orchestrator.database import Cancelled, Database
from orchestrator.event_rules import EARLIEST, MAX_NAME_CHARS, shown

# A place in a list: the microsecond and the id of an event. Opaque to clients, and no string of this form is wrong.
CURSOR_PATTERN = "^[0-9a-f]{46}$"

_CURSOR = re.compile(CURSOR_PATTERN.strip("^$"))
_MICROSECOND = timedelta(microseconds=1)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_WHY = {
    "in_flight": "It is being delivered just now",
    "finished": "It has already ended",
}


class _Place(msgspec.Struct):
    """Where an event stands in a list: what the next page starts after."""

    scheduled_at: datetime
    id: str


class EventRoutes:
    """The endpoints, by their names in the OpenAPI document."""

    def __init__(self, guard: Guard, database: Database) -> None:
        self._guard = guard
        self._database = database

    async def statistics(self, request: Request) -> Response:
        await self._guard.require(request.scope, "read")
        return as_json(await self._database.statistics())

    async def event(self, request: Request) -> Response:
        """GET or DELETE of one event by its id."""
        cancel = request.method == "DELETE"
        await self._guard.require(request.scope, "submit" if cancel else "read")
        event_id = _event_id(request)
        if cancel:
            return _cancelled(await self._database.cancel(event_id))
        found = await self._database.event(event_id)
        if found is None:
            raise Problem("not-found", f"There is no event {event_id}.")
        return as_json(found)

    async def newest(self, request: Request) -> Response:
        """GET of the newest event of an external id, or DELETE of all of them."""
        cancel = request.method == "DELETE"
        await self._guard.require(request.scope, "submit" if cancel else "read")
        job = _external_job_id(request)
        if cancel:
            return _all_cancelled(job, await self._database.cancel_external(job))
        found = await self._database.events_by_external_id(job, limit=1, after=None)
        if not found:
            raise Problem("not-found", f"There is no event with the external_job_id {shown(job)}.")
        return as_json(found[0])

    async def all(self, request: Request) -> Response:
        """GET of every event of an external id, newest first, a page at a time."""
        await self._guard.require(request.scope, "read")
        job = _external_job_id(request)
        limit = page_limit(request)
        cursor = request.query_params.get("cursor")
        after = None if cursor is None else _place(cursor)
        # One more than asked for tells whether there is a next page.
        events = await self._database.events_by_external_id(job, limit=limit + 1, after=after)
        following = b'"%b"' % _cursor(events[limit - 1]) if len(events) > limit else b"null"
        return as_json(b'{"events":[%b],"next":%b}' % (b",".join(events[:limit]), following))


def _event_id(request: Request) -> str:
    event_id: str = request.path_params["id"]
    if _UUID.fullmatch(event_id) is None:
        raise invalid("id", f"expected a UUID such as 019c1347-d2fb-705e-a717-2a27dd38d28f, got {shown(event_id)}")
    return event_id.lower()


def _external_job_id(request: Request) -> str:
    job: str = request.path_params["external_job_id"]
    if len(job) > MAX_NAME_CHARS or "\x00" in job:
        reason = f"expected 1 to {MAX_NAME_CHARS} characters without NUL, got {shown(job)!r}"
        raise invalid("external_job_id", reason)
    return job


def _cursor(event: bytes) -> bytes:
    place = msgspec.json.decode(event, type=_Place)
    micros = (place.scheduled_at - EARLIEST) // _MICROSECOND
    return b"%014x%b" % (micros, place.id.replace("-", "").encode())


def _place(cursor: str) -> tuple[str, str]:
    if _CURSOR.fullmatch(cursor) is None:
        reason = f"expected the value of `next` of the page before, got {shown(cursor)!r}"
        raise Problem("bad-cursor", f"cursor: {reason}", errors=[("cursor", reason)])
    at = EARLIEST + int(cursor[:14], 16) * _MICROSECOND
    return at.isoformat(), str(UUID(cursor[14:]))


def _cancelled(result: Cancelled) -> Response:
    if result.result == "not_found":
        raise Problem("not-found", f"There is no event {result.id}.")
    if result.result in _WHY:
        detail = f"{_WHY[result.result]}: its status is {result.status}."
        raise Problem("not-cancellable", detail, extra={"id": result.id, "event_status": result.status})
    return as_json(msgspec.json.encode(_told(result)))


def _all_cancelled(job: str, results: list[Cancelled]) -> Response:
    found = [result for result in results if result.result != "not_found"]
    if not found:
        raise Problem("not-found", f"There is no event with the external_job_id {shown(job)}.")
    events = [_told(result) for result in found]
    if all(result.result in _WHY for result in found):
        states = ", ".join(sorted({str(result.status) for result in found}))
        detail = f"None of its events can be cancelled any more: their status is {states}."
        raise Problem("not-cancellable", detail, extra={"events": events})
    return as_json(msgspec.json.encode({"events": events}))


def _told(result: Cancelled) -> dict[str, str | None]:
    return {"id": result.id, "result": result.result, "status": result.status}
