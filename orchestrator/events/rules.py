"""What each field of a submission may hold, and what to tell a client whose submission breaks a rule."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from orchestrator.events.json_text import MAX_DEPTH, NUL_ESCAPE, deeper_than, has_forbidden_escape
from orchestrator.events.quoting import shown
from orchestrator.events.submission import Limits
from orchestrator.events.topics import topic_name_fault
from orchestrator.events.urls import url_fault

MAX_NAME_CHARS = 200
MAX_RETRIES = 100
MAX_PRIORITY = 9
MIN_SPREAD_S = 0.000001
MAX_SPREAD_S = 604_800
RETRY_POLICY_PATTERN = "^[a-z0-9_-]{1,63}$"
MAX_FRAME_BYTES = 1 << 20
"""Most that an event may take beside its payload; what all other fields can hold, every character escaped, is less."""
DOTS = (".", "..")
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
# To JSON, 3.0 is a whole number too.
Retries = (
    Annotated[int, msgspec.Meta(ge=0, le=MAX_RETRIES)]
    | Annotated[float, msgspec.Meta(ge=0, le=MAX_RETRIES, multiple_of=1)]
)
WholeNumber = int | Annotated[float, msgspec.Meta(multiple_of=1)]
Priority = (
    Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
    | Annotated[float, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY, multiple_of=1)]
)
SpreadSeconds = Annotated[float, msgspec.Meta(ge=MIN_SPREAD_S, le=MAX_SPREAD_S)]
DeliveryType = Literal["HTTP", "KAFKA"]
RetryPolicy = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_-]{1,63}\Z")]


def size_fault(text: bytes | msgspec.Raw, limits: Limits) -> str | None:
    """Why a text is too long for an event: so that nobody reads, or explains, what cannot be one."""
    size = len(text) if type(text) is bytes else len(memoryview(text))
    most = limits.max_payload_bytes + MAX_FRAME_BYTES
    if size <= most:
        return None
    return f"expected at most {most} bytes for an event, {limits.max_payload_bytes} of them payload, got {size}"


def is_storable(text: str) -> bool:
    """Whether the database can hold it: no NUL, no lone surrogate."""
    return "\x00" not in text and text.encode(errors="ignore").decode() == text


def text_fault(text: str) -> str | None:
    return "expected no NUL character and no lone surrogate" if "\x00" in text else None


def external_job_id_fault(external_job_id: str) -> str | None:
    """Why it can name no event: as a part of a path, clients and proxies take dots for folders."""
    if external_job_id in DOTS:
        return f"expected a text that can be a part of a path, got {external_job_id}"
    return text_fault(external_job_id)


def destination_fault(delivery_type: str | None, destination: str | None) -> str | None:
    """Why an event cannot go there: to a URL, or to a topic if it is a KAFKA one; None there is the ready topic."""
    if delivery_type == "KAFKA":
        return None if destination is None else topic_name_fault(destination)
    if destination is None:
        return "required: an http or https URL; only events of delivery_type KAFKA may leave it out"
    fault = url_fault(destination)
    if fault and topic_name_fault(destination) is None:
        return f"{fault}; for a Kafka topic set delivery_type to KAFKA"
    return fault


def payload_fault(payload: bytes, limits: Limits) -> str | None:
    if len(payload) > limits.max_payload_bytes:
        return f"expected at most {limits.max_payload_bytes} bytes of JSON, got {len(payload)}"
    if deeper_than(payload):
        return f"expected at most {MAX_DEPTH} levels of nesting"
    # find() takes half as long as "in" does, and for one byte half as long as for six.
    if payload.find(b"\\") >= 0 and payload.find(NUL_ESCAPE) >= 0 and has_forbidden_escape(payload):
        return r"expected no \u0000 and no lone surrogate in strings: PostgreSQL cannot read them"
    return None


def priority_fault(priority: float) -> str | None:
    if -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        return None
    return f"expected -{MAX_PRIORITY} to {MAX_PRIORITY}, got {shown(priority)}"
