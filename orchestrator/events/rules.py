"""What each field of a submission may hold, and what to tell a client whose submission breaks a rule."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import msgspec

from orchestrator.errors import ValidationError
from orchestrator.events.json_text import MAX_DEPTH, NUL_ESCAPE, deeper_than, has_forbidden_escape
from orchestrator.events.urls import url_fault

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
MAX_NAME_CHARS = 200
MAX_HEADERS = 20
MAX_HEADER_CHARS = 4096
MAX_RETRIES = 100
MAX_PRIORITY = 9
MIN_SPREAD_S = 0.000001
MAX_SPREAD_S = 604_800
HEADER_NAME_PATTERN = "^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$"
HEADER_VALUE_PATTERN = r"^[^\x00-\x08\x0a-\x1f\x7f]*$"
RETRY_POLICY_PATTERN = "^[a-z0-9_-]{1,63}$"
# Kafka's own rule, of org.apache.kafka.common.internals.Topic: "." and ".." would be directories.
TOPIC_PATTERN = r"^(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}$"
EXPECTED_TIME = "an RFC 3339 time with a zone, such as 2026-01-31T09:00:00Z"
SHOWN_CHARS = 80
_READ_BYTES = 1 << 16
_LOOKED_AT_CHARS = 1000
MAX_FAULTS = 20
MAX_FRAME_BYTES = 1 << 20
"""Most that an event may take beside its payload; what all other fields can hold, every character escaped, is less."""

# What is set on delivery, or would change what HTTP itself does with the request: how it is framed, which way it goes.
# The one list: of the API, of the dispatcher, and of SQL's check_headers(), which a test compares with it.
RESERVED_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "expect", "host", "http2-settings"}
    | {"keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "user-agent"}
)
RESERVED_HEADER_PREFIXES = ("orchestrator-", "proxy-", "webhook-")

_HEADER_NAME = re.compile(HEADER_NAME_PATTERN)
_HEADER_VALUE = re.compile(HEADER_VALUE_PATTERN, re.DOTALL)
_TOPIC = re.compile(TOPIC_PATTERN)
_LOGIN = re.compile(r"[^\s:/@]*:[^\s@]*@")
_LIKE_A_URL = re.compile("[:/@?=]")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_SHORT_TIME = re.compile(
    r"([0-9-]{10}[Tt ][0-9]{2}:[0-9]{2})(:[0-9]{2}(?:\.[0-9]+)?)?([Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)"
)
_TIMES = ("scheduled_at", "expires_at")
DOTS = (".", "..")

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
ScheduledAt = Annotated[datetime, msgspec.Meta(tz=True)]
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


class Wire(msgspec.Struct, forbid_unknown_fields=True):
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


_KINDS = {b"{": "an object", b"[": "an array", b'"': "a string", b"t": "true", b"f": "false", b"n": "null"}


def shown(value: object) -> str:
    """A value as it is quoted in a message: never longer than a line, and nothing that may hold a secret.

    A text of bytes is JSON. Of URLs, and of arrays and objects with strings, it only says what they are.
    """
    if isinstance(value, (bytes, msgspec.Raw)):
        return _shown_json(bytes(value))
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = str(value).encode(errors="backslashreplace").decode()  # a path that is not UTF-8 holds lone surrogates
    return _shortened(text, f"{len(text)} characters")


def kind_of(text: bytes | msgspec.Raw) -> str:
    """What kind of value a JSON text is, for messages that must not quote it."""
    first = bytes(memoryview(text)[:64]).lstrip(b" \t\r\n")[:1]
    return _KINDS.get(first, "a number")


def _shown_json(text: bytes) -> str:
    if (kind := kind_of(text)) in ("an object", "an array") and b'"' in text:
        return kind
    if len(text) > 8 * SHOWN_CHARS:
        return _shortened(text[: 8 * SHOWN_CHARS].decode(errors="replace"), f"{len(text)} bytes")
    whole = text.decode(errors="replace")
    return _shortened(whole, f"{len(whole)} characters")


def _shortened(text: str, size: str) -> str:
    scheme, separator, rest = text.partition("://")
    if (separator and rest) or _LOGIN.search(text[:_LOOKED_AT_CHARS]):
        return f"{scheme[-SHOWN_CHARS:]}://… ({size})" if separator else f"… ({size})"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({size})"


def size_fault(text: bytes | msgspec.Raw, limits: Limits) -> str | None:
    """Why a text is too long for an event: so that nobody reads, or explains, what cannot be one."""
    size, most = len(memoryview(text)), limits.max_payload_bytes + MAX_FRAME_BYTES
    if size <= most:
        return None
    return f"expected at most {most} bytes for an event, {limits.max_payload_bytes} of them payload, got {size}"


def usual_time(text: str) -> str:
    """A time without seconds, or with an offset of hours alone, with both; any other text as it is.

    Clients of PostgreSQL write times so. SQL's twin of what is read in the end is orchestrator.as_time().
    """
    found = _SHORT_TIME.fullmatch(text)
    if found is None:
        return text
    minute, second, zone = found.groups()
    return f"{minute}{second or ':00'}{zone}{':00' if len(zone) == 3 else ''}"


def time_of(text: object) -> datetime:
    """The time that an RFC 3339 text with a zone names, rounded to the microsecond. Raises ValueError."""
    return msgspec.convert(usual_time(text) if isinstance(text, str) else text, ScheduledAt)


def with_usual_time(raw: bytes | msgspec.Raw) -> bytes:
    """`usual_time` of a JSON value; one that is no string stays as it is."""
    try:
        text = msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        return bytes(raw)
    usual = usual_time(text)
    return bytes(raw) if usual == text else msgspec.json.encode(usual)


def with_usual_times(text: bytes | msgspec.Raw) -> bytes:
    """A submission with its times as `usual_time` has them; one that is no JSON object stays as it is."""
    try:
        known = _known_fields(text)
    except msgspec.DecodeError:
        return bytes(text)
    usual = {name: msgspec.Raw(with_usual_time(known[name])) for name in _TIMES if name in known}
    if all(usual[name] == known[name] for name in usual) or _bytes_beside(text, known) > _READ_BYTES:
        return bytes(text)
    return msgspec.json.encode(msgspec.json.decode(text, type=dict[str, msgspec.Raw]) | usual)


def scheduled_at_fault(at: datetime) -> str | None:
    if EARLIEST <= at <= LATEST:
        return None
    return f"expected a time from 1970 to 2200, got {at.isoformat()}"


def in_utc(at: datetime) -> datetime:
    """The same time without its zone, which may be one that PostgreSQL does not know; at the ends of time, about."""
    try:
        return at.astimezone(UTC)
    except OverflowError:
        return EARLIEST if at.year == 1 else LATEST


def expires_at_fault(expires_at: datetime, scheduled_at: datetime) -> str | None:
    if expires_at > scheduled_at:
        return scheduled_at_fault(expires_at)
    return f"expected a time after scheduled_at, {scheduled_at.isoformat()}, got {expires_at.isoformat()}"


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
        return None if destination is None else _topic_fault(destination)
    if destination is None:
        return "required: an http or https URL; only events of delivery_type KAFKA may leave it out"
    fault = url_fault(destination)
    if fault and _topic_fault(destination) is None:
        return f"{fault}; for a Kafka topic set delivery_type to KAFKA"
    return fault


@lru_cache(maxsize=8192)
def _topic_fault(topic: str) -> str | None:
    if _TOPIC.match(topic) and topic[-1] != "\n":
        return None
    # What looks like a URL is not quoted: it may hold a password.
    got = "a URL: for HTTP set delivery_type to HTTP" if _LIKE_A_URL.search(topic) else repr(shown(topic))
    return f"expected a topic of 1 to 249 characters from a-z, A-Z, 0-9, ., _ and -, got {got}"


def payload_fault(payload: bytes, limits: Limits) -> str | None:
    if len(payload) > limits.max_payload_bytes:
        return f"expected at most {limits.max_payload_bytes} bytes of JSON, got {len(payload)}"
    if deeper_than(payload):
        return f"expected at most {MAX_DEPTH} levels of nesting"
    # find() takes half as long as "in" does.
    if payload.find(NUL_ESCAPE) >= 0 and has_forbidden_escape(payload):
        return r"expected no \u0000 and no lone surrogate in strings: PostgreSQL cannot read them"
    return None


def is_reserved(name: str) -> bool:
    """Whether a header, given in lower case, is not the client's to set."""
    return name in RESERVED_HEADERS or name.startswith(RESERVED_HEADER_PREFIXES)


