"""A batch of commands from the processing topic: ``{"id": "…", "command": "cancel", "event_id": "…"}``.

A command names an event by its `event_id`, or all events of an `external_job_id`; a reschedule, which has times as
well, the only live one. It is carried out in the transaction that moves the offset, and answered in the outbox. One
that cannot be read is answered with the problem, and kept as a reject.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

import msgspec

from orchestrator.database.ingestion import Ingestion, Move, Reject
from orchestrator.errors import ValidationError
from orchestrator.events.json_text import has_forbidden_escape, utf8_fault
from orchestrator.events.quoting import kind_of, shown
from orchestrator.events.times import EXPECTED_TIME, expires_at_fault, in_utc, scheduled_at_fault, time_of
from orchestrator.ingest.partition import ConsumedRecord
from orchestrator.ingest.submissions import reject
from orchestrator.metrics import Metrics

COMMANDS = ("cancel", "redrive", "reschedule")
_TIMES = ("scheduled_at", "expires_at")
_FIELDS = ("id", "command", "event_id", "external_job_id", *_TIMES)
_MAX_CHARS = 200
_MAX_RECORDS = 500
_BATCH_BYTES = 1 << 20
MAX_BYTES = 1 << 16
"""Longest command that is read."""

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_decode = msgspec.json.Decoder(dict[str, object]).decode


class Commands:
    """Up to 500 records, in order."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._items: list[dict[str, object]] = []
        self._records: list[ConsumedRecord] = []
        self._rejects: list[Reject] = []
        self.size_bytes = 0

    @property
    def full(self) -> bool:
        return len(self._items) >= _MAX_RECORDS or self.size_bytes >= _BATCH_BYTES

    def add(self, records: Sequence[ConsumedRecord]) -> None:
        """Reads records; what is wrong with one becomes its answer and its reject."""
        for record in records:
            item: dict[str, object] = {"partition": record.partition, "offset": record.offset}
            try:
                item |= read_command(record.value)
            except ValidationError as error:
                item |= {
                    "id": _id_of(record.value),
                    "problem": {"field": error.field, "reason": error.reason.replace("\x00", "")},
                }
                self._rejects.append(reject(record, error.field, error.reason))
            self._records.append(record)
            self._items.append(item)
            self.size_bytes += len(record.value or b"")

    async def write(self, database: Ingestion, topic: str, moves: Sequence[Move]) -> None:
        """Carries everything out in one transaction."""
        done = await database.execute(
            topic,
            moves,
            self._items,
            self._rejects,
            lambda n, field, reason: reject(self._records[n], field, reason),
        )
        self._metrics.commands_total("executed").inc(done.accepted)
        self._metrics.commands_total("rejected").inc(len(self._rejects) + done.refused)


def read_command(value: bytes | None) -> dict[str, object]:
    """The fields of a command that are set. Raises ValidationError."""
    if value is None:
        raise ValidationError("body", "expected a command, got a record without a value")
    if len(value) > MAX_BYTES:
        raise ValidationError("body", f"expected a command of at most {MAX_BYTES} bytes, got {len(value)}")
    if utf8_fault(value) is not None:
        raise ValidationError("body", "expected JSON in UTF-8")
    try:
        given = _decode(value)
    except msgspec.ValidationError:
        raise ValidationError("body", f"expected a JSON object, got {kind_of(value)}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValidationError("body", f"expected a JSON object, got what is none: {error}") from None
    if has_forbidden_escape(value):
        raise ValidationError("body", r"expected no \u0000 in strings")
    command = {name: field for name, field in given.items() if field is not None}
    for name, field in command.items():
        if name not in _FIELDS:
            raise ValidationError(shown(name), f"unknown field; expected {', '.join(_FIELDS)}")
        if not isinstance(field, str) or not 1 <= len(field) <= _MAX_CHARS:
            raise ValidationError(name, f"expected a string of 1 to {_MAX_CHARS} characters, got {shown(field)!r}")
    if command.get("command") not in COMMANDS:
        expected = f"{', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}"
        raise ValidationError("command", f"expected {expected}, got {shown(command.get('command', 'none'))!r}")
    if ("event_id" in command) == ("external_job_id" in command):
        raise ValidationError("event_id", "expected either event_id or external_job_id")
    if "event_id" in command and not _UUID.fullmatch(str(command["event_id"])):
        raise ValidationError("event_id", f"expected a UUID, got {shown(command['event_id'])!r}")
    return command | _times(command)


def _times(command: dict[str, object]) -> dict[str, object]:
    """The times of a reschedule in a form that every reader takes; a command of another kind has none."""
    given = {name: command[name] for name in _TIMES if name in command}
    if command["command"] != "reschedule":
        for name, text in given.items():
            raise ValidationError(name, f"expected with the command reschedule alone, got {shown(text)!r}")
        return {}
    if "scheduled_at" not in given:
        raise ValidationError("scheduled_at", f"required by reschedule: {EXPECTED_TIME}")
    times = {name: _time(name, text) for name, text in given.items()}
    if "expires_at" in times and (fault := expires_at_fault(times["expires_at"], times["scheduled_at"])):
        raise ValidationError("expires_at", fault)
    return {name: in_utc(at).isoformat() for name, at in times.items()}


def _time(name: str, text: object) -> datetime:
    try:
        at = time_of(text)
    except ValueError:
        raise ValidationError(name, f"expected {EXPECTED_TIME}, got {shown(text)!r}") from None
    if fault := scheduled_at_fault(at):
        raise ValidationError(name, fault)
    return at


def _id_of(value: bytes | None) -> str | None:
    """What can still be answered of a command that is wrong: its id."""
    if value is None or len(value) > MAX_BYTES:
        return None
    try:
        found = _decode(value).get("id")
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return found if isinstance(found, str) and len(found) <= _MAX_CHARS and "\x00" not in found else None
