"""Problem documents (RFC 9457): the one form that every error of the API takes."""

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
    "bad-cursor": (400, "The cursor is not one that this API gave out"),
    "unauthorized": (401, "A valid API key is needed"),
    "forbidden": (403, "The API key lacks the scope for this"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "timeout": (408, "The request did not arrive in time"),
    "not-cancellable": (409, "The event can no longer be cancelled"),
    "not-reschedulable": (409, "The event can no longer be rescheduled"),
    "empty-range": (409, "The range of times holds none"),
    "refused": (409, "The event cannot be kept as things stand"),
    "not-configurable": (409, "The destination cannot be configured so"),
    "too-large": (413, "The body is too large"),
    "target-too-long": (414, "The path and query are too long"),
    "unsupported-media-type": (415, "The body must be JSON"),
    "validation": (422, "The request breaks a rule"),
    "too-many-requests": (429, "One client asks for too much at once"),
    "head-too-large": (431, "The headers are too large"),
    "internal": (500, "Something went wrong here"),
    "unavailable": (503, "The database, or Kafka, is away or overloaded"),
    "too-many-connections": (503, "The API has as many clients as it can serve"),
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
        f"Another session of the database holds what this needs in a transaction that is open. {kept}; "
        "the same request, sent again, succeeds once that has ended."
    )
    return Problem("unavailable", detail, headers={"Retry-After": str(BLOCKED_RETRY_AFTER_S)})


def as_problem(error: Exception) -> Problem:
    """The problem that tells a client of an error. What is not foreseen is logged and told without its details."""
    match error:
        case Problem():
            return error
        case JsonError():
            return Problem("malformed-json", error.reason, errors=[(error.field, error.reason)])
        case OutOfRangeError():
            # Like the database's answer to a time that has no partition: the form is right, the time is not kept.
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
                "The database went away meanwhile. It may have been done all the same; look, or try again."
            )
        case DatabaseUnavailable():
            _log.warning("answered 503: %s", error)
            return unavailable("The database cannot be reached. Try again shortly; nothing was lost by this.")
        case NotPermitted():
            _log.error("answered 500: %s", error)
            return Problem("internal", f"The API's own login to the database lacks a right: {error}.")
        case KafkaUnavailable():
            return unavailable(str(error))
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            allowed = (error.headers or {}).get("Allow", "")
            return Problem("method-not-allowed", f"Expected one of {allowed}.", headers={"Allow": allowed})
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return Problem("not-found", "No such path. GET /openapi.json lists those there are.")
        case _:
            _log.error("unexpected error in a request", exc_info=error)
            return Problem("internal", "The error has been logged. Trying again is safe and may help.")
