"""A submission, what bounds it, and the errors of a text that is none."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from orchestrator.errors import ValidationError


class Submission(msgspec.Struct, frozen=True, gc=False):
    """A submission that keeps every rule: `scheduled_at` in UTC, `payload` and `headers` as JSON texts.

    `destination` is a URL, or a topic when `delivery_type` is KAFKA; None then stands for the ready topic.
    `priority` is None for 0. No attempt begins at `expires_at`, also in UTC, or later.
    `traceparent` is of version 00.
    """

    id: str
    scheduled_at: datetime
    source: str
    external_job_id: str | None
    delivery_type: str
    destination: str | None
    payload: bytes
    headers: bytes | None
    max_retries: int
    retry_policy: str | None
    ordering_key: str | None = None
    priority: int | None = None
    spread_seconds: float | None = None
    expires_at: datetime | None = None
    correlation_id: str | None = None
    traceparent: str | None = None


class Limits(Protocol):
    """The settings that bound a submission; `Settings` is one."""

    @property
    def max_payload_bytes(self) -> int: ...
    @property
    def max_batch_events(self) -> int: ...
    @property
    def max_retries(self) -> int: ...


class JsonError(ValidationError):
    """The text is not JSON in UTF-8; `position` is the byte where that shows."""

    def __init__(self, reason: str, position: int) -> None:
        self.position = position
        super().__init__("body", f"{reason} at byte {position}")


class SubmissionError(ValidationError):
    """A submission breaks one rule or several. `errors` holds a (field, reason) for each, in no order."""

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        self.errors = tuple(errors)
        super().__init__(*self.errors[0])


class OutOfRangeError(SubmissionError):
    """A submission whose only fault is a time that is never kept; see `scheduled_at_fault` and `expires_at_fault`."""
