"""Liveness, readiness and metrics, under the plain paths and under those of Spring Boot's actuator."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator.api.routes.database_gauges import CHECK_TIMEOUT_S, DatabaseGauges
from orchestrator.api.server.process_link import Deliverer
from orchestrator.database import Database
from orchestrator.errors import OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.tasks import within

CACHE_S = 1.0

LIVENESS_PATHS = ("/health", "/actuator/health/liveness")
READINESS_PATHS = ("/ready", "/actuator/health", "/actuator/health/readiness")
METRICS_PATHS = ("/metrics", "/actuator/prometheus")

_SILENT = "the process that delivers does not answer"


class Health:
    """Says whether this process is alive, and whether it can serve, for which it asks the database."""

    def __init__(self, database: Database, metrics: Metrics, deliverer: Deliverer | None = None) -> None:
        self._database = database
        self._metrics = metrics
        self._deliverer = deliverer
        self._gauges = DatabaseGauges(database, metrics)
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
        await self._gauges.refresh()
        theirs = {} if self._deliverer is None else await self._deliverer.samples()
        if theirs is None:  # without its samples, counters would seem to restart at zero
            return Response(f"{_SILENT}\n", HTTPStatus.SERVICE_UNAVAILABLE, media_type="text/plain")
        text, content_type = self._metrics.exposition(theirs)
        return Response(text, headers={"content-type": content_type})

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
