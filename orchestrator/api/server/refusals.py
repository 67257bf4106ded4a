"""Answers to requests that break a bound before a handler sees them: problem documents, ready to send."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

from orchestrator.api.problems import MEDIA_TYPE, Problem


class Refusal(NamedTuple):
    """`reason` is the label in the metrics."""

    reason: str
    response: bytes


def _refusal(reason: str, kind: str, detail: str, *, retry_after_s: int | None = None) -> Refusal:
    problem = Problem(kind, detail)
    body = problem.document("/")
    head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n"
    if retry_after_s is not None:
        head += f"retry-after: {retry_after_s}\r\n"
    return Refusal(reason, f"{head}\r\n".encode() + body)


MAX_TARGET_BYTES = 8192
MAX_HEADERS = 100

MALFORMED = _refusal("malformed", "malformed-request", "Expected a request of HTTP/1.1.")
TARGET = _refusal("target", "target-too-long", f"Expected a path and query of at most {MAX_TARGET_BYTES} bytes.")
HEADERS = _refusal(
    "headers",
    "head-too-large",
    f"Expected at most {MAX_HEADERS} headers, and at most MAX_HEAD_BYTES with the request line.",
)
CHUNKS = _refusal("chunks", "head-too-large", "Expected chunks that hold more data than framing.")
PIPELINED = _refusal(
    "pipelined", "too-many-requests", "Wait for answers before sending more requests.", retry_after_s=1
)
ADDRESS = _refusal(
    "address",
    "too-many-requests",
    "This address has the maximum number of connections (API_MAX_CONNECTIONS_PER_ADDRESS). Reuse them.",
    retry_after_s=1,
)
CONNECTIONS = _refusal(
    "connections",
    "too-many-connections",
    "The API has the maximum number of connections (API_MAX_CONNECTIONS). Try again shortly.",
    retry_after_s=1,
)
MEMORY = _refusal(
    "memory",
    "too-many-connections",
    "Clients send more data at once than the API can hold in memory. Try again shortly.",
    retry_after_s=1,
)
NO_HEAD = _refusal(
    "head_timeout", "timeout", "The head of the request was not complete in time (API_HEAD_TIMEOUT_SECONDS)."
)
NO_BODY = _refusal(
    "body_timeout", "timeout", "The body of the request was not complete in time (API_BODY_TIMEOUT_SECONDS)."
)
# Nobody can be told why before TLS is agreed on.
HANDSHAKE = Refusal("tls_handshake", b"")
# The client reads nothing, so that no answer can be sent.
UNREAD = Refusal("unread_answer", b"")
