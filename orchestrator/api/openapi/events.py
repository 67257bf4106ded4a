"""The schemas of the OpenAPI document, with the same bounds that the code checks."""

from __future__ import annotations

from orchestrator.api.openapi.dead_letters import dead_letter_schemas
from orchestrator.api.openapi.destinations import destination_schemas
from orchestrator.api.openapi.parts import COUNT, NAME, STATUSES, TIME, UUID, Schema, closed, nullable, ref
from orchestrator.api.openapi.submission import submission_schemas
from orchestrator.api.problems import KINDS, TYPE_PREFIX
from orchestrator.api.requests.filters import CANCEL, NARROWING, RESCHEDULE, body_schema, swept_schema
from orchestrator.api.routes.events import MAX_COUNTS
from orchestrator.settings import Settings

_SUBMITTED_STATUS: Schema = {
    "type": "string",
    "enum": ["scheduled", "duplicate", "accepted"],
    "description": "`scheduled`: it is kept. `duplicate`: it was kept before; nothing has changed. `accepted`: Kafka "
    "has it; it is kept within moments, unless it was before or the database refuses it.",
}
_EVENT_STATUS: Schema = {
    "type": ["string", "null"],
    "enum": [*STATUSES, None],
    "description": "The state that the event is in now, such as `cancelled` for a duplicate of one that was; null: "
    "Kafka has it, and what has become of it is not known yet.",
}


def schemas(settings: Settings) -> dict[str, Schema]:
    return {
        **submission_schemas(settings),
        **destination_schemas(),
        **dead_letter_schemas(),
        "Batch": closed(
            {
                "events": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": settings.max_batch_events,
                    "items": {"anyOf": [ref("Submission"), {}]},
                    "description": "Submissions. One that breaks a rule is told of in its result; it fails no other.",
                }
            }
        ),
        "Submitted": closed(
            {
                "id": UUID,
                "external_job_id": nullable(NAME),
                "scheduled_at": TIME,
                "status": _SUBMITTED_STATUS,
                "duplicate": {"type": "boolean"},
                "event_status": _EVENT_STATUS,
            }
        ),
        "BatchResult": closed(
            {
                "accepted": COUNT,
                "duplicates": COUNT,
                "rejected": COUNT,
                "results": {
                    "type": "array",
                    "items": {"oneOf": [ref("ItemSubmitted"), ref("ItemRejected")]},
                    "description": "One for each event, in the order in which they were sent.",
                },
            }
        ),
        "ItemSubmitted": closed(
            {
                "index": COUNT,
                "id": UUID,
                "status": _SUBMITTED_STATUS,
                "duplicate": {"type": "boolean"},
                "event_status": _EVENT_STATUS,
            }
        ),
        "ItemRejected": closed({"index": COUNT, "error": ref("Fault")}),
        "Event": _EVENT,
        "Outcome": _OUTCOME,
        "EventPage": closed(
            {
                "events": {"type": "array", "items": ref("Event")},
                "next": {"type": ["string", "null"], "description": "The `cursor` of the next page; null on the last."},
            }
        ),
        "Cancelled": _CANCELLED,
        "Reschedule": body_schema(RESCHEDULE, "scheduled_at")
        | {"examples": [{"scheduled_at": "2030-02-01T09:00:00Z"}]},
        "Rescheduled": _RESCHEDULED,
        "CancelFilter": body_schema(CANCEL, some_of=NARROWING)
        | {"examples": [{"source": "orders", "destination": "example.com", "dry_run": True}]},
        "ManyCancelled": swept_schema(
            cancelled=COUNT, in_flight={**COUNT, "description": "Those that are being delivered, and go on."}
        ),
        "AllCancelled": closed({"events": {"type": "array", "minItems": 1, "items": ref("Cancelled")}}),
        "Statistics": _STATISTICS,
        "Counts": _COUNTS,
        "StatisticsOrCounts": {"anyOf": [ref("Statistics"), ref("Counts")]},
        "Health": _HEALTH,
        "Fault": closed({"field": {"type": "string"}, "reason": {"type": "string"}}),
        "Problem": _PROBLEM,
    }


_WAITS = ("rate", "parallel", "breaker", "pause")
_MILLISECONDS: Schema = {"type": "number", "minimum": 0}
_OUTCOME = closed(
    {
        "attempt": {**COUNT, "description": "Which attempt; 0 when the event ended before any."},
        "result": {
            "type": "string",
            "enum": ["delivered", "retried", "dead", "cancelled", "redriven", "rescheduled", "expired"],
        },
        "status_code": nullable({"type": "integer"}),
        "error": nullable({"type": "string"}),
        "response": nullable({"type": "string", "description": "The beginning of the answer, of failures only."}),
        "due_at": nullable(TIME),
        "claimed_at": {**nullable(TIME), "description": "When a dispatcher took it; it looks ahead a little."},
        "started_at": nullable(TIME),
        "finished_at": TIME,
        "lateness_ms": nullable({"type": "number", "description": "From due to started."}),
        "waited": {
            **closed(dict.fromkeys(_WAITS, _MILLISECONDS), *_WAITS),
            "type": ["object", "null"],
            "description": "Milliseconds of it, by what it waited for at its destination; null: nothing.",
        },
        "worker": nullable({"type": "string"}),
        "successor": {**nullable(UUID), "description": "Of `rescheduled`: the event that took its place."},
    }
)

