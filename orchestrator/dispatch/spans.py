"""The spans of a delivery: its claim, each attempt, and the recording of each result.

All are children within the event's own trace, however long ago that began: a trace id is what clients, receivers and
operators search by, and not every trace server shows links.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from orchestrator.database import Claimed, Finished
from orchestrator.dispatch.attempt import DELIVERED, Attempted
from orchestrator.dispatch.http.request import destination_of
from orchestrator.events.tracing import is_sampled
from orchestrator.tracing import Attributes, Span, Tracer

_DATABASE: Attributes = {"db.system.name": "postgresql"}


class Begun(NamedTuple):
    """An attempt whose span has begun: its own context, that of the event, and when it began."""

    context: str
    parent: str
    start_ns: int


class DeliverySpans:
    """Spans of events whose trace is sampled. All others pass on the context that they came with."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def claimed(self, events: Sequence[Claimed], took_s: float) -> None:
        """Tells of a claim that has just returned. It begins the traces of events that came without a context.

        The id of such a trace follows from that of the event, so that all attempts are in one trace.
        """
        begin, record = self._tracer.begin, self._tracer.record
        end_ns = time.time_ns()
        start_ns = end_ns - round(took_s * 1e9)
        for event in events:
            parent = event.traceparent
            begins = blake2b(event.event_id.encode(), digest_size=16).hexdigest() if parent is None else None
            context = begin(parent, begins)
            if not is_sampled(context):
                if parent is not None:
                    event.traceparent = context
                continue
            attributes = _DATABASE | _about(event) | {"db.operation.batch.size": len(events)}
            record(Span("claim", "client", context, parent, start_ns, end_ns, attributes))
            if parent is None:
                event.traceparent = context

    def begin(self, event: Claimed) -> Begun | None:
        """Begins an attempt and puts the event into its span, so that the delivery passes that on."""
        parent = event.traceparent
        if parent is None:
            return None
        context = event.traceparent = self._tracer.begin(parent)
        return Begun(context, parent, time.time_ns()) if is_sampled(context) else None

    def end(self, begun: Begun, event: Claimed, attempted: Attempted, topic: str | None = None) -> None:
        """Ends an attempt; a delivery to Kafka names its `topic`."""
        attributes = _about(event) | {"orchestrator.result": attempted.verdict}
        if topic is not None:
            kind = "producer"
            attributes |= {
                "messaging.system": "kafka",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
            }
        else:
            kind = "client"
            attributes |= {"http.request.method": "POST"} | _server(event.destination or "")
            if attempted.status_code is not None:
                attributes["http.response.status_code"] = attempted.status_code
            if event.attempt > 1:
                attributes["http.request.resend_count"] = event.attempt - 1
        error = None
        if attempted.verdict != DELIVERED:
            # Where there is a status it says enough; the text may quote what the receiver sent.
            error = "" if attempted.status_code is not None else attempted.error or ""
            kind_of_error = "timeout" if attempted.timed_out else "_OTHER"
            attributes["error.type"] = kind_of_error if attempted.status_code is None else str(attempted.status_code)
        self._tracer.record(
            Span("attempt", kind, begun.context, begun.parent, begun.start_ns, time.time_ns(), attributes, error)
        )

    def recorded(self, results: Collection[Finished], ends: Mapping[tuple[str, int], str], took_s: float) -> None:
        """Tells of results that have just been recorded; `ends` says what became of those that are not delivered."""
        begin, record = self._tracer.begin, self._tracer.record
        end_ns = time.time_ns()
        start_ns = end_ns - round(took_s * 1e9)
        for result in results:
            if result.traceparent is None or not is_sampled(result.traceparent):
                continue
            attributes = _DATABASE | {
                "orchestrator.event.id": result.event_id,
                "orchestrator.attempt": result.attempt,
                "orchestrator.result": ends.get((result.event_id, result.attempt), result.result),
                "db.operation.batch.size": len(results),
            }
            parent = result.traceparent
            record(Span("finish", "client", begin(parent), parent, start_ns, end_ns, attributes))


def _about(event: Claimed) -> Attributes:
    return {"orchestrator.event.id": event.event_id, "orchestrator.attempt": event.attempt}


def _server(url: str) -> Attributes:
    """Where a URL leads. The rest of it stays out: paths of webhooks, and not only queries, hold keys."""
    try:
        host, port, tls = destination_of(url).origin
    except ValueError:
        return {}
    return {"server.address": host, "server.port": port, "url.scheme": "https" if tls else "http"}
