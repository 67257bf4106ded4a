"""Problem documents (RFC 9457): the form of every error of the API."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Scope, Send

from orchestrator.errors import Blocked, DatabaseUnavailable, InDoubt, KafkaUnavailable, NotPermitted, ValidationError
from orchestrator.events.submission import JsonError, OutOfRangeError, SubmissionError

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:orchestrator:problem:"
RETRY_AFTER_S = 1
BLOCKED_RETRY_AFTER_S = 5

KINDS: dict[str, tuple[int, str]] = {
    "malformed-request": (400, "The request is not HTTP"),
    "malformed-json": (400, "The body is not JSON"),
    "bad-cursor": (400, "The cursor did not come from this API"),
    "unauthorized": (401, "A valid API key is needed"),
    "forbidden": (403, "The API key lacks the scope for this"),
    "not-found": (404, "Not found"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "timeout": (408, "The request did not arrive in time"),
    "not-cancellable": (409, "The event can no longer be cancelled"),
    "not-reschedulable": (409, "The event can no longer be rescheduled"),
    "empty-range": (409, "The time range is empty"),
    "refused": (409, "The event cannot be accepted at present"),
    "not-configurable": (409, "The destination cannot be configured like this"),
    "too-large": (413, "The body is too large"),
    "target-too-long": (414, "The path and query are too long"),
    "unsupported-media-type": (415, "The body must be JSON"),
    "validation": (422, "The request breaks a rule"),
    "too-many-requests": (429, "The client sends too much at once"),
    "head-too-large": (431, "The headers are too large"),
    "internal": (500, "An internal error occurred"),
    "unavailable": (503, "The database or Kafka is unavailable or overloaded"),
    "too-many-connections": (503, "The API serves as many connections as it can"),
}
"""Each kind of problem: the end of its type URI, its status and its title."""

_log = logging.getLogger(__name__)


class Problem(Exception):  # noqa: N818  # the term of RFC 9457
    """An answer that is an error. `errors` holds (field, reason) pairs, `extra` further members of the document."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.status, self.title = KINDS[kind]
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        super().__init__(detail)

    def document(self, instance: str) -> bytes:
        members: dict[str, Any] = {
            "type": TYPE_PREFIX + self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
        }
        if self.errors:
            members["errors"] = [{"field": field, "reason": reason} for field, reason in self.errors]
        return msgspec.json.encode({**members, **self.extra})

    async def send(self, scope: Scope, send: Send) -> None:
        """Answer the request of `scope` with this problem."""
        instance = quote(scope["path"], safe="/%~!$&'()*+,;=:@-._")
        body = self.document(instance)
        headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **self.headers}
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def unavailable(detail: str) -> Problem:
    return Problem("unavailable", detail, headers={"Retry-After": str(RETRY_AFTER_S)})


def blocked(kept: str = "Nothing was changed") -> Problem:
    detail = (
        f"Another database session holds a lock that this request needs, in an open transaction. {kept}; send the "
        "same request again: it succeeds once that transaction has ended."
    )
    return Problem("unavailable", detail, headers={"Retry-After": str(BLOCKED_RETRY_AFTER_S)})


def as_problem(error: Exception) -> Problem:
    """The problem document for an error. Unexpected errors are logged, and the client gets no details of them."""
    match error:
        case Problem():
            return error
        case JsonError():
            return Problem("malformed-json", error.reason, errors=[(error.field, error.reason)])
        case OutOfRangeError():
            # As the database answers for a time without a partition: the form is right, but the time cannot be kept.
            return Problem("refused", str(error), errors=error.errors)
        case SubmissionError():
            detail = "; ".join(f"{field}: {reason}" for field, reason in error.errors[:3])
            return Problem("validation", detail, errors=error.errors)
        case ValidationError():
            return Problem("validation", str(error), errors=[(error.field, error.reason)])
        case Blocked():
            _log.warning("answered 503: %s", error)
            return blocked()
        case InDoubt():
            _log.warning("answered 503: %s", error)
            return unavailable(
                "The connection to the database was lost during the request. The change may have been made: "
                "check, or send the same request again."
            )
        case DatabaseUnavailable():
            _log.warning("answered 503: %s", error)
            return unavailable("The database cannot be reached. Nothing was lost; try again shortly.")
        case NotPermitted():
            _log.error("answered 500: %s", error)
            return Problem("internal", f"The API's login to the database lacks a right: {error}.")
        case KafkaUnavailable():
            return unavailable(str(error))
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            allowed = (error.headers or {}).get("Allow", "")
            return Problem("method-not-allowed", f"Expected one of {allowed}.", headers={"Allow": allowed})
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return Problem("not-found", "There is no such path. GET /openapi.json lists all paths.")
        case _:
            _log.error("unexpected error in a request", exc_info=error)
            return Problem("internal", "The error has been logged. It is safe to try again.")
