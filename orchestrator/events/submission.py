"""A submission: how it is read, its id, and its line in a COPY. Every client of the database comes here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

import msgspec

from orchestrator.errors import ValidationError
from orchestrator.events.json_text import MAX_DEPTH, pruned, utf8_fault, with_nul_for_surrogates
from orchestrator.events.rules import (
    DOTS,
    EARLIEST,
    LATEST,
    MAX_FAULTS,
    JsonError,
    Limits,
    OutOfRangeError,
    SubmissionError,
    Wire,
    destination_fault,
    envelope_faults,
    expires_at_fault,
    faults_of,
    headers_fault,
    payload_fault,
    scheduled_at_fault,
    shown,
    size_fault,
    with_usual_times,
)
from orchestrator.events.topics import TopicRules

__all__ = [
    "EVENT_ID_HEADER",
    "JsonError",
    "Limits",
    "OutOfRangeError",
    "Submission",
    "SubmissionError",
    "batch_items",
    "bucket",
    "bucket_of_key",
    "copy_row",
    "encode_submission",
    "event_id",
    "parse_batch",
    "parse_submission",
    "random_event_id",
    "require_topic",
    "submission_row",
]

EVENT_ID_HEADER = "orchestrator-event-id"
"""The header of a Kafka record that names the id of an event: in a submission, of one without an external id."""


class Submission(msgspec.Struct, frozen=True):
    """A submission that keeps every rule: `scheduled_at` in UTC, `payload` and `headers` as JSON texts.

    `destination` is a URL, or a topic when `delivery_type` is KAFKA; None then stands for the ready topic.
    `priority` is None for 0. No attempt begins at `expires_at`, also in UTC, or later.
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


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[msgspec.Raw]


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    events: msgspec.Raw


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_wire = msgspec.json.Decoder(Wire).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_decode_any = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode
_VARIANT = {f"{digit:x}": f"{digit & 0b0011 | 0b1000:x}" for digit in range(16)}
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_POSITION = re.compile(r" \(byte (\d+)\)$")
_SHORT_BYTES = 1 << 18


