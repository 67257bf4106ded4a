"""FIELDS: the one table of what an event is submitted with.

From it come the messages of `faults`, the properties of the OpenAPI document, the columns of COPY and the help of
``orchestrator submit``. By hand, for speed, are `parsing.Wire`, its check, and `encoding.encode_row`; a test holds
them to the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from orchestrator.events.headers import (
    HEADER_NAME_PATTERN,
    HEADER_VALUE_PATTERN,
    MAX_HEADER_CHARS,
    MAX_HEADERS,
    headers_fault,
)
from orchestrator.events.rules import (
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_RETRIES,
    MAX_SPREAD_S,
    MIN_SPREAD_S,
    RETRY_POLICY_PATTERN,
    DeliveryType,
    Name,
    Retries,
    RetryPolicy,
    SpreadSeconds,
    WholeNumber,
    external_job_id_fault,
    priority_fault,
    text_fault,
)
from orchestrator.events.times import EXPECTED_TIME, ScheduledAt, scheduled_at_fault
from orchestrator.events.tracing import (
    CORRELATION_ID_PATTERN,
    MAX_CORRELATION_ID_CHARS,
    TRACEPARENT_PATTERN,
    CorrelationId,
    Traceparent,
)

Schema = dict[str, Any]

NO_NUL_PATTERN = "^[^\\u0000]*$"
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "pattern": NO_NUL_PATTERN}
EXTERNAL_ID: Schema = {**NAME, "pattern": "^(?!\\.{1,2}$)[^\\u0000]*$"}
TIME: Schema = {"type": "string", "format": "date-time"}


def nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


class Field(NamedTuple):
    """One field, by its name in JSON and in `Submission`.

    `type` is what msgspec reads; a text that is no such is told what is `expected`. `fault` checks a value of the right
    type. `schema` is JSON Schema; the first sentence of `about` is also the help of its option. What a `secret` field
    holds is never quoted.
    """

    name: str
    type: Any
    expected: str
    schema: Schema
    about: str
    fault: Callable[[Any], str | None] | None = None
    required: bool = False
    secret: bool = False
    other_column: str | None = None

    @property
    def column(self) -> str:
        """Its name in pg_temp.submission."""
        return self.other_column or self.name


FIELDS = (
    Field(
        "source",
        Name,
        f"a string of 1 to {MAX_NAME_CHARS} characters",
        NAME,
        "The system that submits it. Part of what makes a submission the same as another.",
        text_fault,
        required=True,
    ),
    Field(
        "scheduled_at",
        ScheduledAt,
        EXPECTED_TIME,
        TIME,
        "When to deliver it, with a time zone; kept to the microsecond. How far back and ahead events are kept depends "
        "on the installation; a time beyond is answered with 409.",
        scheduled_at_fault,
        required=True,
    ),
    Field(
        "destination",
        str | None,
        "a URL, or the name of a Kafka topic",
        {"type": ["string", "null"]},
        "The URL to POST the payload to, or the topic to send it to.",
        secret=True,
    ),
    Field(
        "payload",
        msgspec.Raw,
        "a JSON value",
        {"$ref": "#/components/schemas/JsonValue"},
        "Any JSON of at most MAX_PAYLOAD_BYTES, nested at most 64 levels, delivered byte for byte.",
        required=True,
    ),
    Field(
        "external_job_id",
        Name | None,
        f"a string of 1 to {MAX_NAME_CHARS} characters, or null",
        nullable(EXTERNAL_ID),
        "The client's own id for it. With `source`, `scheduled_at` and `ordering_key` it names the event: submitting "
        "the four again keeps the one event there is.",
        external_job_id_fault,
    ),
    Field(
        "delivery_type",
        DeliveryType | None,
        "HTTP or KAFKA",
        {"enum": ["HTTP", "KAFKA", None], "default": "HTTP"},
        "How to deliver it: HTTP or KAFKA.",
    ),
    Field(
        "headers",
        dict[str, str] | None,
        "an object of strings, or null",
        {
            "type": ["object", "null"],
            "maxProperties": MAX_HEADERS,
            "propertyNames": {"type": "string", "pattern": HEADER_NAME_PATTERN},
            "additionalProperties": {
                "type": "string",
                "maxLength": MAX_HEADER_CHARS,
                "pattern": HEADER_VALUE_PATTERN.replace("\\x", "\\u00"),
            },
        },
        "Headers to send with the payload. Those of HTTP's framing, Content-Type, Content-Encoding, User-Agent, "
        "proxy-*, webhook-* and orchestrator-* are set on delivery, or not at all, and refused here.",
        headers_fault,
        secret=True,
    ),
    Field(
        "max_retries",
        Retries | None,
        f"a whole number from 0 to {MAX_RETRIES}, or null",
        {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_RETRIES},
        "Attempts after the first.",
    ),
    Field(
        "retry_policy",
        RetryPolicy | None,
        "a name of 1 to 63 characters from a-z, 0-9, _ and -, or null",
        {"type": ["string", "null"], "pattern": RETRY_POLICY_PATTERN},
        "The name of a retry policy of this installation.",
    ),
    Field(
        "ordering_key",
        Name | None,
        f"a string of 1 to {MAX_NAME_CHARS} characters, or null",
        nullable(NAME),
        "Events of one key are delivered one at a time, in order of `scheduled_at`. Also the key of their Kafka "
        "records, in and out; that of a record without one is its external_job_id.",
        text_fault,
    ),
    Field(
        "priority",
        WholeNumber | None,
        f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}",
        {"type": ["integer", "null"], "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY, "default": 0},
        f"-{MAX_PRIORITY} to {MAX_PRIORITY}: of the events that are due at a destination, the highest go first.",
        priority_fault,
    ),
    Field(
        "spread_seconds",
        SpreadSeconds | None,
        f"more than 0 and at most {MAX_SPREAD_S} seconds",
        {"type": ["number", "null"], "minimum": MIN_SPREAD_S, "maximum": MAX_SPREAD_S},
        "Spreads events that are scheduled for one time: each is due at a point of its own within this many seconds "
        "after `scheduled_at`. Kept to the microsecond.",
        other_column="spread",
    ),
    Field(
        "expires_at",
        ScheduledAt | None,
        f"{EXPECTED_TIME}, or null",
        nullable(TIME),
        "No attempt begins at this time or later: the event ends as `expired`. A time that is not after "
        "`scheduled_at` is answered with 409.",
    ),
    Field(
        "correlation_id",
        CorrelationId | None,
        f"1 to {MAX_CORRELATION_ID_CHARS} printable ASCII characters, no space at either end, or null",
        {"type": ["string", "null"], "pattern": CORRELATION_ID_PATTERN},
        "An id to follow it by through several systems, sent along as the header X-Correlation-ID. By default that "
        "header of the request, where it is valid, else the trace id of `traceparent`.",
    ),
    Field(
        "traceparent",
        Traceparent | None,
        "a W3C traceparent, such as 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01, or null",
        {"type": ["string", "null"], "pattern": TRACEPARENT_PATTERN},
        "The W3C trace context that it belongs to, sent along as the header traceparent, in version 00. By default "
        "that header of the request, where it is valid.",
    ),
)
