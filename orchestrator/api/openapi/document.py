"""The OpenAPI document. It is true: every status and every field that can be answered is in it."""

from __future__ import annotations

from typing import Any

from orchestrator.api.auth import SCOPES
from orchestrator.api.openapi.dead_letters import dead_letter_paths
from orchestrator.api.openapi.destinations import destination_paths
from orchestrator.api.openapi.events import schemas
from orchestrator.api.openapi.operations import BODY_PROBLEMS, READ_PROBLEMS, answer, header, operation, page_parameters
from orchestrator.api.openapi.parts import NAME, UUID, Schema
from orchestrator.api.openapi.submission import FOLLOWED_BY
from orchestrator.api.requests.filters import COUNTS, parameters
from orchestrator.api.requests.queries import CURSOR_PATTERN
from orchestrator.api.routes.health import LIVENESS_PATHS, METRICS_PATHS, READINESS_PATHS
from orchestrator.settings import Settings

API_VERSION = "1"


def document(settings: Settings) -> dict[str, Any]:
    """The document for this configuration: its bounds, and whether a key is needed."""
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]
    paths = _PATHS | dead_letter_paths() | destination_paths() | _submit_paths(settings)
    if settings.management_port is None:
        paths |= _health_paths()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Scheduled event orchestrator",
            "version": API_VERSION,
            "description": "Keeps events until they are due, and delivers each one on time, as a signed webhook or "
            "a record of Kafka. "
            "Errors are problem documents (RFC 9457).",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in ("events", "dead letters", "destinations", "operations")],
        "security": [{}, *keys] if settings.allow_anonymous else keys,
        "paths": paths,
        "components": {
            "schemas": schemas(settings),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": _KEYS},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": _KEYS},
            },
        },
    }


_KEYS = f"An API key, `orch_…`. Its scopes are of {', '.join(SCOPES)}; admin implies the others."


_FOLLOWED = {
    "X-Correlation-ID": {"description": "What to follow it by, if there is an id.", "schema": {"type": "string"}}
}
_LOCATION = _FOLLOWED | {"Location": header("The path of the event.", {"type": "string", "format": "uri-reference"})}
_ID: Schema = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The id of the event.",
    "schema": UUID,
}
_JOB: Schema = {
    "name": "external_job_id",
    "in": "path",
    "required": True,
    "description": "The client's own id for the event.",
    "schema": NAME,
}

