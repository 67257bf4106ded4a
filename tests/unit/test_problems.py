"""Problem documents: their form, and which error becomes which."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message

from orchestrator.api.problems import KINDS, Problem, as_problem
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, ValidationError
from orchestrator.events.submission import JsonError, OutOfRangeError, SubmissionError


async def sent(problem: Problem, path: str = "/api/v1/events") -> tuple[int, dict[str, str], dict[str, Any]]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await problem.send({"type": "http", "path": path}, send)
    start, body = messages
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(body["body"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_document_has_the_members_of_rfc_9457_and_the_status_of_the_answer(kind: str) -> None:
    status, headers, document = await sent(Problem(kind, "why"))
    assert status == document["status"] == KINDS[kind][0]
    assert headers["content-type"] == "application/problem+json"
    assert document == {
        "type": f"urn:orchestrator:problem:{kind}",
        "title": KINDS[kind][1],
        "status": status,
        "detail": "why",
        "instance": "/api/v1/events",
    }


async def test_errors_headers_and_further_members_are_sent() -> None:
    problem = Problem("not-cancellable", "why", errors=[("a", "b")], headers={"Retry-After": "1"}, extra={"id": "x"})
    _, headers, document = await sent(problem)
    assert document["errors"] == [{"field": "a", "reason": "b"}]
    assert document["id"] == "x"
    assert headers["retry-after"] == "1"


async def test_the_instance_is_a_uri_reference_whatever_the_path() -> None:
    _, _, document = await sent(Problem("not-found", "why"), '/a"b\\c é%2F')
    assert document["instance"] == "/a%22b%5Cc%20%C3%A9%2F"


@pytest.mark.parametrize(
    ("error", "kind", "fields"),
    [
        (Problem("too-large", "why"), "too-large", []),
        (JsonError("expected JSON", 7), "malformed-json", ["body"]),
        (SubmissionError([("a", "b"), ("c", "d")]), "validation", ["a", "c"]),
        (OutOfRangeError([("scheduled_at", "b")]), "refused", ["scheduled_at"]),
        (ValidationError("a", "b"), "validation", ["a"]),
        (DatabaseUnavailable("postgresql://secret"), "unavailable", []),
        (HTTPException(404), "not-found", []),
        (HTTPException(405, headers={"Allow": "GET"}), "method-not-allowed", []),
        (OrchestratorError("secret"), "internal", []),
        (RuntimeError("secret"), "internal", []),
    ],
)
async def test_each_error_becomes_its_kind_of_problem_and_no_secret_gets_out(
    error: Exception, kind: str, fields: list[str]
) -> None:
    problem = as_problem(error)
    assert problem.kind == kind
    assert [field for field, _ in problem.errors] == fields
    _, _, document = await sent(problem)
    assert "secret" not in json.dumps(document)


def test_a_problem_says_when_to_come_back_or_which_methods_are_right() -> None:
    assert int(as_problem(DatabaseUnavailable("away")).headers["Retry-After"]) >= 1
    assert as_problem(HTTPException(405, headers={"Allow": "GET, HEAD"})).headers["Allow"] == "GET, HEAD"


def test_an_unforeseen_error_is_logged_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    error = RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        as_problem(error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
