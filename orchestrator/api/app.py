"""The ASGI applications: the API, and health and metrics on their own when they have a port of their own."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from orchestrator.api.auth import Guard
from orchestrator.api.http import ClientGoneError
from orchestrator.api.intake import intake
from orchestrator.api.openapi.document import document
from orchestrator.api.problems import as_problem
from orchestrator.api.routes.dead_letters import DeadLetterRoutes
from orchestrator.api.routes.destinations import DestinationRoutes
from orchestrator.api.routes.events import EventRoutes
from orchestrator.api.routes.health import Health
from orchestrator.api.routes.submit import SubmitBatch, SubmitOne
from orchestrator.api.spans import SPAN
from orchestrator.database import Database
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tracing import tracing

_log = logging.getLogger(__name__)


class _Segment(Convertor[str]):
    """One segment of a path, decoded only after the path was split: an external id may hold a slash, as %2F."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        # The path was decoded as Latin-1, see Edge. What is no UTF-8 becomes lone surrogates, which no name has.
        return unquote_to_bytes(value.encode("latin-1")).decode("utf-8", "surrogateescape")

    def to_string(self, value: str) -> str:
        raise NotImplementedError("paths are matched here, never made")


class _EventId(_Segment):
    """A segment that is not the name of another route, so that those answer 405 themselves."""

    regex = "(?!(?:batch|cancel|statistics|external)(?:/|$))[^/]+"


register_url_convertor("segment", _Segment())
register_url_convertor("event_id", _EventId())


class Edge:
    """The outermost layer: measures each request and turns every error into a problem document."""

    def __init__(self, routes: Sequence[BaseRoute], metrics: Metrics) -> None:
        self.routes = routes
        self._router = Router(routes, redirect_slashes=False)
        # The router tries one pattern after the other; most requests are for a path without parameters.
        self._direct = {
            (method, route.path): route
            for route in routes
            if isinstance(route, Route) and not route.param_convertors
            for method in route.methods or ()
        }
        self._seconds = metrics.http_request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # The router is to match what was sent; `_Segment` decodes the parts. With an app, it raises its 404 and 405.
        scope["path"] = scope["raw_path"].decode("latin-1")
        scope["app"] = self
        try:
            direct = self._direct.get((scope["method"], scope["path"]))
            if direct is None:
                await self._router(scope, receive, noting_send)
            else:
                scope["route"] = direct
                await direct.app(scope, receive, noting_send)
        except ClientGoneError:
            status = 499
        except Exception as error:
            if status:
                _log.exception("an answer broke off")
                raise
            problem = as_problem(error)
            status = problem.status
            await problem.send(scope, send)
        finally:
            route = scope.get("route")
            pattern = route.path_format if isinstance(route, Route) else "none"
            self._seconds(pattern, _method(scope), str(status)).observe(time.perf_counter() - began)
            if (span := scope.get(SPAN)) is not None:
                span.end(scope, pattern, status)


def _method(scope: Scope) -> str:
    """The method, from a small set: labels of metrics are kept for ever."""
    method: str = scope["method"]
    return method if method in ("GET", "POST", "DELETE", "HEAD", "PUT", "PATCH", "OPTIONS") else "other"


@asynccontextmanager
async def api_app(settings: Settings, database: Database, metrics: Metrics, health: Health) -> AsyncIterator[Edge]:
    """The API, with what runs behind it. Health and metrics are part of it unless they have their own port."""
    guard = Guard(settings, database)
    events = EventRoutes(settings, guard, database)
    dead_letters = DeadLetterRoutes(settings, guard, database)
    destinations = DestinationRoutes(settings, guard, database)
    described = msgspec.json.encode(document(settings))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    on_aside = metrics.submissions_set_aside_total("http").inc
    async with tracing(settings, metrics, "api") as tracer, intake(settings, database, on_aside) as taken:
        routes = [
            Route("/api/v1/events", SubmitOne(settings, guard, taken, metrics, tracer), methods=["POST"]),
            Route("/api/v1/events/batch", SubmitBatch(settings, guard, taken, metrics, tracer), methods=["POST"]),
            Route("/api/v1/events/cancel", events.cancel, methods=["POST"]),
            Route("/api/v1/events/statistics", events.statistics, methods=["GET"]),
            Route("/api/v1/events/external/{external_job_id:segment}", events.newest, methods=["GET", "DELETE"]),
            Route("/api/v1/events/external/{external_job_id:segment}/all", events.all, methods=["GET"]),
            Route("/api/v1/events/external/{external_job_id:segment}/reschedule", events.reschedule, methods=["POST"]),
            Route("/api/v1/events/{id:event_id}", events.event, methods=["GET", "DELETE"]),
            Route("/api/v1/events/{id:event_id}/reschedule", events.reschedule, methods=["POST"]),
            Route("/api/v1/dead-letters", dead_letters.page, methods=["GET"]),
            Route("/api/v1/dead-letters/redrive", dead_letters.redrive, methods=["POST"]),
            Route("/api/v1/dead-letters/purge", dead_letters.purge, methods=["POST"]),
            Route("/api/v1/destinations", destinations.page, methods=["GET"]),
            Route("/api/v1/destinations/{name:segment}", destinations.destination, methods=["GET", "PUT", "DELETE"]),
            Route("/api/v1/destinations/{name:segment}/pause", destinations.pause, methods=["POST"]),
            Route("/api/v1/destinations/{name:segment}/resume", destinations.resume, methods=["POST"]),
            Route("/api/v1/pause", destinations.pause_all, methods=["POST"]),
            Route("/api/v1/resume", destinations.resume_all, methods=["POST"]),
            Route("/api/v1/forecast", destinations.forecast, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
        ]
        if settings.management_port is None:
            routes += health.routes()
        yield Edge(routes, metrics)


def management_app(health: Health, metrics: Metrics) -> Edge:
    """Health and metrics alone: for MANAGEMENT_SERVER_PORT, and for processes without an API."""
    return Edge(health.routes(), metrics)
