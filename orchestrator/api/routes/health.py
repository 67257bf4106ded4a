"""Liveness, readiness and metrics, under the plain paths and under those of Spring Boot's actuator."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator.api.server.process_link import Deliverer
from orchestrator.database import Database
from orchestrator.database.backups import backups
from orchestrator.database.destinations import Destinations
from orchestrator.database.maintenance import condition
from orchestrator.errors import OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.tasks import within

CHECK_TIMEOUT_S = 2.0
CACHE_S = 1.0
STANDSTILLS_CACHE_S = 5.0
CONDITION_CACHE_S = 15.0

LIVENESS_PATHS = ("/health", "/actuator/health/liveness")
READINESS_PATHS = ("/ready", "/actuator/health", "/actuator/health/readiness")
METRICS_PATHS = ("/metrics", "/actuator/prometheus")

_SILENT = "the process that delivers does not answer"

_log = logging.getLogger(__name__)


class Health:
    """Says whether this process is alive, and whether it can serve, for which it asks the database."""

    def __init__(self, database: Database, metrics: Metrics, deliverer: Deliverer | None = None) -> None:
        self._database = database
        self._metrics = metrics
        self._deliverer = deliverer
        self._destinations = Destinations(database)
        self._standstills_at = -STANDSTILLS_CACHE_S
        self._condition_at = -CONDITION_CACHE_S
        self._holders_at = -CONDITION_CACHE_S
        self._lock = asyncio.Lock()
        self._checked_at = -CACHE_S
        self._reason: str | None = None
        self.stopping = False

    def routes(self) -> list[Route]:
        return [
            *(Route(path, self.live, methods=["GET"]) for path in LIVENESS_PATHS),
            *(Route(path, self.ready, methods=["GET"]) for path in READINESS_PATHS),
            *(Route(path, self.exposition, methods=["GET"]) for path in METRICS_PATHS),
        ]

    async def live(self, request: Request) -> Response:
        if self._deliverer is not None and await self._deliverer.samples() is None:
            return _status(False, {"process": {"status": "DOWN", "reason": _SILENT}})
        return _status(True, {"process": {"status": "UP"}})

    async def ready(self, request: Request) -> Response:
        reason = "stopping" if self.stopping else await self._database_fault()
        if reason is None:
            return _status(True, {"database": {"status": "UP"}})
        return _status(False, {"database": {"status": "DOWN", "reason": reason}})

    async def exposition(self, request: Request) -> Response:
        self._metrics.set_pool(self._database.pool_stats())
        await self._read_standstills()
        await self._read_condition()
        await self._read_holders()
        theirs = {} if self._deliverer is None else await self._deliverer.samples()
        if theirs is None:  # without its samples, counters would seem to restart at zero
            return Response(f"{_SILENT}\n", HTTPStatus.SERVICE_UNAVAILABLE, media_type="text/plain")
        text, content_type = self._metrics.exposition(theirs)
        return Response(text, headers={"content-type": content_type})

    async def _read_standstills(self) -> None:
        """Asks the database what is paused or held by a circuit breaker, at most once in STANDSTILLS_CACHE_S."""
        if time.monotonic() - self._standstills_at < STANDSTILLS_CACHE_S:
            return
        self._standstills_at = time.monotonic()
        try:
            found = await within(CHECK_TIMEOUT_S, self._destinations.standstills())
        except (TimeoutError, OrchestratorError) as error:
            _log.debug("metrics: pauses and circuit breakers are unknown", extra={"error": str(error)})
            self._metrics.set_standstills(math.nan, math.nan, math.nan)
        else:
            paused = found.paused_at is not None
            self._metrics.set_standstills(float(paused), found.destinations_paused, found.breakers_open)

    async def _read_condition(self) -> None:
        """Asks the database for the condition of its maintenance, at most once in CONDITION_CACHE_S."""
        if time.monotonic() - self._condition_at < CONDITION_CACHE_S:
            return
        self._condition_at = time.monotonic()
        try:
            found = await within(CHECK_TIMEOUT_S, condition(self._database))
            kept = await within(CHECK_TIMEOUT_S, backups(self._database))
        except (TimeoutError, OrchestratorError) as error:
            _log.debug("metrics: the condition of maintenance is unknown", extra={"error": str(error)})
            self._metrics.set_condition(None)
            self._metrics.set_backups(None)
        else:
            self._metrics.set_condition(found)
            self._metrics.set_backups(kept)

    async def _read_holders(self) -> None:
        """Asks the database which sessions hold others up, at most once in CONDITION_CACHE_S."""
        if time.monotonic() - self._holders_at < CONDITION_CACHE_S:
            return
        self._holders_at = time.monotonic()
        try:
            asked = self._database.value("select count(*) from orchestrator.lock_holders()")
            count = await within(CHECK_TIMEOUT_S, asked)
        except (TimeoutError, OrchestratorError) as error:
            _log.debug("metrics: the sessions that hold others up are unknown", extra={"error": str(error)})
            count = math.nan
        self._metrics.lock_holders.set(count)

    async def _database_fault(self) -> str | None:
        """Why the database cannot be used, or None. Asks it at most once in CACHE_S, however many requests come."""
        async with self._lock:
            if time.monotonic() - self._checked_at >= CACHE_S:
                try:
                    await within(CHECK_TIMEOUT_S, self._database.ready())
                    self._reason = None
                except TimeoutError:
                    self._reason = f"no answer within {CHECK_TIMEOUT_S:.0f} seconds"
                except OrchestratorError as error:
                    self._reason = str(error)
                self._checked_at = time.monotonic()
            return self._reason


def _status(up: bool, checks: dict[str, dict[str, str]]) -> Response:
    body = {"status": "UP" if up else "DOWN", "checks": checks}
    status = HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE
    return Response(msgspec.json.encode(body), status, media_type="application/json")
