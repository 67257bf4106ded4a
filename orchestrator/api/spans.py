"""The span of a request that submits events."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
from starlette.types import Scope

from orchestrator.events.submission import Submission
from orchestrator.events.tracing import Carried, is_sampled
from orchestrator.tracing import MAX_LINKS, Attributes, Span, Tracer

SPAN = "orchestrator.span"
"""Where the scope of a request has its span."""


class SubmitSpan:
    """Begun when the request's headers are known; the events of the request are children of it."""

    def __init__(self, tracer: Tracer, told: Carried | None) -> None:
        self._tracer = tracer
        self._start_ns = time.time_ns()
        self._parent = told.traceparent if told is not None else None
        self._told = told or Carried(None, None)
        self._context = tracer.begin(self._parent)
        self._attributes: Attributes = {}
        self._links: list[str] = []

    @property
    def told(self) -> Carried:
        """What holds for the events of the request that say nothing themselves."""
        return self._told._replace(traceparent=self._context)

    def follow(self, submission: Submission) -> Submission:
        """The only event of the request. If it names a trace itself, the span is in that one."""
        given = submission.traceparent
        if given is not None and given != self._context:
            self._links = [] if self._parent is None else [self._parent]
            self._parent, self._context = given, self._tracer.begin(given)
            submission = msgspec.structs.replace(submission, traceparent=self._context)
        self._attributes["orchestrator.event.id"] = submission.id
        return submission

    def link(self, submissions: Iterable[Submission]) -> None:
        """The events of a batch. Those that name a trace themselves stay in it; the span is linked to it."""
        named = (each.traceparent for each in submissions if each.traceparent != self._context)
        self._links = [*dict.fromkeys(trace for trace in named if trace is not None)][:MAX_LINKS]

    def end(self, scope: Scope, route: str, status: int) -> None:
        if not is_sampled(self._context):
            return
        attributes = self._attributes | {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "url.path": route,
            "url.scheme": scope.get("scheme", "http"),
        }
        error = None
        if status >= 500:
            attributes["error.type"], error = str(status), ""
        self._tracer.record(
            Span(
                "submit",
                "server",
                self._context,
                self._parent,
                self._start_ns,
                time.time_ns(),
                attributes,
                error,
                tuple(self._links),
            )
        )
