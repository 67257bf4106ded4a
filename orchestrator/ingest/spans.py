"""The spans of ingestion: one for each record whose trace is sampled, from when it was read until it is kept."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from orchestrator.events.submission import Submission
from orchestrator.events.tracing import is_sampled, trace_id
from orchestrator.ingest.partition import ConsumedRecord
from orchestrator.tracing import Attributes, Span, Tracer


class _Begun(NamedTuple):
    context: str
    parent: str | None
    start_ns: int
    attributes: Attributes


class IngestSpans:
    """The spans of one batch."""

    def __init__(self, tracer: Tracer, group: str) -> None:
        self._tracer = tracer
        self._group = group
        self._begun: list[_Begun] = []

    def follow(self, record: ConsumedRecord, submission: Submission) -> Submission:
        """Begins the span of a record, and puts its submission into it."""
        parent = submission.traceparent
        context = self._tracer.begin(parent)
        if is_sampled(context):
            attributes: Attributes = {
                "messaging.destination.partition.id": str(record.partition),
                "messaging.kafka.offset": record.offset,
                "orchestrator.event.id": submission.id,
            }
            self._begun.append(_Begun(context, parent, time.time_ns(), attributes))
        correlation_id = submission.correlation_id or trace_id(context)
        return msgspec.structs.replace(submission, traceparent=context, correlation_id=correlation_id)

    def end(self, topic: str, records: int) -> None:
        """Ends all spans: their batch is kept."""
        end_ns = time.time_ns()
        common: Attributes = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": topic,
            "messaging.consumer.group.name": self._group,
            "messaging.batch.message_count": records,
        }
        for context, parent, start_ns, attributes in self._begun:
            self._tracer.record(Span("ingest", "consumer", context, parent, start_ns, end_ns, common | attributes))
        self._begun.clear()
