"""The schemas of the OpenAPI document, with the same bounds that the code checks."""

from __future__ import annotations

from typing import Any

from orchestrator.api.problems import KINDS, TYPE_PREFIX
from orchestrator.config import Settings
from orchestrator.event_rules import (
    HEADER_NAME_PATTERN,
    HEADER_VALUE_PATTERN,
    MAX_HEADER_CHARS,
    MAX_HEADERS,
    MAX_NAME_CHARS,
    MAX_RETRIES,
    RETRY_POLICY_PATTERN,
)
from orchestrator.urls import MAX_URL_CHARS, URL_PATTERN

Schema = dict[str, Any]

NO_NUL_PATTERN = "^[^\\u0000]*$"
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "pattern": NO_NUL_PATTERN}
UUID: Schema = {"type": "string", "format": "uuid"}
TIME: Schema = {"type": "string", "format": "date-time"}
COUNT: Schema = {"type": "integer", "minimum": 0}
STATUSES = ["scheduled", "in_flight", "retrying", "delivered", "dead", "cancelled", "lost"]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def closed(properties: dict[str, Schema], *optional: str) -> Schema:
    """An object with these properties and no others, all of them present unless named as optional."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def schemas(settings: Settings) -> dict[str, Schema]:
    return {
        "Submission": _submission(settings),
        "JsonValue": _JSON_VALUE,
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
                "status": {"type": "string", "enum": ["scheduled", "duplicate"]},
                "duplicate": {"type": "boolean"},
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
                "status": {"type": "string", "enum": ["scheduled", "duplicate"]},
                "duplicate": {"type": "boolean"},
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
        "AllCancelled": closed({"events": {"type": "array", "minItems": 1, "items": ref("Cancelled")}}),
        "Statistics": _STATISTICS,
        "Health": _HEALTH,
        "Fault": closed({"field": {"type": "string"}, "reason": {"type": "string"}}),
        "Problem": _PROBLEM,
    }


def _submission(settings: Settings) -> Schema:
    fields: dict[str, Schema] = {
        "source": {**NAME, "description": "Who submits; part of what makes a submission the same as another."},
        "external_job_id": {
            **nullable(NAME),
            "description": "The client's own id. With `source` and `scheduled_at` it names the event: submitting "
            "the three again keeps the one event there is.",
        },
        "scheduled_at": {
            **TIME,
            "description": "When to deliver, with a zone; kept to the microsecond. How far back and ahead events are "
            "kept depends on the installation; a time beyond is answered with 409.",
        },
        "delivery_type": {"enum": ["HTTP", None], "default": "HTTP"},
        "destination": {
            "type": "string",
            "maxLength": MAX_URL_CHARS,
            "pattern": URL_PATTERN,
            "description": "The URL to POST the payload to.",
        },
        "payload": {
            **ref("JsonValue"),
            "description": f"Any JSON of at most {settings.max_payload_bytes} bytes, nested at most 64 levels, "
            "delivered byte for byte.",
        },
        "headers": {
            "type": ["object", "null"],
            "maxProperties": MAX_HEADERS,
            "propertyNames": {"type": "string", "pattern": HEADER_NAME_PATTERN},
            "additionalProperties": {
                "type": "string",
                "maxLength": MAX_HEADER_CHARS,
                "pattern": HEADER_VALUE_PATTERN.replace("\\x", "\\u00"),
            },
            "description": "Headers to send with the payload. Those of HTTP's framing, Content-Type, webhook-* and "
            "orchestrator-* are set on delivery and refused here.",
        },
        "max_retries": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MAX_RETRIES,
            "default": settings.max_retries,
            "description": "Attempts after the first.",
        },
        "retry_policy": {
            "type": ["string", "null"],
            "pattern": RETRY_POLICY_PATTERN,
            "description": "The name of a retry policy of this installation.",
        },
    }
    example = {
        "source": "orders",
        "external_job_id": "order-17/reminder",
        "scheduled_at": "2030-01-31T09:00:00Z",
        "destination": "https://example.com/webhooks/reminder",
        "payload": {"order": 17},
    }
    optional = ("external_job_id", "delivery_type", "headers", "max_retries", "retry_policy")
    return {**closed(fields, *optional), "examples": [example]}


_JSON_VALUE: Schema = {
    "description": "Any JSON without NUL characters.",
    "anyOf": [
        {"type": ["null", "boolean", "number"]},
        {"type": "string", "pattern": NO_NUL_PATTERN},
        {"type": "array", "items": ref("JsonValue")},
        {
            "type": "object",
            "propertyNames": {"type": "string", "pattern": NO_NUL_PATTERN},
            "additionalProperties": ref("JsonValue"),
        },
    ],
}

_OUTCOME = closed(
    {
        "attempt": {**COUNT, "description": "Which attempt; 0 when the event ended before any."},
        "result": {"type": "string", "enum": ["delivered", "retried", "dead", "cancelled"]},
        "status_code": nullable({"type": "integer"}),
        "error": nullable({"type": "string"}),
        "response": nullable({"type": "string", "description": "The beginning of the answer, of failures only."}),
        "due_at": nullable(TIME),
        "started_at": nullable(TIME),
        "finished_at": TIME,
        "lateness_ms": nullable({"type": "number", "description": "From due to started."}),
        "worker": nullable({"type": "string"}),
    }
)

_EVENT = closed(
    {
        "id": UUID,
        "source": {"type": "string"},
        "external_job_id": {"type": ["string", "null"]},
        "scheduled_at": TIME,
        "delivery_type": {"type": "string", "enum": ["HTTP"]},
        "destination": {"type": "string"},
        "payload": {},
        "headers": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        "max_retries": COUNT,
        "retry_policy": {"type": ["string", "null"]},
        "created_at": TIME,
        "status": {"type": "string", "enum": STATUSES},
        "attempt": {**COUNT, "description": "Attempts begun so far."},
        "due_at": {**nullable(TIME), "description": "When the next attempt is due; null when there is none."},
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

_STATISTICS = closed(
    {
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
        "at": TIME,
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
            "id": {**UUID, "description": "The event that could not be cancelled."},
            "event_status": {"type": "string", "enum": STATUSES},
            "events": {"type": "array", "items": ref("Cancelled")},
        },
        "errors",
        "id",
        "event_status",
        "events",
    ),
}