_EVENT = closed(
    {
        "id": UUID,
        "source": {"type": "string"},
        "external_job_id": {"type": ["string", "null"]},
        "scheduled_at": TIME,
        "delivery_type": {"type": "string", "enum": ["HTTP", "KAFKA"]},
        "destination": {"type": ["string", "null"], "description": "A URL or a topic; null is the ready topic."},
        "payload": {},
        "headers": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "max_retries": COUNT,
        "retry_policy": {"type": ["string", "null"]},
        "ordering_key": {"type": ["string", "null"]},
        "priority": {"type": "integer"},
        "spread_seconds": {"type": ["number", "null"]},
        "expires_at": {**nullable(TIME), "description": "No attempt begins then or later; null: it never expires."},
        "correlation_id": {"type": ["string", "null"], "description": "What it is followed by; null: none."},
        "traceparent": {
            "type": ["string", "null"],
            "description": "The W3C trace context that it belongs to; null: none.",
        },
        "predecessor": {**nullable(UUID), "description": "The event that was rescheduled to this one; null: none."},
        "successor": {**nullable(UUID), "description": "The event that it was rescheduled to; null: none."},
        "created_at": TIME,
        "status": {"type": "string", "enum": STATUSES},
        "attempt": {**COUNT, "description": "Attempts begun so far."},
        "due_at": {**nullable(TIME), "description": "When the next attempt is due; null when there is none."},
        "spread_ms": {
            "type": ["number", "null"],
            "description": "How long after `scheduled_at` it was due at first, by the spread; null: without one.",
        },
        "waits_for": {**nullable(UUID), "description": "The event of its ordering key that it waits for; null: none."},
        "outcomes": {"type": "array", "items": ref("Outcome"), "description": "What happened, oldest first."},
    }
)

_CANCELLED = closed(
    {
        "id": UUID,
        "result": {"type": "string", "enum": ["cancelled", "already_cancelled", "in_flight", "finished"]},
        "status": {"type": "string", "enum": STATUSES},
    }
)

_RESCHEDULED = closed(
    {
        "id": UUID,
        "successor": {**UUID, "description": "The event that took its place."},
        "result": {"type": "string", "enum": ["rescheduled", "already_rescheduled"]},
        "status": {"type": "string", "enum": STATUSES},
    }
)

_STATISTICS = closed(
    {
        "live": {**COUNT, "description": "Events that have not ended, those in flight included."},
        "scheduled": COUNT,
        "retrying": COUNT,
        "in_flight": COUNT,
        "backlog": {**COUNT, "description": "Events that are due and not claimed."},
        "oldest_due_at": nullable(TIME),
        "next_due_at": nullable(TIME),
        "dead_letters": COUNT,
        "totals": {
            "type": "object",
            "additionalProperties": COUNT,
            "description": "Since installation, by what happened.",
        },
        "paused_at": {**nullable(TIME), "description": "Since when everything is paused; null: it is not."},
        "destinations_paused": COUNT,
        "breakers_open": COUNT,
        "at": TIME,
    }
)

_COUNTS = closed(
    {
        "counts": {
            "type": "array",
            "maxItems": MAX_COUNTS,
            "items": closed(
                {
                    "minute": {**nullable(TIME), "description": "Its minute, or hour or day where it is long ago."},
                    "name": {"type": "string", "description": "What happened, as in the totals of the statistics."},
                    "source": {"type": ["string", "null"], "description": "Empty: not known yet, or not any more."},
                    "destination": {
                        "type": ["string", "null"],
                        "description": "Empty as `source`; `*`: all beyond the first 1,000 pairs of the two.",
                    },
                    "value": {"type": "integer"},
                }
            ),
            "description": "One for each that `by` tells apart; null where it does not. Maintenance, once a minute, "
            "gives new ones their source and destination; after retention they have none.",
        }
    }
)

_HEALTH = closed(
    {
        "status": {"type": "string", "enum": ["UP", "DOWN"]},
        "checks": {
            "type": "object",
            "additionalProperties": closed(
                {"status": {"type": "string", "enum": ["UP", "DOWN"]}, "reason": {"type": "string"}}, "reason"
            ),
        },
    }
)

_PROBLEM: Schema = {
    "description": "A problem document, RFC 9457.",
    **closed(
        {
            "type": {"type": "string", "enum": [TYPE_PREFIX + kind for kind in KINDS]},
            "title": {"type": "string"},
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": {"type": "string"},
            "instance": {"type": "string"},
            "errors": {"type": "array", "minItems": 1, "items": ref("Fault")},
            "id": {**UUID, "description": "The event that could not be cancelled or rescheduled."},
            "event_status": {"type": "string", "enum": STATUSES},
            "events": {"type": "array", "items": ref("Cancelled")},
        },
        "errors",
        "id",
        "event_status",
        "events",
    ),
}
