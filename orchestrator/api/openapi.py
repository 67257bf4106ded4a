"""The OpenAPI document. It is true: every status and every field that can be answered is in it."""

from __future__ import annotations

from typing import Any

from orchestrator.api.auth import SCOPES
from orchestrator.api.events import CURSOR_PATTERN, DEFAULT_LIMIT, MAX_LIMIT
from orchestrator.api.health import LIVENESS_PATHS, METRICS_PATHS, READINESS_PATHS
from orchestrator.api.problems import KINDS, MEDIA_TYPE
from orchestrator.api.schema_parts import NAME, UUID, Schema, ref
from orchestrator.api.schemas import schemas
from orchestrator.config import Settings

API_VERSION = "1"

_READ_PROBLEMS = (401, 403, 500, 503)
_BODY_PROBLEMS = (400, 401, 403, 408, 413, 415, 422, 500, 503)


def document(settings: Settings) -> dict[str, Any]:
    """The document for this configuration: its bounds, and whether a key is needed."""
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]
    paths = _PATHS | _submit_paths(settings)
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
        "tags": [{"name": "events"}, {"name": "operations"}],
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


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    problems: tuple[int, ...],
    *,
    parameters: tuple[Schema, ...] = (),
    body: str | None = None,
    needs: str | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "tags": ["events" if needs else "operations"],
        "responses": answers | {str(status): _problem(status) for status in problems},
    }
    if needs:
        operation["description"] = f"Needs the scope `{needs}`."
    else:
        operation["security"] = []
    if parameters:
        operation["parameters"] = list(parameters)
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref(body)}}}
    return operation


def _answer(description: str, schema: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": ref(schema)}},
    }
    return answer | {"headers": headers} if headers else answer


def _problem(status: int) -> dict[str, Any]:
    titles = [title for known, title in KINDS.values() if known == status]
    answer: dict[str, Any] = {
        "description": ", or: ".join(titles),
        "content": {MEDIA_TYPE: {"schema": ref("Problem")}},
    }
    if status in _PROBLEM_HEADERS:
        answer["headers"] = _PROBLEM_HEADERS[status]
    return answer


def _header(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": schema}


_PROBLEM_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": _header("How to authenticate.", {"type": "string"})},
    403: {"WWW-Authenticate": _header("Which scope is needed.", {"type": "string"})},
    503: {"Retry-After": _header("Seconds to wait.", {"type": "integer", "minimum": 0})},
}
_LOCATION = {"Location": _header("The path of the event.", {"type": "string", "format": "uri-reference"})}
_ID: Schema = {"name": "id", "in": "path", "required": True, "schema": UUID}
_JOB: Schema = {"name": "external_job_id", "in": "path", "required": True, "schema": NAME}
_LIMIT: Schema = {
    "name": "limit",
    "in": "query",
    "description": "How many events a page has.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
}
_CURSOR: Schema = {
    "name": "cursor",
    "in": "query",
    "description": "The `next` of the page before; absent for the first page.",
    "schema": {"type": "string", "pattern": CURSOR_PATTERN},
}

_PATHS: dict[str, Any] = {
    "/api/v1/events/statistics": {
        "get": _operation(
            "statistics",
            "Count events by state",
            {"200": _answer("The counts.", "Statistics")},
            _READ_PROBLEMS,
            needs="read",
        )
    },
    "/api/v1/events/{id}": {
        "get": _operation(
            "event",
            "One event, with everything that happened to it",
            {"200": _answer("The event.", "Event")},
            (*_READ_PROBLEMS, 404, 422),
            parameters=(_ID,),
            needs="read",
        ),
        "delete": _operation(
            "cancelEvent",
            "Cancel an event that is not being delivered",
            {"200": _answer("The event is cancelled, now or before.", "Cancelled")},
            (*_READ_PROBLEMS, 404, 409, 422),
            parameters=(_ID,),
            needs="submit",
        ),
    },
    "/api/v1/events/external/{external_job_id}": {
        "get": _operation(
            "newestEvent",
            "The event of an external id that is scheduled last",
            {"200": _answer("The event.", "Event")},
            (*_READ_PROBLEMS, 404, 422),
            parameters=(_JOB,),
            needs="read",
        ),
        "delete": _operation(
            "cancelEvents",
            "Cancel every event of an external id that can still be cancelled",
            {"200": _answer("At least one is cancelled, now or before; the result of each.", "AllCancelled")},
            (*_READ_PROBLEMS, 404, 409, 422),
            parameters=(_JOB,),
            needs="submit",
        ),
    },
    "/api/v1/events/external/{external_job_id}/all": {
        "get": _operation(
            "eventsOfJob",
            "Every event of an external id, the one scheduled last first",
            {"200": _answer("A page of events, which may be empty.", "EventPage")},
            (*_READ_PROBLEMS, 400, 422),
            parameters=(_JOB, _LIMIT, _CURSOR),
            needs="read",
        )
    },
    "/openapi.json": {
        "get": _operation(
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
    many: dict[str, Any] = {"200": _answer("What became of each event.", "BatchResult")}
    if direct:
        one["201"] = _answer("The event is kept.", "Submitted", _LOCATION)
        one["200"] = _answer("The event was kept before; nothing has changed.", "Submitted", _LOCATION)
    if queued:
        one["202"] = _answer(
            "Kafka has the event; it can be read and cancelled within moments.", "Submitted", _LOCATION
        )
        many["202"] = _answer("Kafka has the accepted events; they can be read within moments.", "BatchResult")
    return {
        "/api/v1/events": {
            "post": _operation(
                "submitEvent", "Submit one event", one, (*_BODY_PROBLEMS, 409), body="Submission", needs="submit"
            )
        },
        "/api/v1/events/batch": {
            "post": _operation(
                "submitEvents",
                "Submit many events, with a result for each",
                many,
                _BODY_PROBLEMS,
                body="Batch",
                needs="submit",
            )
        },
    }


def _health_paths() -> dict[str, Any]:
    live = {"200": _answer("The process lives.", "Health")}
    ready = {
        "200": _answer("Requests can be served.", "Health"),
        "503": _answer("They cannot: the database is away, not migrated, or the process is stopping.", "Health"),
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
            paths[path] = {"get": _operation(f"{prefix}{number}", summary, answers, (500,))}
    return paths
