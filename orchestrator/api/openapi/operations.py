"""What the paths of the OpenAPI document are made of."""

from __future__ import annotations

from typing import Any

from orchestrator.api.openapi.parts import Schema, ref
from orchestrator.api.problems import KINDS, MEDIA_TYPE
from orchestrator.api.requests.queries import DEFAULT_LIMIT, MAX_LIMIT

READ_PROBLEMS = (401, 403, 500, 503)
BODY_PROBLEMS = (400, 401, 403, 408, 413, 415, 422, 500, 503)
NEXT: Schema = {"type": ["string", "null"], "description": "The `cursor` of the next page; null on the last."}


def operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    problems: tuple[int, ...],
    *,
    parameters: tuple[Schema, ...] = (),
    body: str | None = None,
    needs: str | None = None,
    tag: str = "events",
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "tags": [tag if needs else "operations"],
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


def answer(description: str, schema: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
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


def header(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": schema}


_PROBLEM_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": header("How to authenticate.", {"type": "string"})},
    403: {"WWW-Authenticate": header("Which scope is needed.", {"type": "string"})},
    503: {"Retry-After": header("Seconds to wait.", {"type": "integer", "minimum": 0})},
}


def page_parameters(of: str, cursor_pattern: str) -> tuple[Schema, Schema]:
    return (
        {
            "name": "limit",
            "in": "query",
            "description": f"How many {of} a page has.",
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
        },
        {
            "name": "cursor",
            "in": "query",
            "description": "The `next` of the page before; absent for the first page.",
            "schema": {"type": "string", "pattern": cursor_pattern},
        },
    )
