"""Encoded rows of a binary COPY: read back, and submitted directly."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from orchestrator.database.copying import (
    COPY_EVENTS,
    OPEN_DIRECT,
    SUBMIT_BATCH,
    SUBMIT_DIRECT,
    arrays,
    by_id,
    copied,
    ordered,
    timers,
)
from orchestrator.events.encoding import COLUMNS, EncodedRow, encode_row
from orchestrator.events.submission import Submission
from tests.support.sql_client import Client

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def fields_of(row: EncodedRow) -> dict[str, Any]:
    """The fields of a row by column; texts and JSON as bytes."""
    values: list[bytes | None] = []
    left = row.fields
    while left:
        [size] = struct.unpack_from(">i", left)
        values.append(None if size < 0 else left[4 : 4 + size])
        left = left[4 + max(0, size) :]
    return {name: _read(name, value) for name, value in zip(COLUMNS, values, strict=True)}


def _read(name: str, value: bytes | None) -> Any:
    if value is None:
        return None
    match name:
        case "id":
            return str(UUID(bytes=value))
        case "scheduled_at" | "expires_at":
            return _EPOCH + timedelta(microseconds=struct.unpack(">q", value)[0])
        case "max_retries" | "priority":
            return struct.unpack(">h", value)[0]
        case "spread":
            micros, days, months = struct.unpack(">qii", value)
            assert (days, months) == (0, 0)
            return timedelta(microseconds=micros)
    return value


def submit_directly(client: Client, submissions: Sequence[Submission]) -> None:
    """Opens a direct submission, copies the events, and makes their timers, in the transaction under way."""
    copy_events(client, submissions)
    make_timers(client, submissions)


def copy_events(client: Client, submissions: Sequence[Submission]) -> None:
    """What comes before the last call; raises AssertionError when they are to be staged."""
    created_at = client.value(OPEN_DIRECT)
    assert created_at is not None
    with client.connection.cursor().copy(COPY_EVENTS) as copy:
        copy.write(copied(_rows(submissions), created_at))


def make_timers(client: Client, submissions: Sequence[Submission]) -> None:
    client.connection.execute(SUBMIT_DIRECT, timers(_rows(submissions)))


def submit_in_one_call(client: Client, submissions: Sequence[Submission]) -> dict[int, tuple[str, str | None]]:
    """submit_batch(); what is answered: n to (result, field)."""
    rows = by_id(encode_row(each, n) for n, each in enumerate(submissions))
    answers = client.connection.execute(SUBMIT_BATCH, arrays(rows)).fetchall()
    return {rows[place - 1].n: (result, field) for place, _, result, field, _, _ in answers}


def _rows(submissions: Sequence[Submission]) -> list[EncodedRow]:
    return ordered(encode_row(each, n) for n, each in enumerate(submissions))