def event_id(source: str, external_job_id: str, scheduled_at: datetime, ordering_key: str | None = None) -> str:
    """The id of the event with this source, external id, time and ordering key: the same in every process and in SQL.

    A UUID laid out like version 7 (RFC 9562, 5.7): the millisecond of `scheduled_at`, the bucket, then bits of a
    SHA-256 over the four. The lengths keep ("a", "bc") and ("ab", "c") apart.
    """
    micros = _micros(scheduled_at)
    name, job = source.encode(), external_job_id.encode()
    if ordering_key is None:
        key, text = job, b"%d:%d:%b%b" % (micros, len(name), name, job)
    else:
        key = ordering_key.encode()
        text = b"k%d:%d:%d:%b%b%b" % (micros, len(name), len(job), name, job, key)
    bucket = hashlib.sha256(key).hexdigest()[:3]
    return _uuid(micros // 1000, bucket, hashlib.sha256(text).hexdigest()[4:20])


def random_event_id(scheduled_at: datetime, bucket: int | None = None) -> str:
    """An id for an event without an external id: the millisecond of `scheduled_at`, the bucket, then random bits.

    The bucket is from 0 to 4095, by default random too.
    """
    drawn = os.urandom(10).hex()
    return _uuid(_micros(scheduled_at) // 1000, drawn[17:] if bucket is None else f"{bucket:03x}", drawn[:16])


def bucket_of_key(key: str) -> int:
    """The bucket, 0 to 4095, of the events of an ordering key, or of an external id without one.

    The first 12 bits of its SHA-256.
    """
    return int(hashlib.sha256(key.encode()).hexdigest()[:3], 16)


def bucket(identity: str) -> int:
    """The bucket that an event id holds: `bucket_of_key` of its ordering key, else its external id, else random."""
    return int(identity[15:18], 16)


def _micros(at: datetime) -> int:
    since = at - EARLIEST
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _uuid(millis: int, bucket: str, tail: str) -> str:
    """The 48 bits of `millis`, the version, `bucket`, and `tail`, 16 hex digits with the variant over two bits."""
    time = f"{millis:012x}"
    return f"{time[:8]}-{time[8:]}-7{bucket}-{_VARIANT[tail[0]]}{tail[1:4]}-{tail[4:]}"


def _id_of(source: str, external_job_id: str | None, at: datetime, ordering_key: str | None) -> str:
    if external_job_id is not None:
        return event_id(source, external_job_id, at, ordering_key)
    return random_event_id(at, None if ordering_key is None else bucket_of_key(ordering_key))


def parse_submission(raw: bytes, limits: Limits) -> Submission:
    """Read one submission. Raises JsonError, or SubmissionError with the rules it breaks, at most 20."""
    return _one(raw, limits, MAX_FAULTS)


def _one(raw: bytes, limits: Limits, most_faults: int) -> Submission:
    if fault := size_fault(raw, limits):
        raise SubmissionError([("body", fault)])
    _require_utf8(raw)
    return _submission(raw, limits, most_faults)


def parse_batch(raw: bytes, limits: Limits) -> list[Submission | ValidationError]:
    """Read ``{"events": [...]}``: a submission or its error, with the first rule it breaks, for each item, in order.

    Raises JsonError or SubmissionError when the envelope itself is wrong.
    """
    return [item for item in batch_items(raw, limits) if item is not None]


def batch_items(raw: bytes, limits: Limits) -> Iterator[Submission | ValidationError | None]:
    """`parse_batch` in steps of bounded time, for callers that have more to do meanwhile; None: no item yet."""
    _require_utf8(raw)
    yield None
    try:
        items = yield from _items(raw, limits)
    except (RecursionError, msgspec.DecodeError):
        yield None
        text = yield from _readable(raw)
        yield None
        try:
            items = yield from _items(text, limits)
        except msgspec.ValidationError as wrong:
            raise SubmissionError(envelope_faults(text, limits, str(wrong))) from None
    yield None
    if not 1 <= len(items) <= limits.max_batch_events:
        raise SubmissionError([("events", f"expected 1 to {limits.max_batch_events} events, got {len(items)}")])
    may_be_long = size_fault(raw, limits) is not None
    for item in items:
        fault = size_fault(item, limits) if may_be_long else None
        if fault:
            yield SubmissionError([("body", fault)])
            continue
        try:
            yield _submission(item, limits, 1)
        except ValidationError as error:
            yield error


def _require_utf8(raw: bytes) -> None:
    position = utf8_fault(raw)
    if position is not None:
        raise JsonError("expected UTF-8, got an invalid sequence", position)


def _items(text: bytes, limits: Limits) -> Generator[None, None, Sequence[msgspec.Raw]]:
    """The items, of which there may be more than the limit only when the text is short; in steps."""
    if len(text) <= _SHORT_BYTES:
        return _decode_batch(text).events
    # The field may be there a million times, of which the last counts, and a list would grow to millions of items
    # before its length is looked at.
    events = _decode_envelope(text).events
    yield
    found = _bounded_list(limits.max_batch_events)(events)
    return [item for item in msgspec.structs.astuple(found) if item is not None]


@lru_cache(maxsize=4)
def _bounded_list(most: int) -> Callable[[msgspec.Raw], Any]:
    """A decoder of arrays that stops at the first item too many."""
    each = [(f"item{n}", msgspec.Raw, None) for n in range(most)]
    return msgspec.json.Decoder(msgspec.defstruct("_Events", each, array_like=True, forbid_unknown_fields=True)).decode


def _submission(text: bytes | msgspec.Raw, limits: Limits, most_faults: int) -> Submission:
    try:
        return _valid(text, limits, most_faults)
    except (RecursionError, msgspec.DecodeError):
        readable = with_usual_times(_at_once(_readable(bytes(text))))
    try:
        return _valid(readable, limits, most_faults)
    except msgspec.ValidationError:
        _refuse(readable, limits, most_faults)


def _at_once(steps: Generator[None, None, bytes]) -> bytes:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: bytes = end.value
            return result


def _readable(text: bytes) -> Generator[None, None, bytes]:
    """The text as `_well_formed` makes it, with what the decoder cannot descend into cut away; in steps."""
    try:
        return _well_formed(text)
    except RecursionError:
        yield
    flat = pruned(text)
    if flat is None:
        raise SubmissionError([("body", f"expected at most {MAX_DEPTH} levels of nesting in an event")])
    yield
    return _well_formed(flat)


def _well_formed(text: bytes) -> bytes:
    """The text, with ``\\u0000`` for lone surrogates. Raises JsonError if it is malformed otherwise.

    An error of the decoder does not tell: it stops at the first value that breaks a rule, and may not have seen all.
    """
    try:
        _decode_any(text)
    except msgspec.DecodeError as error:
        mended = with_nul_for_surrogates(text)
        if mended == text:
            raise _json_error(text, error) from None
        try:
            _decode_any(mended)
        except msgspec.DecodeError as other:
            raise _json_error(mended, other) from None
        return mended
    return text


def _valid(text: bytes | msgspec.Raw, limits: Limits, most_faults: int) -> Submission:
    wire = _decode_wire(text)
    at = wire.scheduled_at
    job = wire.external_job_id
    payload = bytes(wire.payload)
    kind = wire.delivery_type or "HTTP"
    key = wire.ordering_key
    if (
        destination_fault(kind, wire.destination)
        or payload_fault(payload, limits)
        or (wire.headers and headers_fault(wire.headers))
        or job in DOTS
        or "\x00" in wire.source
        or (job and "\x00" in job)
        or (key and "\x00" in key)
    ):
        _refuse(text, limits, most_faults)
    if not EARLIEST <= at <= LATEST:
        raise OutOfRangeError([("scheduled_at", scheduled_at_fault(at) or "")])
    expires_at = wire.expires_at
    if expires_at is not None:
        if fault := expires_at_fault(expires_at, at):
            raise OutOfRangeError([("expires_at", fault)])
        expires_at = expires_at.astimezone(UTC)
    if at.tzinfo is not UTC:
        at = at.astimezone(UTC)
    return Submission(
        _id_of(wire.source, job, at, key),
        at,
        wire.source,
        job,
        kind,
        wire.destination,
        payload,
        _encode(wire.headers) if wire.headers else None,
        limits.max_retries if wire.max_retries is None else int(wire.max_retries),
        wire.retry_policy,
        key,
        int(wire.priority) if wire.priority else None,
        wire.spread_seconds,
        expires_at,
    )


def require_topic(submission: Submission, topics: TopicRules) -> Submission:
    """The submission, if its events may be delivered there. Raises SubmissionError."""
    if fault := topics.fault(submission.delivery_type, submission.destination):
        raise SubmissionError([("destination", fault)])
    return submission


def submission_row(
    raw: bytes, limits: Limits, n: int, given_id: str | None = None, topics: TopicRules | None = None
) -> bytes:
    """The line of COPY text for a submission that came as a Kafka record; `given_id` is its EVENT_ID_HEADER.

    Raises as `parse_submission` does, with one rule, and SubmissionError when the event cannot have the id given.
    """
    submission = _one(raw, limits, 1)
    if topics is not None:
        require_topic(submission, topics)
    if given_id is not None:
        if fault := _given_id_fault(given_id, submission):
            raise SubmissionError([(EVENT_ID_HEADER, fault)])
        submission = msgspec.structs.replace(submission, id=given_id)
    return copy_row(submission, n)


def _given_id_fault(given_id: str, submission: Submission) -> str | None:
    if submission.external_job_id is not None:
        return "expected no such header on an event with an external_job_id: its id is computed"
    if _ID.fullmatch(given_id) is None or given_id[:13] != submission.id[:13]:
        expected = f"{submission.id[:13]}-7xxx-yxxx-xxxxxxxxxxxx, in lower case with y from 8 to b"
        return f"expected an id of the form {expected}, got {shown(given_id)!r}"
    return None


def encode_submission(s: Submission) -> bytes:
    """The JSON with which a client would submit this; it does not hold the id."""
    fields: dict[str, object] = {
        "source": s.source,
        "external_job_id": s.external_job_id,
        "scheduled_at": s.scheduled_at,
        "delivery_type": s.delivery_type,
        "destination": s.destination,
        "payload": msgspec.Raw(s.payload),
        "headers": None if s.headers is None else msgspec.Raw(s.headers),
        "max_retries": s.max_retries,
        "retry_policy": s.retry_policy,
        "ordering_key": s.ordering_key,
        "priority": s.priority,
        "spread_seconds": s.spread_seconds,
        "expires_at": s.expires_at,
    }
    return _encode({name: value for name, value in fields.items() if value is not None})


def _json_error(text: bytes, error: msgspec.DecodeError) -> JsonError:
    reason = str(error).removeprefix("JSON is malformed: ")
    found = _POSITION.search(reason)
    if found:
        return JsonError(f"expected JSON, got {reason[: found.start()]}", int(found[1]))
    return JsonError("expected JSON, got a text that ends early", len(text))


def _refuse(text: bytes | msgspec.Raw, limits: Limits, most_faults: int) -> NoReturn:
    # The decoder looks at every occurrence of a field, the list of faults at the last one.
    faults = faults_of(bytes(text), limits, most_faults) or [("body", "expected each field once")]
    raise SubmissionError(faults) from None


def copy_row(s: Submission, n: int) -> bytes:
    """One line of COPY text, with its end: n, then the fields of the submission in their order."""
    headers = rb"\N" if s.headers is None else _escaped(s.headers)
    first = (
        f"{n}\t{s.id}\t{_time(s.scheduled_at)}\t{_escaped_text(s.source)}\t{_optional(s.external_job_id)}"
        f"\t{s.delivery_type}\t{_optional(s.destination)}\t"
    ).encode()
    priority = s.priority or r"\N"
    # Not str(): that of a small number has an exponent.
    spread = r"\N" if s.spread_seconds is None else f"{s.spread_seconds:.6f} seconds"
    expires_at = r"\N" if s.expires_at is None else _time(s.expires_at)
    last = (
        f"\t{s.max_retries}\t{_optional(s.retry_policy)}\t{_optional(s.ordering_key)}\t{priority}\t{spread}"
        f"\t{expires_at}\n"
    ).encode()
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
