"""Dead letters: list them, redrive them, purge them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.api.auth import Guard
from orchestrator.api.requests.fields import body_values, query_values
from orchestrator.api.requests.filters import DEAD_LETTERS, PURGE, REDRIVE, answer_of, call_of, filter_of, require_some
from orchestrator.api.requests.queries import as_json, page_of, page_place
from orchestrator.database import Database
from orchestrator.database.bulk_calls import Sweeps
from orchestrator.settings import Settings


class DeadLetterRoutes:
    """The endpoints, by their names in the OpenAPI document."""

    def __init__(self, settings: Settings, guard: Guard, database: Database) -> None:
        self._max_bytes = settings.max_body_bytes
        self._guard = guard
        self._database = database
        self._sweeps = Sweeps(database)

    async def page(self, request: Request) -> Response:
        """GET of dead letters, newest first, a page at a time."""
        await self._guard.require(request.scope, "read")
        which = filter_of(query_values(request, DEAD_LETTERS))
        limit, after = page_place(request)
        found = await self._database.dead_letters(which, limit=limit + 1, after=after)
        return as_json(page_of("dead_letters", found, limit, "died_at"))

    async def redrive(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        values = await body_values(request, REDRIVE, self._max_bytes)
        swept = await self._sweeps.redrive(filter_of(values), **call_of(values))
        return answer_of(swept, redriven=swept.done, next_start_at=swept.next_start_at)

    async def purge(self, request: Request) -> Response:
        await self._guard.require(request.scope, "admin")
        values = await body_values(request, PURGE, self._max_bytes)
        require_some(values, PURGE, tuple(DEAD_LETTERS))
        swept = await self._sweeps.purge(filter_of(values), **call_of(values))
        return answer_of(swept, purged=swept.done)
