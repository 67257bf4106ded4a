"""Encoded rows on their way into the database, three ways: the staging table, direct submission, and one call.

Direct submission takes only what is new and keeps every rule; see sql/functions/24_direct_submission.sql. The call is
for small batches; see sql/functions/29_small_batches.sql.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import LiteralString

from psycopg.rows import TupleRow

from orchestrator.database.binary import Binary, array
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
SUBMIT_BATCH: LiteralString = (
    "select n, id::text, result, field, reason, status from orchestrator.submit_batch("
    "%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b)"
)
"""Takes `arrays`."""

_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"
_WIDTH = (1 + len(COLUMNS)).to_bytes(2)
_TIME = b"\0\0\0\x08"
_NO_OPTIONS = Options(*[NULL] * 5)
_number = struct.Struct(">Ii").pack
_size = struct.Struct(">i").unpack_from

_FOLLOWED = ("json", "text", "text")  # headers, correlation_id and traceparent
_OPTIONS = ("text", "text", "smallint", "interval", "timestamptz")
_PLAIN = (len(_FOLLOWED) + len(_OPTIONS)) * NULL  # no field of UTF-8 ends so

_MOST_SMALL, _MOST_SMALL_BYTES = 1000, 1 << 22  # more go faster by COPY, and need less memory
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


def is_small(rows: Collection[EncodedRow]) -> bool:
    """Whether `submit_batch` is the way for them."""
    return len(rows) <= _MOST_SMALL and sum(len(row.fields) for row in rows) <= _MOST_SMALL_BYTES


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


async def submit_batch(connection: Connection, rows: Iterable[EncodedRow]) -> list[TupleRow]:
    """Submits a small batch in the transaction under way; returns what try_submit_staged_with_status() does."""
    in_order = by_id(rows)
    answers = await (await connection.execute(SUBMIT_BATCH, arrays(in_order))).fetchall()
    return [(in_order[place - 1].n, *answer) for place, *answer in answers]


def by_id(rows: Iterable[EncodedRow]) -> list[EncodedRow]:
    """As `ordered`, but copies of one event stay in their order: the first is the one that is kept."""
    return sorted(rows, key=lambda row: row.fields[ID])


def ordered(rows: Iterable[EncodedRow]) -> list[EncodedRow]:
    """By id: two batches insert the events they share in one order, so that they cannot deadlock."""
    return sorted(rows, key=attrgetter("fields"))


def copied(rows: Iterable[EncodedRow], created_at: bytes) -> bytes:
    parts = [_BEGIN, *[row.fields for row in rows]]
    parts[-1] += _END
    return (_WIDTH + _TIME + created_at).join(parts)  # copied once: a batch may be megabytes long


def timers(rows: Sequence[EncodedRow]) -> list[Binary | None]:
    """What the timers of the events need."""
    policies, *others = _options_of(rows)
    named = policies if policies is None else {*policies} - {NULL}
    return [*_heads(rows), *_arrays(_OPTIONS, [named, *others])]


def arrays(rows: Sequence[EncodedRow]) -> list[Binary | None]:
    jobs, payloads, ends = [], [], []
    for row in rows:
        fields = row.fields
        source, delivery_type, destination = row.kind
        start = MAX_RETRIES.stop + len(source) + len(delivery_type) + len(destination)
        middle = _end(fields, start)
        end = _end(fields, middle)
        jobs.append(fields[start:middle])
        payloads.append(fields[middle:end])
        ends.append(end)
    return [
        *_heads(rows),
        _array("text", jobs),
        _array("json", payloads),
        *_arrays(_FOLLOWED, _followed(rows, ends)),
        *_arrays(_OPTIONS, _options_of(rows)),
    ]


def _end(fields: bytes, start: int) -> int:
    """Where the field ends that starts there."""
    size: int = _size(fields, start)[0]
    return start + 4 + size if size > 0 else start + 4


def _followed(rows: Sequence[EncodedRow], starts: Sequence[int]) -> Sequence[Collection[bytes] | None]:
    """The columns of _FOLLOWED, which start there; None for each when no event has any."""
    if all(row.fields.endswith(_PLAIN) for row in rows):
        return [None] * len(_FOLLOWED)
    columns: tuple[list[bytes], ...] = ([], [], [])
    for row, end in zip(rows, starts, strict=True):
        for column in columns:
            start, end = end, _end(row.fields, end)
            column.append(row.fields[start:end])
    return columns


def _heads(rows: Sequence[EncodedRow]) -> list[Binary]:
    """Arrays of what each event has, up to its kind, and of the kinds."""
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
    ]


def _options_of(rows: Sequence[EncodedRow]) -> Sequence[Collection[bytes] | None]:
    """The columns of the options; None for each when no event has any."""
    if not any(row.options for row in rows):
        return [None] * len(_OPTIONS)
    return list(zip(*(row.options or _NO_OPTIONS for row in rows), strict=True))


def _arrays(kinds: Sequence[str], columns: Sequence[Collection[bytes] | None]) -> list[Binary | None]:
    return [None if column is None else _array(kind, column) for kind, column in zip(kinds, columns, strict=True)]


def _array(kind: str, elements: Collection[bytes]) -> Binary:
    return array(kind, len(elements), b"".join(elements), nulls=True)
