"""A submission on its way on: its row in a COPY, and the JSON of it for the submission topic."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

import msgspec

from orchestrator.events.submission import Submission

_encode = msgspec.json.Encoder().encode

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's
_HEAD = struct.Struct(">I16sIqIh")
_length = struct.Struct(">I").pack
_time = struct.Struct(">Iq").pack
_small = struct.Struct(">Ih").pack
_interval = struct.Struct(">Iqii").pack

NULL = b"\xff\xff\xff\xff"
"""A field that is null."""
ID, SCHEDULED_AT, MAX_RETRIES = slice(0, 20), slice(20, 32), slice(32, 38)
"""Where an encoded row has these."""
_NOT_FOLLOWED = 3 * NULL
_NO_OPTIONS = 5 * NULL

COLUMNS = (
    "id",
    "scheduled_at",
    "max_retries",
    "source",
    "delivery_type",
    "destination",
    "external_job_id",
    "payload",
    "headers",
    "correlation_id",
    "traceparent",
    "retry_policy",
    "ordering_key",
    "priority",
    "spread",
    "expires_at",
)
"""The columns of an encoded row, in their order."""


class Kind(NamedTuple):
    """What the events of one sender to one destination share, as fields of a binary COPY."""

    source: bytes
    delivery_type: bytes
    destination: bytes


class Options(NamedTuple):
    """What decides when and in which order an event goes, as fields of a binary COPY."""

    retry_policy: bytes
    ordering_key: bytes
    priority: bytes
    spread: bytes
    expires_at: bytes


class EncodedRow(msgspec.Struct, frozen=True, gc=False):
    """A submission, the `n`-th of its batch, as fields of a binary COPY: each is a length and a value.

    `fields` are those of `COLUMNS`; it begins with the id, so that rows sort by it. `options`: None when it has none.
    """

    fields: bytes
    n: int
    kind: Kind
    options: Options | None


def encode_submission(s: Submission) -> bytes:
    """The JSON with which a client would submit this; it does not hold the id."""
    fields = msgspec.structs.asdict(s)
    del fields["id"]
    fields["payload"] = msgspec.Raw(s.payload)
    fields["headers"] = None if s.headers is None else msgspec.Raw(s.headers)
    return _encode({name: value for name, value in fields.items() if value is not None})


def encode_row(s: Submission, n: int) -> EncodedRow:
    kind, shared = _kind(s.source, s.delivery_type, s.destination)
    since = s.scheduled_at - _EPOCH
    micros = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    job = NULL if s.external_job_id is None else _text(s.external_job_id)
    payload = s.payload
    options = None
    # Most events have none of these.
    if s.headers is None and s.correlation_id is None and s.traceparent is None:
        followed = _NOT_FOLLOWED
    else:
        headers = NULL if s.headers is None else _length(len(s.headers)) + s.headers
        followed = headers + _optional(s.correlation_id) + _optional(s.traceparent)
    if (
        s.retry_policy is None
        and s.ordering_key is None
        and s.priority is None
        and s.spread_seconds is None
        and s.expires_at is None
    ):
        last = _NO_OPTIONS
    else:
        options = _options(s)
        last = b"".join(options)
    identity = bytes.fromhex(s.id.replace("-", ""))
    head = _HEAD.pack(16, identity, 8, micros, 2, s.max_retries)
    fields = b"".join((head, shared, job, _length(len(payload)), payload, followed, last))
    return EncodedRow(fields, n, kind, options)


@lru_cache(maxsize=4096)
def _kind(source: str, delivery_type: str, destination: str | None) -> tuple[Kind, bytes]:
    """The kind, and its fields in a row."""
    kind = Kind(_text(source), _text(delivery_type), _optional(destination))
    return kind, b"".join(kind)


def _options(s: Submission) -> Options:
    return Options(
        _optional(s.retry_policy),
        _optional(s.ordering_key),
        _small(2, s.priority) if s.priority else NULL,
        NULL if s.spread_seconds is None else _interval(16, round(s.spread_seconds * 1_000_000), 0, 0),
        NULL if s.expires_at is None else _time(8, _micros(s.expires_at)),
    )


def _optional(text: str | None) -> bytes:
    return NULL if text is None else _text(text)


def _text(text: str) -> bytes:
    value = text.encode()
    return _length(len(value)) + value


def _micros(at: datetime) -> int:
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
