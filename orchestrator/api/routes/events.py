"""Reading, cancelling and rescheduling events."""

from __future__ import annotations

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.auth import Guard
from orchestrator.api.problems import Problem
from orchestrator.api.requests.fields import body_values, query_values
from orchestrator.api.requests.filters import (
    CANCEL,
    COUNTS,
    NARROWING,
    RESCHEDULE,
    answer_of,
    call_of,
    filter_of,
    require_some,
    times_of,
)
from orchestrator.api.requests.queries import as_json, invalid, page_of, page_place
from orchestrator.database import Cancelled, Database, Rescheduled
from orchestrator.database.bulk_calls import Sweeps
from orchestrator.errors import ValidationError
from orchestrator.events.quoting import shown
from orchestrator.events.rules import MAX_NAME_CHARS, is_storable
from orchestrator.settings import Settings

MAX_COUNTS = 50_000

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_WHY = {
    "in_flight": "It is being delivered just now",
    "finished": "It has already ended",
}
_INSTEAD = {
    "in_flight": "try again when this attempt has ended",
    "finished": "submit a new event instead",
}


class EventRoutes:
    """The endpoints, by their names in the OpenAPI document."""

    def __init__(self, settings: Settings, guard: Guard, database: Database) -> None:
        self._max_bytes = settings.max_body_bytes
        self._guard = guard
        self._database = database

    async def statistics(self, request: Request) -> Response:
        """GET of how things stand, or with any parameter of what happened in a range of time."""
        await self._guard.require(request.scope, "read")
        values = query_values(request, COUNTS)
        if not values:
            return as_json(await self._database.statistics())
        by = values["by"].split(",") if "by" in values else []
        which = filter_of(values)
        try:
            counts = await self._database.statistics_by(by, which, limit=MAX_COUNTS + 1)
        except ValidationError as error:
            raise Problem("empty-range", str(error), errors=[(error.field, error.reason)]) from error
        if len(counts) > MAX_COUNTS:
            raise invalid("by", f"gives more than {MAX_COUNTS} counts; name fewer, or narrow from, until or source")
        return as_json(b'{"counts":[%b]}' % b",".join(counts))

    async def event(self, request: Request) -> Response:
        """GET or DELETE of one event by its id."""
        cancel = request.method == "DELETE"
        await self._guard.require(request.scope, "submit" if cancel else "read")
        event_id = _event_id(request)
        if cancel:
            return _cancelled(await self._database.cancel(event_id))
        found = await self._database.event(event_id)
        if found is None:
            raise _no_event(event_id, None)
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
            raise _no_event(None, job)
        return as_json(found[0])

    async def all(self, request: Request) -> Response:
        """GET of every event of an external id, newest first, a page at a time."""
        await self._guard.require(request.scope, "read")
        job = _external_job_id(request)
        limit, after = page_place(request)
        events = await self._database.events_by_external_id(job, limit=limit + 1, after=after)
        return as_json(page_of("events", events, limit, "scheduled_at"))

    async def cancel(self, request: Request) -> Response:
        """POST that cancels what a filter names, as much of it as one call looks at."""
        await self._guard.require(request.scope, "submit")
        values = await body_values(request, CANCEL, self._max_bytes)
        require_some(values, CANCEL, NARROWING)
        swept = await Sweeps(self._database).cancel(filter_of(values), **call_of(values))
        return answer_of(swept, cancelled=swept.done, in_flight=swept.in_flight)

    async def reschedule(self, request: Request) -> Response:
        """POST for an event by its id, or by its external id."""
        await self._guard.require(request.scope, "submit")
        event_id, job = None, None
        if "id" in request.path_params:
            event_id = _event_id(request)
        else:
            job = _external_job_id(request)
        values = await body_values(request, RESCHEDULE, self._max_bytes, "scheduled_at")
        scheduled_at, expires_at = times_of(values)
        result = await self._database.reschedule(event_id, job, scheduled_at=scheduled_at, expires_at=expires_at)
        if result is None:
            raise _no_event(event_id, job)
        return _rescheduled(result)


def _event_id(request: Request) -> str:
    event_id: str = request.path_params["id"]
    if _UUID.fullmatch(event_id) is None:
        raise invalid("id", f"expected a UUID such as 019c1347-d2fb-705e-a717-2a27dd38d28f, got {shown(event_id)}")
    return event_id.lower()


def _external_job_id(request: Request) -> str:
    job: str = request.path_params["external_job_id"]
    if len(job) > MAX_NAME_CHARS or not is_storable(job):
        reason = f"expected 1 to {MAX_NAME_CHARS} characters of UTF-8 without NUL, got {shown(job)!r}"
        raise invalid("external_job_id", reason)
    return job


def _cancelled(result: Cancelled) -> Response:
    if result.result == "not_found":
        raise _no_event(result.id, None)
    if result.result in _WHY:
        detail = f"{_WHY[result.result]}: its status is {result.status}."
        raise Problem("not-cancellable", detail, extra={"id": result.id, "event_status": result.status})
    return as_json(msgspec.json.encode(_told(result)))


def _all_cancelled(job: str, results: list[Cancelled]) -> Response:
    found = [result for result in results if result.result != "not_found"]
    if not found:
        raise _no_event(None, job)
    events = [_told(result) for result in found]
    if all(result.result in _WHY for result in found):
        states = ", ".join(sorted({str(result.status) for result in found}))
        detail = f"None of its events can be cancelled any more: their status is {states}."
        raise Problem("not-cancellable", detail, extra={"events": events})
    return as_json(msgspec.json.encode({"events": events}))


def _rescheduled(result: Rescheduled) -> Response:
    if result.result == "refused":
        field, reason = result.field or "body", result.reason or "refused by the database"
        raise Problem("refused", f"{field}: {reason}", errors=[(field, reason)])
    if result.result in _WHY:
        instead = f"reschedule {result.successor} instead" if result.successor else _INSTEAD[result.result]
        detail = f"{_WHY[result.result]}: its status is {result.status}; {instead}."
        raise Problem("not-reschedulable", detail, extra={"id": result.id, "event_status": result.status})
    told = {"id": result.id, "successor": result.successor, "result": result.result, "status": result.status}
    return as_json(msgspec.json.encode(told))


def _no_event(event_id: str | None, job: str | None) -> Problem:
    name = event_id if job is None else f"with the external_job_id {shown(job)}"
    return Problem("not-found", f"There is no event {name}.")


def _told(result: Cancelled) -> dict[str, str | None]:
    return {"id": result.id, "result": result.result, "status": result.status}