def headers_fault(headers: dict[str, str]) -> str | None:
    if len(headers) > MAX_HEADERS:
        return f"expected at most {MAX_HEADERS} headers, got {len(headers)}"
    if len({name.lower() for name in headers}) < len(headers):
        return "expected each header once: names differ in more than case"
    for name, value in headers.items():
        if _HEADER_NAME.match(name) is None or name[-1] == "\n":
            return f"expected a header name of 1 to 100 token characters, got {shown(repr(before_colon(name)))}"
        if is_reserved(lowered := name.lower()):
            return f"expected no {lowered} header: it is set on delivery"
        if len(value) > MAX_HEADER_CHARS or _HEADER_VALUE.match(value) is None or value[-1:] == "\n":
            return f"expected at most {MAX_HEADER_CHARS} characters, none of them control, in {name}"
    return None


def before_colon(name: str) -> str:
    """What is no header name may be a whole header, of which this is the name."""
    before, colon, _ = name.partition(":")
    return before + (colon and "…")


def priority_fault(priority: float) -> str | None:
    if -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        return None
    return f"expected -{MAX_PRIORITY} to {MAX_PRIORITY}, got {shown(priority)}"


_EXPECTED: dict[str, tuple[Any, str]] = {
    "source": (Name, f"a string of 1 to {MAX_NAME_CHARS} characters"),
    "scheduled_at": (ScheduledAt, EXPECTED_TIME),
    "destination": (str | None, "a URL, or the name of a Kafka topic"),
    "payload": (msgspec.Raw, "a JSON value"),
    "external_job_id": (Name | None, f"a string of 1 to {MAX_NAME_CHARS} characters, or null"),
    "delivery_type": (DeliveryType | None, "HTTP or KAFKA"),
    "headers": (dict[str, str] | None, "an object of strings, or null"),
    "max_retries": (Retries | None, f"a whole number from 0 to {MAX_RETRIES}, or null"),
    "retry_policy": (RetryPolicy | None, "a name of 1 to 63 characters from a-z, 0-9, _ and -, or null"),
    "ordering_key": (Name | None, f"a string of 1 to {MAX_NAME_CHARS} characters, or null"),
    "priority": (WholeNumber | None, f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"),
    "spread_seconds": (SpreadSeconds | None, f"more than 0 and at most {MAX_SPREAD_S} seconds"),
    "expires_at": (ScheduledAt | None, f"{EXPECTED_TIME}, or null"),
}
_REQUIRED = ("source", "scheduled_at", "payload")
_CREDENTIALS = frozenset({"destination", "headers"})  # what they hold is never quoted
_FAULTS: dict[str, Callable[[Any], str | None]] = {
    "source": text_fault,
    "scheduled_at": scheduled_at_fault,
    "external_job_id": external_job_id_fault,
    "headers": headers_fault,
    "ordering_key": text_fault,
    "priority": priority_fault,
}


# Reads what is known of a submission, and skips over the rest without keeping it.
_decode_known = msgspec.json.Decoder(
    msgspec.defstruct("_Known", [(name, msgspec.Raw, None) for name in _EXPECTED], kw_only=True)
).decode
_decode_only_known = msgspec.json.Decoder(
    msgspec.defstruct("_OnlyKnown", [(name, msgspec.Raw, None) for name in _EXPECTED], forbid_unknown_fields=True)
).decode


def faults_of(text: bytes, limits: Limits, most: int = MAX_FAULTS) -> list[tuple[str, str]]:
    """The rules that a well-formed submission breaks, at most `most` of them, as (field, reason)."""
    try:
        fields = _known_fields(text)
    except msgspec.ValidationError:
        return [("body", f"expected a JSON object, got {kind_of(text)}")]
    return list(itertools.islice(_faults(text, fields, limits), most))


def _faults(text: bytes, fields: dict[str, msgspec.Raw], limits: Limits) -> Iterator[tuple[str, str]]:
    yield from ((name, f"required: {_EXPECTED[name][1]}") for name in _REQUIRED if name not in fields)
    if reason := _destination_fault(fields):
        yield "destination", reason
    if reason := _expiry_fault(fields):
        yield "expires_at", reason
    for name, raw in fields.items():
        if reason := _field_fault(name, raw, limits):
            yield name, reason
    for name in _unknown_names(text, fields):
        yield shown(name), _unknown_field(name, tuple(_EXPECTED))


def _known_fields(text: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields that a submission may have, without the work that others would make. Raises DecodeError."""
    known = _decode_known(text)
    return {name: raw for name in _EXPECTED if (raw := getattr(known, name)) is not None}


def _bytes_beside(text: bytes | msgspec.Raw, fields: dict[str, msgspec.Raw]) -> int:
    return len(memoryview(text)) - sum(len(memoryview(raw)) for raw in fields.values())


def _unknown_names(text: bytes, known: dict[str, msgspec.Raw]) -> Iterator[str]:
    """The names of unknown fields; the first one alone where there is much of them."""
    if _bytes_beside(text, known) <= _READ_BYTES:
        names = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        yield from (name for name in names if name not in _EXPECTED)
        return
    try:
        _decode_only_known(text)
    except msgspec.ValidationError as error:
        found = _UNKNOWN.match(str(error))
        yield found[1] if found else "body"


def _destination_fault(fields: dict[str, msgspec.Raw]) -> str | None:
    """What is wrong with a destination of the right type; nothing as long as the delivery_type is wrong."""
    try:
        kind = msgspec.json.decode(fields.get("delivery_type", b"null"), type=DeliveryType | None)
        destination = msgspec.json.decode(fields.get("destination", b"null"), type=str | None)
    except msgspec.ValidationError:
        return None
    return destination_fault(kind, destination)


def _expiry_fault(fields: dict[str, msgspec.Raw]) -> str | None:
    """What is wrong with an expiry of the right form; nothing as long as scheduled_at is wrong."""
    try:
        at = msgspec.json.decode(fields.get("scheduled_at", b"null"), type=ScheduledAt)
        expires_at = msgspec.json.decode(fields.get("expires_at", b"null"), type=ScheduledAt)
    except msgspec.ValidationError:
        return None
    return expires_at_fault(expires_at, at)


def _field_fault(name: str, raw: msgspec.Raw, limits: Limits) -> str | None:
    if name == "payload":
        return payload_fault(bytes(raw), limits)
    expected_type, expected = _EXPECTED[name]
    if len(memoryview(raw)) > MAX_FRAME_BYTES:
        return f"expected {expected}, got {len(memoryview(raw))} bytes"
    try:
        value = msgspec.json.decode(raw, type=expected_type)
    except msgspec.ValidationError:
        return f"expected {expected}, got {kind_of(raw) if name in _CREDENTIALS else shown(raw)}"
    check = _FAULTS.get(name)
    return check(value) if check and value is not None else None


class _Envelope(msgspec.Struct):
    events: msgspec.Raw


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def envelope_faults(text: bytes, limits: Limits, error: str) -> list[tuple[str, str]]:
    """Why a well-formed text is not ``{"events": [...]}``, as (field, reason); `error` is what its decoder said."""
    if " at most length " in error:
        return [("events", f"expected 1 to {limits.max_batch_events} events, got more")]
    if found := _UNKNOWN.match(error):
        return [(shown(found[1]), _unknown_field(found[1], ("events",)))]
    if "missing required field" in error:
        return [("events", "required: an array of events")]
    if error.endswith("`$.events`") or error.startswith("Expected `array`"):
        return [("events", f"expected an array, got {kind_of(_decode_envelope(text).events)}")]
    return [("body", f'expected a JSON object {{"events": […]}}, got {kind_of(text)}')]


def _unknown_field(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name[:SHOWN_CHARS], known, 1)
    return f"unknown field, did you mean {nearest[0]}?" if nearest else f"unknown field, not one of {', '.join(known)}"
