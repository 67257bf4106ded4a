"""The schema of a submission, with the same bounds that the code checks."""

from __future__ import annotations

from orchestrator.api.openapi.parts import EXTERNAL_ID, NAME, NO_NUL_PATTERN, TIME, Schema, closed, nullable, ref
from orchestrator.events.rules import (
    HEADER_NAME_PATTERN,
    HEADER_VALUE_PATTERN,
    MAX_HEADER_CHARS,
    MAX_HEADERS,
    MAX_PRIORITY,
    MAX_RETRIES,
    MAX_SPREAD_S,
    MIN_SPREAD_S,
    RETRY_POLICY_PATTERN,
    TOPIC_PATTERN,
)
from orchestrator.events.urls import MAX_URL_CHARS, URL_PATTERN
from orchestrator.settings import Settings


def submission_schemas(settings: Settings) -> dict[str, Schema]:
    return {
        "Submission": {
            "description": "An event to deliver.",
            "anyOf": [ref("HttpSubmission"), ref("KafkaSubmission")],
            "examples": _EXAMPLES,
        },
        "HttpSubmission": _submission(settings, _TO_URL, "delivery_type") | {"description": "An event for a URL."},
        "KafkaSubmission": _submission(settings, _TO_TOPIC, "destination") | {"description": "An event for a topic."},
        "JsonValue": _JSON_VALUE,
    }


_TO_URL: dict[str, Schema] = {
    "delivery_type": {"enum": ["HTTP", None], "default": "HTTP", "description": "Null is `HTTP`."},
    "destination": {
        "type": "string",
        "maxLength": MAX_URL_CHARS,
        "pattern": URL_PATTERN,
        "description": "The URL to POST the payload to.",
    },
}
_TO_TOPIC: dict[str, Schema] = {
    "delivery_type": {"const": "KAFKA", "description": "Send it to a topic."},
    "destination": {
        "type": ["string", "null"],
        "pattern": TOPIC_PATTERN,
        "description": "The topic to send the payload to; that of the installation when absent.",
    },
}
_OPTIONAL = (
    *("external_job_id", "headers", "max_retries", "retry_policy", "ordering_key", "priority", "spread_seconds"),
    "expires_at",
)
_EXAMPLES = [
    {
        "source": "orders",
        "external_job_id": "order-17/reminder",
        "scheduled_at": "2030-01-31T09:00:00Z",
        "destination": "https://example.com/webhooks/reminder",
        "payload": {"order": 17},
    },
    {
        "source": "orders",
        "external_job_id": "order-17/expiry",
        "scheduled_at": "2030-02-28T09:00:00Z",
        "expires_at": "2030-02-28T17:00:00Z",
        "delivery_type": "KAFKA",
        "destination": "orders.expiries",
        "ordering_key": "order-17",
        "payload": {"order": 17},
    },
]


def _submission(settings: Settings, target: dict[str, Schema], optional: str) -> Schema:
    fields: dict[str, Schema] = {
        "source": {**NAME, "description": "Who submits; part of what makes a submission the same as another."},
        "external_job_id": {
            **nullable(EXTERNAL_ID),
            "description": "The client's own id. With `source`, `scheduled_at` and `ordering_key` it names the event: "
            "submitting the four again keeps the one event there is.",
        },
        "scheduled_at": {
            **TIME,
            "description": "When to deliver, with a zone; kept to the microsecond. How far back and ahead events are "
            "kept depends on the installation; a time beyond is answered with 409.",
        },
        **target,
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
            "description": "Headers to send with the payload. Those of HTTP's framing, Content-Type, Content-Encoding, "
            "User-Agent, proxy-*, webhook-* and orchestrator-* are set on delivery, or not at all, and refused here.",
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
        "ordering_key": {
            **nullable(NAME),
            "description": "Events of one key are delivered one at a time, in order of `scheduled_at`. Also the key of "
            "their Kafka records, in and out; that of a record without one is its external_job_id.",
        },
        "priority": {
            "type": ["integer", "null"],
            "minimum": -MAX_PRIORITY,
            "maximum": MAX_PRIORITY,
            "default": 0,
            "description": "Of the events that are due at a destination, those with the highest go first.",
        },
        "spread_seconds": {
            "type": ["number", "null"],
            "minimum": MIN_SPREAD_S,
            "maximum": MAX_SPREAD_S,
            "description": "Spreads a crowd of events that are scheduled for one time: each is due at a point of its "
            "own in so many seconds after `scheduled_at`; kept to the microsecond.",
        },
        "expires_at": {
            **nullable(TIME),
            "description": "When it is worth nothing any more: no attempt begins then or later, and it ends as "
            "`expired`. A time that is not after `scheduled_at` is answered with 409.",
        },
    }
    return closed(fields, optional, *_OPTIONAL)


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
