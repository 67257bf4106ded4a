"""What an event is followed by through several systems: a correlation id, and a W3C trace context.

Each is a field of a submission, or else a header of the request or of the record that brings it; both are headers of
every delivery. https://www.w3.org/TR/trace-context/ has the rules for ``traceparent``; the SQL twin is
`orchestrator.as_traceparent`. Its companion ``tracestate`` becomes one of the event's own headers.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import msgspec

from orchestrator.events.headers import MAX_HEADERS

CORRELATION_ID_HEADER = "x-correlation-id"
TRACEPARENT_HEADER = "traceparent"
TRACESTATE_HEADER = "tracestate"
MAX_CORRELATION_ID_CHARS = 200
CORRELATION_ID_PATTERN = f"^[!-~](?:[ -~]{{0,{MAX_CORRELATION_ID_CHARS - 2}}}[!-~])?$"
# Of a version to come only the first four parts count, and there may be more.
TRACEPARENT_PATTERN = (
    r"^(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{0,400})?$"
)
_CORRELATION_ID = CORRELATION_ID_PATTERN.replace("$", r"\Z")
_TRACEPARENT = TRACEPARENT_PATTERN.replace("$", r"\Z")
_is_correlation_id = re.compile(_CORRELATION_ID).match
_is_traceparent = re.compile(_TRACEPARENT).match
_MAX_TRACESTATE_CHARS = 512
_MEMBER = r"[a-z0-9][a-z0-9_*/@-]{0,255}=[!-+\--<>-~ ]{0,255}[!-+\--<>-~]"
_is_tracestate = re.compile(rf"{_MEMBER}(?:[ \t]*,[ \t]*{_MEMBER}){{0,31}}\Z").match

CorrelationId = Annotated[str, msgspec.Meta(pattern=_CORRELATION_ID)]
Traceparent = Annotated[str, msgspec.Meta(pattern=_TRACEPARENT)]


class Carried(NamedTuple):
    """What the headers of a request or a record say; it holds for submissions that do not say it themselves."""

    correlation_id: str | None
    traceparent: str | None
    tracestate: str | None = None


def carried(correlation_id: bytes | None, traceparent: bytes | None, tracestate: bytes | None = None) -> Carried | None:
    """What the headers say. One that is not valid is ignored: proxies set them, too, and W3C demands it.

    Without a valid `traceparent`, `tracestate` means nothing.
    """
    if correlation_id is None and traceparent is None:
        return None
    job, trace, state = (
        "" if value is None else value.decode("latin-1").strip(" \t")
        for value in (correlation_id, traceparent, tracestate)
    )
    followed = _is_traceparent(trace) is not None
    return Carried(
        job if _is_correlation_id(job) else None,
        in_version_00(trace) if followed else None,
        state if followed and len(state) <= _MAX_TRACESTATE_CHARS and _is_tracestate(state) else None,
    )


def in_version_00(traceparent: str) -> str:
    """A valid traceparent, of whatever version, in the version that is passed on."""
    return f"00{traceparent[2:55]}"


def with_tracing(
    headers: dict[str, str] | None, correlation_id: str | None, traceparent: str | None
) -> dict[str, str] | None:
    """The headers of a delivery: those of the event, with what the event is followed by in place of its own."""
    if correlation_id is None and traceparent is None:
        return headers
    ours = {CORRELATION_ID_HEADER: correlation_id, TRACEPARENT_HEADER: traceparent}
    set_by_us = {name: value for name, value in ours.items() if value is not None}
    return {name: value for name, value in (headers or {}).items() if name.lower() not in set_by_us} | set_by_us


def with_tracestate(headers: dict[str, str] | None, tracestate: str) -> dict[str, str]:
    """An event's headers with the tracestate that it came with, unless it has one of its own or no room for it."""
    own = headers or {}
    if len(own) >= MAX_HEADERS or any(name.lower() == TRACESTATE_HEADER for name in own):
        return own
    return own | {TRACESTATE_HEADER: tracestate}


def trace_id(traceparent: str) -> str:
    return traceparent[3:35]


def span_id(traceparent: str) -> str:
    return traceparent[36:52]


def is_sampled(traceparent: str) -> bool:
    return traceparent[54] in "13579bdf"


def followed(event_id: str, correlation_id: str | None, traceparent: str | None) -> dict[str, str]:
    """What a line of the log names an event by, as `extra`."""
    fields = {"event_id": event_id}
    if correlation_id is not None:
        fields["correlation_id"] = correlation_id
    if traceparent is not None:
        fields |= {"trace_id": trace_id(traceparent), "span_id": span_id(traceparent)}
    return fields
