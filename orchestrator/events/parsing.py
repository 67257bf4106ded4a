"""Reads submissions: one, a batch, or a record of Kafka."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC
from functools import lru_cache
from typing import Any, NoReturn

import msgspec

from orchestrator.errors import ValidationError
from orchestrator.events.encoding import EncodedRow, encode_row
from orchestrator.events.faults import MAX_FAULTS, Envelope, envelope_faults, faults_of, with_usual_times
from orchestrator.events.headers import headers_fault
from orchestrator.events.ids import EVENT_ID_HEADER, bucket_of_key, event_id, given_id_fault, random_event_id
from orchestrator.events.json_text import MAX_DEPTH, pruned, utf8_fault, with_nul_for_surrogates
from orchestrator.events.rules import (
    DOTS,
    DeliveryType,
    Name,
    Priority,
    Retries,
    RetryPolicy,
    SpreadSeconds,
    destination_fault,
    payload_fault,
    size_fault,
)
from orchestrator.events.submission import JsonError, Limits, OutOfRangeError, Submission, SubmissionError
from orchestrator.events.times import EARLIEST, LATEST, ScheduledAt, expires_at_fault, scheduled_at_fault
from orchestrator.events.topics import TopicRules
from orchestrator.events.tracing import Carried, CorrelationId, Traceparent, in_version_00, trace_id, with_tracestate


class Wire(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A submission as clients write it. Null is the same as absent for every field that may be absent."""

    source: Name
    scheduled_at: ScheduledAt
    payload: msgspec.Raw
    external_job_id: Name | None = None
    delivery_type: DeliveryType | None = None
    destination: str | None = None
    headers: dict[str, str] | None = None
    max_retries: Retries | None = None
    retry_policy: RetryPolicy | None = None
    ordering_key: Name | None = None
    priority: Priority | None = None
    spread_seconds: SpreadSeconds | None = None
    expires_at: ScheduledAt | None = None
    correlation_id: CorrelationId | None = None
    traceparent: Traceparent | None = None


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[msgspec.Raw]


class _OnlyEvents(Envelope, forbid_unknown_fields=True):
    pass


_decode_envelope = msgspec.json.Decoder(_OnlyEvents).decode
_decode_wire = msgspec.json.Decoder(Wire).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_decode_any = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode
_POSITION = re.compile(r" \(byte (\d+)\)$")
_SHORT_BYTES = 1 << 18


def parse_submission(
    raw: bytes, limits: Limits, topics: TopicRules | None = None, carried: Carried | None = None
) -> Submission:
    """Reads one submission, of an event that `topics` lets go where it is to go; `carried` came in headers.

    Raises JsonError, or SubmissionError with the rules it breaks, at most 20.
    """
    return _one(raw, limits, topics, carried, MAX_FAULTS)


def submission_row(
    raw: bytes,
    limits: Limits,
    n: int,
    given_id: str | None = None,
    topics: TopicRules | None = None,
    carried: Carried | None = None,
    follow: Callable[[Submission], Submission] | None = None,
) -> EncodedRow:
    """The row of COPY for a submission that came as a Kafka record; `given_id` is its EVENT_ID_HEADER.

    `follow` puts the submission into the span that keeps it. Raises as `parse_submission` does, with one rule, and
    SubmissionError when the event cannot have the id given.
    """
    submission = _one(raw, limits, topics, carried, 1)
    if given_id is not None:
        if fault := given_id_fault(given_id, submission):
            raise SubmissionError([(EVENT_ID_HEADER, fault)])
        submission = msgspec.structs.replace(submission, id=given_id)
    if follow is not None:
        submission = follow(submission)
    return encode_row(submission, n)


def _one(
    raw: bytes, limits: Limits, topics: TopicRules | None, carried: Carried | None, most_faults: int
) -> Submission:
    if fault := size_fault(raw, limits):
        raise SubmissionError([("body", fault)])
    _require_utf8(raw)
    return _submission(raw, limits, topics, carried, most_faults)


def parse_batch(
    raw: bytes, limits: Limits, topics: TopicRules | None = None, carried: Carried | None = None
) -> list[Submission | ValidationError]:
    """Reads ``{"events": [...]}``: a submission or its error, with the first rule it breaks, for each item, in order.

    Raises JsonError or SubmissionError when the envelope itself is wrong.
    """
    return [item for item in batch_items(raw, limits, topics, carried) if item is not None]


def batch_items(
    raw: bytes, limits: Limits, topics: TopicRules | None = None, carried: Carried | None = None
) -> Iterator[Submission | ValidationError | None]:
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
            yield _submission(item, limits, topics, carried, 1)
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


def _submission(
    text: bytes | msgspec.Raw, limits: Limits, topics: TopicRules | None, carried: Carried | None, most_faults: int
) -> Submission:
    try:
        return _valid(text, limits, topics, carried, most_faults)
    except (RecursionError, msgspec.DecodeError):
        readable = with_usual_times(_at_once(_readable(bytes(text))))
    try:
        return _valid(readable, limits, topics, carried, most_faults)
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


def _valid(
    text: bytes | msgspec.Raw, limits: Limits, topics: TopicRules | None, carried: Carried | None, most_faults: int
) -> Submission:
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
    headers, correlation_id, traceparent = wire.headers, wire.correlation_id, wire.traceparent
    if traceparent is not None:
        traceparent = in_version_00(traceparent)
    if carried is not None:
        correlation_id = correlation_id or carried.correlation_id
        if traceparent is None:
            traceparent = carried.traceparent
            if carried.tracestate is not None:
                headers = with_tracestate(headers, carried.tracestate)
    if correlation_id is None and traceparent is not None:
        correlation_id = trace_id(traceparent)
    if kind != "HTTP" and topics is not None and (fault := topics.fault(kind, wire.destination)):
        raise SubmissionError([("destination", fault)])
    return Submission(
        event_id(wire.source, job, at, key)
        if job is not None
        else random_event_id(at, None if key is None else bucket_of_key(key)),
        at,
        wire.source,
        job,
        kind,
        wire.destination,
        payload,
        _encode(headers) if headers else None,
        limits.max_retries if wire.max_retries is None else int(wire.max_retries),
        wire.retry_policy,
        key,
        int(wire.priority) if wire.priority else None,
        wire.spread_seconds,
        expires_at,
        correlation_id,
        traceparent,
    )


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
