"""A submission on its way on: its line in a COPY, and the JSON of it for the submission topic."""

from __future__ import annotations

from datetime import datetime

import msgspec

from orchestrator.events.submission import Submission

_encode = msgspec.json.Encoder().encode
_NULLS = "\\N\t\\N"


def encode_submission(s: Submission) -> bytes:
    """The JSON with which a client would submit this; it does not hold the id."""
    fields = msgspec.structs.asdict(s)
    del fields["id"]
    fields["payload"] = msgspec.Raw(s.payload)
    fields["headers"] = None if s.headers is None else msgspec.Raw(s.headers)
    return _encode({name: value for name, value in fields.items() if value is not None})


def copy_row(s: Submission, n: int) -> bytes:
    """One line of COPY text, with its end: n, then the fields of the submission in their order."""
    headers = rb"\N" if s.headers is None else _escaped(s.headers)
    job = r"\N" if s.external_job_id is None else _escaped_text(s.external_job_id)
    destination = r"\N" if s.destination is None else _escaped_text(s.destination)
    first = (
        f"{n}\t{s.id}\t{_time(s.scheduled_at)}\t{_escaped_text(s.source)}\t{job}\t{s.delivery_type}\t{destination}\t"
    ).encode()
    priority = s.priority or r"\N"
    # Not str(): that of a small number has an exponent.
    spread = r"\N" if s.spread_seconds is None else f"{s.spread_seconds:.6f} seconds"
    expires_at = r"\N" if s.expires_at is None else _time(s.expires_at)
    policy = r"\N" if s.retry_policy is None else _escaped_text(s.retry_policy)
    key = r"\N" if s.ordering_key is None else _escaped_text(s.ordering_key)
    # Most events have neither.
    followed = (
        _NULLS
        if s.correlation_id is None and s.traceparent is None
        else f"{_optional(s.correlation_id)}\t{_optional(s.traceparent)}"
    )
    last = f"\t{s.max_retries}\t{policy}\t{key}\t{priority}\t{spread}\t{expires_at}\t{followed}\n".encode()
    return b"%b%b\t%b%b" % (first, _escaped(s.payload), headers, last)


def _time(at: datetime) -> str:
    return _encode(at)[1:-1].decode()  # isoformat() takes six times as long


def _optional(field: str | None) -> str:
    return r"\N" if field is None else _escaped_text(field)


def _escaped_text(field: str) -> str:
    if field.isprintable() and "\\" not in field:
        return field
    return _escaped(field.encode()).decode()


def _escaped(field: bytes) -> bytes:
    # The backslash first, or the escapes would be escaped again.
    return field.replace(b"\\", rb"\\").replace(b"\t", rb"\t").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
