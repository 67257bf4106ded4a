"""Destinations: their settings, pauses, and the forecast of their backlogs."""

from __future__ import annotations

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.auth import Guard
from orchestrator.api.problems import Problem
from orchestrator.api.requests.destination_settings import (
    DESTINATION_SETTINGS,
    SETTING_OF_COLUMN,
    name_fault,
    settings_of,
)
from orchestrator.api.requests.fields import read_fields, unprocessable
from orchestrator.api.requests.queries import as_json, invalid, page_limit, whole_number
from orchestrator.database import Database
from orchestrator.database.destinations import Destinations
from orchestrator.errors import ValidationError
from orchestrator.events.quoting import shown
from orchestrator.settings import Settings

# The last name of a page, in UTF-8. Opaque to clients; every string of this form is accepted.
CURSOR_PATTERN = "^([2-9a-f][0-9a-f]){1,1200}$"
MAX_BUCKET_S = 86_400
MAX_UNTIL_S = 604_800
MAX_BUCKETS = 10_080
DEFAULT_BUCKET_S = 60
DEFAULT_UNTIL_S = 3600

_CURSOR = re.compile(CURSOR_PATTERN.strip("^$"))


class _Name(msgspec.Struct):
    name: str


class DestinationRoutes:
    """The endpoints, by their names in the OpenAPI document."""

    def __init__(self, settings: Settings, guard: Guard, database: Database) -> None:
        self._settings = settings
        self._guard = guard
        self._destinations = Destinations(database)

    async def page(self, request: Request) -> Response:
        """GET of destinations by name, a page at a time."""
        await self._guard.require(request.scope, "read")
        limit = page_limit(request)
        cursor = request.query_params.get("cursor")
        after = None if cursor is None else _place(cursor)
        # One more than asked for tells whether there is a next page.
        found = await self._destinations.page(limit=limit + 1, after=after)
        following = b'"%b"' % _cursor(found[limit - 1]) if len(found) > limit else b"null"
        return as_json(b'{"destinations":[%b],"next":%b}' % (b",".join(found[:limit]), following))

    async def destination(self, request: Request) -> Response:
        """GET, PUT or DELETE of one destination by its name."""
        await self._guard.require(request.scope, "read" if request.method in ("GET", "HEAD") else "admin")
        name = _name(request)
        if request.method == "PUT":
            return await self._configure(request, name)
        if request.method == "DELETE":
            return await self._told(name, await self._destinations.delete(name))
        return await self._told(name, await self._destinations.get(name))

    async def pause(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        return as_json(await self._destinations.pause(_name(request)))

    async def resume(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        name = _name(request)
        return await self._told(name, await self._destinations.resume(name))

    async def pause_all(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        return as_json(await self._destinations.pause_all())

    async def resume_all(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        return as_json(await self._destinations.resume_all())

    async def forecast(self, request: Request) -> Response:
        await self._guard.require(request.scope, "read")
        bucket_s = whole_number(request, "bucket_seconds", DEFAULT_BUCKET_S, 1, MAX_BUCKET_S)
        until_s = whole_number(request, "until_seconds", DEFAULT_UNTIL_S, 1, MAX_UNTIL_S)
        destination = request.query_params.get("destination")
        if destination is not None and (fault := name_fault(destination)):
            raise invalid("destination", f"{fault}; got {shown(destination)!r}")
        bucket_s = max(bucket_s, -(-until_s // MAX_BUCKETS))
        return as_json(await self._destinations.forecast(bucket_s=bucket_s, until_s=until_s, destination=destination))

    async def _configure(self, request: Request, name: str) -> Response:
        given, faults = settings_of(await read_fields(request, self._settings.max_body_bytes))
        if faults:
            raise unprocessable(faults)
        # A PUT replaces what there was.
        clear = [setting.column for setting in DESTINATION_SETTINGS.values() if setting.column not in given]
        try:
            return as_json(await self._destinations.configure(name, given, clear))
        except ValidationError as error:
            field = SETTING_OF_COLUMN.get(error.field, error.field)
            raise Problem("not-configurable", f"{field}: {error.reason}", errors=[(field, error.reason)]) from error

    async def _told(self, name: str, told: bytes | None) -> Response:
        if told is not None:
            return as_json(told)
        governing = await self._destinations.governing(name)
        instead = f"; {governing} holds for it" if governing not in (None, name) else ""
        raise Problem("not-found", f"There is no destination {shown(name)}{instead}.")


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    if fault := name_fault(name):
        raise invalid("name", f"{fault}; got {shown(name)!r}")
    return name


def _cursor(destination: bytes) -> bytes:
    return msgspec.json.decode(destination, type=_Name).name.encode().hex().encode()


def _place(cursor: str) -> str:
    if _CURSOR.fullmatch(cursor) is None:
        reason = f"expected the value of `next` of the page before, got {shown(cursor)!r}"
        raise Problem("bad-cursor", f"cursor: {reason}", errors=[("cursor", reason)])
    return bytes.fromhex(cursor).decode(errors="replace")
