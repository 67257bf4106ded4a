"""Encoded rows on their way into the database: a binary COPY into the staging table, or direct submission.

Direct submission takes only what is new and keeps every rule; see sql/functions/24_direct_submission.sql.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import LiteralString

import psycopg
from psycopg import pq
from psycopg.adapt import Dumper

from orchestrator.database.connection import Connection
from orchestrator.events.encoding import COLUMNS, ID, MAX_RETRIES, NULL, SCHEDULED_AT, EncodedRow, Kind, Options

COPY_STAGED: LiteralString = f"copy pg_temp.submission (n, {', '.join(COLUMNS)}) from stdin (format binary)"
"""Takes `staged`."""
OPEN_DIRECT: LiteralString = "select timestamptz_send(orchestrator.open_direct())"
"""Returns the `created_at` for `copied`; null: the rows must be staged."""
COPY_EVENTS: LiteralString = f"copy orchestrator.event (created_at, {', '.join(COLUMNS)}) from stdin (format binary)"
"""Takes `copied`."""
SUBMIT_DIRECT: LiteralString = f"select orchestrator.submit_direct({', '.join(['%b'] * 12)})"
"""Takes `timers`."""

_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"
_WIDTH = (1 + len(COLUMNS)).to_bytes(2)
_TIME = b"\0\0\0\x08"
_NO_OPTIONS = Options(*[NULL] * 5)
_number = struct.Struct(">Ii").pack
_array_head = struct.Struct(">iiIii").pack
_OIDS = {"uuid": 2950, "timestamptz": 1184, "smallint": 21, "integer": 23, "text": 25, "interval": 1186}

_LEAST_DIRECT = 64  # rows; fewer are staged faster
_MOST_STAGED = 63  # batches after which direct submission is tried again


def staged(rows: Iterable[EncodedRow]) -> bytes:
    """The rows as COPY_STAGED takes them."""
    parts = [_BEGIN]
    for row in rows:
        fields = row.fields
        # There max_retries is an integer, so that a number too large is refused and not an error.
        parts += (_WIDTH, _number(4, row.n), fields[:32], b"\0\0\0\4\0\0", fields[36:])
    parts.append(_END)
    return b"".join(parts)


class Route:
    """Which way batches go. After a direct submission that failed, the next are staged: first one, then ever more."""

    def __init__(self) -> None:
        self._staged_next = 0
        self._staged_last = 0

    def is_direct(self, rows: Collection[EncodedRow]) -> bool:
        if len(rows) < _LEAST_DIRECT:
            return False
        if self._staged_next:
            self._staged_next -= 1
            return False
        return True

    def note(self, succeeded: bool) -> None:
        self._staged_last = 0 if succeeded else min(2 * self._staged_last + 1, _MOST_STAGED)
        self._staged_next = self._staged_last


async def submit_direct(connection: Connection, rows: Iterable[EncodedRow]) -> bool:
    """Submits new events in the transaction under way. False, or IntegrityError or DataError: they must be staged."""
    async with connection.cursor() as cursor:
        await cursor.execute(OPEN_DIRECT)
        [created_at] = await cursor.fetchone() or (None,)
        if created_at is None:
            return False
        in_order = ordered(rows)
        async with cursor.copy(COPY_EVENTS) as copy:
            await copy.write(copied(in_order, created_at))
        await cursor.execute(SUBMIT_DIRECT, timers(in_order))
    return True


def ordered(rows: Iterable[EncodedRow]) -> list[EncodedRow]:
    """By id: two batches insert the events they share in one order, so that they cannot deadlock."""
    return sorted(rows, key=attrgetter("fields"))


def copied(rows: Iterable[EncodedRow], created_at: bytes) -> bytes:
    parts = [_BEGIN, *[row.fields for row in rows]]
    parts[-1] += _END
    return (_WIDTH + _TIME + created_at).join(parts)  # copied once: a batch may be megabytes long


def timers(rows: Sequence[EncodedRow]) -> list[_Binary | None]:
    """What the timers of the events need."""
    numbers: dict[Kind, bytes] = {}
    kinds = []
    for row in rows:
        number = numbers.get(row.kind)
        if number is None:
            number = numbers[row.kind] = _number(4, len(numbers) + 1)
        kinds.append(number)
    fields = [row.fields for row in rows]
    return [
        _array("uuid", [each[ID] for each in fields]),
        _array("timestamptz", [each[SCHEDULED_AT] for each in fields]),
        _array("smallint", [each[MAX_RETRIES] for each in fields]),
        _array("integer", kinds),
        *(_array("text", column) for column in zip(*numbers, strict=True)),
        *_optional([row.options for row in rows]),
    ]


def _optional(options: Sequence[Options | None]) -> list[_Binary | None]:
    if not any(options):
        return [None] * 5
    policies = {each.retry_policy for each in options if each} - {NULL}
    _, *columns = zip(*(each or _NO_OPTIONS for each in options), strict=True)
    kinds = ("text", "smallint", "interval", "timestamptz")
    return [_array("text", policies), *map(_array, kinds, columns)]


class _Binary(bytes):
    """An argument as the server receives it; its type is that of the parameter."""


class _BinaryDumper(Dumper):
    format = pq.Format.BINARY

    def dump(self, obj: bytes) -> bytes:
        return obj


psycopg.adapters.register_dumper(_Binary, _BinaryDumper)


def _array(kind: str, elements: Collection[bytes]) -> _Binary:
    return _Binary(_array_head(1, 1, _OIDS[kind], len(elements), 1) + b"".join(elements))
