"""The schema of a submission, with the same bounds that the code checks."""

from __future__ import annotations

from orchestrator.api.openapi.parts import NO_NUL_PATTERN, Schema, closed, ref
from orchestrator.events.fields import FIELDS
from orchestrator.events.topics import TOPIC_PATTERN
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


FOLLOWED_BY: tuple[Schema, ...] = tuple(
    {"name": name, "in": "header", "schema": {"type": "string"}, "description": f"The `{field}` of events without one."}
    for name, field in (
        ("X-Correlation-ID", "correlation_id"),
        ("traceparent", "traceparent"),
        ("tracestate", "headers: tracestate"),
    )
)
"""Headers with which events may be submitted; one that is not valid is ignored."""


def _submission(settings: Settings, target: dict[str, Schema], optional: str) -> Schema:
    """The fields of a submission, with those of one way to deliver it, and the bounds of this configuration."""
    fields = {field.name: {**field.schema, "description": field.about} for field in FIELDS} | target
    bytes_at_most = f"{settings.max_payload_bytes} bytes"
    fields["payload"]["description"] = fields["payload"]["description"].replace("MAX_PAYLOAD_BYTES", bytes_at_most)
    fields["max_retries"]["default"] = settings.max_retries
    return closed(
        fields, optional, *(field.name for field in FIELDS if not field.required and field.name not in target)
    )


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