_PATHS: dict[str, Any] = {
    "/api/v1/events/statistics": {
        "get": operation(
            "statistics",
            "Count events by state; or, with any parameter, what happened in a range of time, by default an hour",
            {"200": answer("The counts.", "StatisticsOrCounts")},
            (*READ_PROBLEMS, 409, 422),
            parameters=parameters(COUNTS),
            needs="read",
        )
    },
    "/api/v1/events/{id}": {
        "get": operation(
            "event",
            "One event, with everything that happened to it",
            {"200": answer("The event.", "Event")},
            (*READ_PROBLEMS, 404, 422),
            parameters=(_ID,),
            needs="read",
        ),
        "delete": operation(
            "cancelEvent",
            "Cancel an event that is not being delivered",
            {"200": answer("The event is cancelled, now or before.", "Cancelled")},
            (*READ_PROBLEMS, 404, 409, 422),
            parameters=(_ID,),
            needs="submit",
        ),
    },
    "/api/v1/events/{id}/reschedule": {
        "post": operation(
            "rescheduleEvent",
            "Deliver an event at another time: another event replaces it, in one step",
            {"200": answer("Another event has taken its place, now or before.", "Rescheduled")},
            (*BODY_PROBLEMS, 404, 409),
            parameters=(_ID,),
            body="Reschedule",
            needs="submit",
        )
    },
    "/api/v1/events/cancel": {
        "post": operation(
            "cancelMany",
            "Cancel the events that a filter names. A call is bounded; repeat it with `after` until there is no next",
            {"200": answer("What this call did.", "ManyCancelled")},
            (*BODY_PROBLEMS, 409),
            body="CancelFilter",
            needs="submit",
        )
    },
    "/api/v1/events/external/{external_job_id}/reschedule": {
        "post": operation(
            "rescheduleNamedEvent",
            "Deliver the only live event of an external id at another time",
            {"200": answer("Another event has taken its place, now or before.", "Rescheduled")},
            (*BODY_PROBLEMS, 404, 409),
            parameters=(_JOB,),
            body="Reschedule",
            needs="submit",
        )
    },
    "/api/v1/events/external/{external_job_id}": {
        "get": operation(
            "newestEvent",
            "The event of an external id that is scheduled last",
            {"200": answer("The event.", "Event")},
            (*READ_PROBLEMS, 404, 422),
            parameters=(_JOB,),
            needs="read",
        ),
        "delete": operation(
            "cancelEvents",
            "Cancel every event of an external id that can still be cancelled",
            {"200": answer("At least one is cancelled, now or before; the result of each.", "AllCancelled")},
            (*READ_PROBLEMS, 404, 409, 422),
            parameters=(_JOB,),
            needs="submit",
        ),
    },
    "/api/v1/events/external/{external_job_id}/all": {
        "get": operation(
            "eventsOfJob",
            "Every event of an external id; the one scheduled last comes first",
            {"200": answer("A page of events, which may be empty.", "EventPage")},
            (*READ_PROBLEMS, 400, 422),
            parameters=(_JOB, *page_parameters("events", CURSOR_PATTERN)),
            needs="read",
        )
    },
    "/openapi.json": {
        "get": operation(
            "openapi",
            "This document",
            {
                "200": {
                    "description": "An OpenAPI 3.1 document.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                }
            },
            (500,),
        )
    },
}


def _submit_paths(settings: Settings) -> dict[str, Any]:
    queued = settings.kafka_servers is not None
    direct = not queued or settings.submit_fallback is not None
    one: dict[str, Any] = {}
    many: dict[str, Any] = {"200": answer("What became of each event.", "BatchResult", _FOLLOWED)}
    if direct:
        one["201"] = answer("The event is kept.", "Submitted", _LOCATION)
        one["200"] = answer("The event was kept before; nothing has changed.", "Submitted", _LOCATION)
    if queued:
        one["202"] = answer("Kafka has the event; it can be read and cancelled within moments.", "Submitted", _LOCATION)
        many["202"] = answer("Kafka has the accepted events; they can be read soon.", "BatchResult", _FOLLOWED)
    return {
        "/api/v1/events": {
            "post": operation(
                "submitEvent",
                "Submit one event",
                one,
                (*BODY_PROBLEMS, 409),
                parameters=FOLLOWED_BY,
                body="Submission",
                needs="submit",
            )
        },
        "/api/v1/events/batch": {
            "post": operation(
                "submitEvents",
                "Submit many events, with a result for each",
                many,
                BODY_PROBLEMS,
                parameters=FOLLOWED_BY,
                body="Batch",
                needs="submit",
            )
        },
    }


def _health_paths() -> dict[str, Any]:
    live = {"200": answer("The process lives.", "Health")}
    ready = {
        "200": answer("Requests can be served.", "Health"),
        "503": answer("They cannot: the database is away, not migrated, or the process is stopping.", "Health"),
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    metrics = {"200": {"description": "Metrics in Prometheus's text format.", "content": text}}
    paths: dict[str, Any] = {}
    for summary, prefix, names, answers in (
        ("Whether the process lives", "live", LIVENESS_PATHS, live),
        ("Whether requests can be served", "ready", READINESS_PATHS, ready),
        ("Metrics", "metrics", METRICS_PATHS, metrics),
    ):
        for number, path in enumerate(names, start=1):
            paths[path] = {"get": operation(f"{prefix}{number}", summary, answers, (500,))}
    return paths
