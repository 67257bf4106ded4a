"""Why a text is no submission, or no batch: every rule that it breaks, as (field, reason)."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence

import msgspec

from orchestrator.events.fields import FIELDS
from orchestrator.events.quoting import SHOWN_CHARS, kind_of, shown
from orchestrator.events.rules import MAX_FRAME_BYTES, DeliveryType, destination_fault, payload_fault
from orchestrator.events.submission import Limits
from orchestrator.events.times import ScheduledAt, expires_at_fault, with_usual_time

MAX_FAULTS = 20
_READ_BYTES = 1 << 16  # of unknown fields
_TIMES = ("scheduled_at", "expires_at")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_FIELDS = {field.name: field for field in FIELDS}
# Reads what is known of a submission, and skips over the rest without keeping it.
_decode_known = msgspec.json.Decoder(
    msgspec.defstruct("_Known", [(name, msgspec.Raw, None) for name in _FIELDS], kw_only=True)
).decode
_decode_only_known = msgspec.json.Decoder(
    msgspec.defstruct("_OnlyKnown", [(name, msgspec.Raw, None) for name in _FIELDS], forbid_unknown_fields=True)
).decode


class Envelope(msgspec.Struct):
    events: msgspec.Raw


_decode_envelope = msgspec.json.Decoder(Envelope).decode


def faults_of(text: bytes, limits: Limits, most: int = MAX_FAULTS) -> list[tuple[str, str]]:
    """The rules that a well-formed submission breaks, at most `most` of them, as (field, reason)."""
    try:
        fields = _known_fields(text)
    except msgspec.ValidationError:
        return [("body", f"expected a JSON object, got {kind_of(text)}")]
    return list(itertools.islice(_faults(text, fields, limits), most))


def _faults(text: bytes, fields: dict[str, msgspec.Raw], limits: Limits) -> Iterator[tuple[str, str]]:
    for field in FIELDS:
        if field.required and field.name not in fields:
            yield field.name, f"required: {field.expected}"
    if reason := _destination_fault(fields):
        yield "destination", reason
    if reason := _expiry_fault(fields):
        yield "expires_at", reason
    for name, raw in fields.items():
        if reason := _field_fault(name, raw, limits):
            yield name, reason
    for name in _unknown_names(text, fields):
        yield shown(name), _unknown_field(name, tuple(_FIELDS))


def _known_fields(text: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields that a submission may have, without the work that others would make. Raises DecodeError."""
    known = _decode_known(text)
    return {name: raw for name in _FIELDS if (raw := getattr(known, name)) is not None}


def _bytes_beside(text: bytes | msgspec.Raw, fields: dict[str, msgspec.Raw]) -> int:
    return len(memoryview(text)) - sum(len(memoryview(raw)) for raw in fields.values())


def _unknown_names(text: bytes, known: dict[str, msgspec.Raw]) -> Iterator[str]:
    """The names of unknown fields; the first one alone where there is much of them."""
    if _bytes_beside(text, known) <= _READ_BYTES:
        names = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        yield from (name for name in names if name not in _FIELDS)
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
    field = _FIELDS[name]
    if len(memoryview(raw)) > MAX_FRAME_BYTES:
        return f"expected {field.expected}, got {len(memoryview(raw))} bytes"
    try:
        value = msgspec.json.decode(raw, type=field.type)
    except msgspec.ValidationError:
        return f"expected {field.expected}, got {kind_of(raw) if field.secret else shown(raw)}"
    return field.fault(value) if field.fault and value is not None else None


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


def _unknown_field(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name[:SHOWN_CHARS], known, 1)
    return f"unknown field, did you mean {nearest[0]}?" if nearest else f"unknown field, not one of {', '.join(known)}"
