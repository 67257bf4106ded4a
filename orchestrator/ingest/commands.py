"""A batch of commands from the processing topic: ``{"id": "…", "command": "cancel", "event_id": "…"}``.

A command names an event by its `event_id`, or all events of an `external_job_id`. It is carried out in the
transaction that moves the offset, and answered in the outbox. One that cannot be read is answered with the problem,
and kept as a reject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from orchestrator.database.ingestion import Ingestion, Move, Reject
from orchestrator.errors import ValidationError
from orchestrator.event_rules import shown
from orchestrator.ingest.partition import Record
from orchestrator.ingest.submissions import reject
from orchestrator.json_text import has_forbidden_escape, utf8_fault
from orchestrator.metrics import Metrics

COMMANDS = ("cancel", "redrive")
_MAX_RECORDS = 500
_MAX_BYTES = 1 << 20

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    command: str
    id: _Id | None = None
    event_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")] | None = (
        None
    )
    external_job_id: _Id | None = None


class _Identified(msgspec.Struct):
    """What can still be answered of a command that is wrong: its id."""

    id: _Id | None = None


_decode = msgspec.json.Decoder(_Command).decode
_decode_id = msgspec.json.Decoder(_Identified).decode


class Commands:
    """Up to 500 records, in order."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._items: list[dict[str, object]] = []
        self._records: list[Record] = []
        self._rejects: list[Reject] = []
        self.size_bytes = 0

    @property
    def full(self) -> bool:
        return len(self._items) >= _MAX_RECORDS or self.size_bytes >= _MAX_BYTES

    def add(self, records: Sequence[Record]) -> None:
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
    if utf8_fault(value) is not None:
        raise ValidationError("body", "expected JSON in UTF-8")
    try:
        command = _decode(value)
    except msgspec.ValidationError as error:
        raise ValidationError("body", str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValidationError("body", f"expected JSON, got {shown(value)!r}: {error}") from None
    if has_forbidden_escape(value):
        raise ValidationError("body", r"expected no \u0000 in strings")
    if command.command not in COMMANDS:
        expected = " or ".join(COMMANDS)
        raise ValidationError("command", f"expected {expected}, got {shown(command.command)!r}: unknown command")
    if (command.event_id is None) == (command.external_job_id is None):
        raise ValidationError("event_id", "expected either event_id or external_job_id")
    return {name: field for name, field in msgspec.structs.asdict(command).items() if field is not None}


def _id_of(value: bytes | None) -> str | None:
    try:
        found = _decode_id(value or b"").id
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return None if found is None or "\x00" in found else found
