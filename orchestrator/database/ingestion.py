"""An ingester's view of the database: one connection for each consumer, one transaction for each batch.

The transaction first moves the offsets by compare-and-set. This serialises all consumers of a partition, also one that
was thought dead, and joins the batch and its offsets: both are kept, or neither.

A record that would wait for another session's open transaction, such as one that has kept the same id and not
committed, must not stop its partition. It is set aside in the same transaction, and kept once the other has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, LiteralString, NamedTuple, TypeVar

import msgspec
from psycopg import errors

from orchestrator.database.connection import HOLDERS, Connection, connect, translated
from orchestrator.database.copying import COPY_STAGED, Route, staged, submit_direct
from orchestrator.errors import Blocked, OrchestratorError, ValidationError, first_line
from orchestrator.events.encoding import EncodedRow
from orchestrator.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

_APART_S = 2.0  # for finding out which items of a batch are blocked

_log = logging.getLogger(__name__)


class Position(NamedTuple):
    """How far a partition has been read; the anchor is the offset and the hash of the last record read."""

    next_offset: int
    anchor_offset: int | None
    anchor_hash: int | None


class Move(NamedTuple):
    """A partition's step from offset `expected` to `next_offset`; None: it has not been begun."""

    partition: int
    expected: int | None
    next_offset: int
    anchor_offset: int | None
    anchor_hash: int | None


class Reject(NamedTuple):
    """A record that cannot be kept, unchanged, with the reason."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    field: str
    reason: str


class Kept(NamedTuple):
    """How many events of a batch were new, were kept before, or broke a rule that only the database knows.

    The others were set aside until another session's open transaction ends.
    """

    accepted: int
    duplicates: int
    refused: int


Refused = tuple[int, str, str]
"""Number of an item, and the field and reason of its refusal."""
Rejected = Callable[[int, str, str], Reject]
"""Makes the reject of an item that was refused."""


class OffsetsMovedError(OrchestratorError):
    """The offsets are not the expected ones: another consumer has moved them. Nothing was kept."""

    def __init__(self, stand_at: Mapping[int, int]) -> None:
        self.stand_at = dict(stand_at)
        super().__init__(f"another consumer has moved the offsets: {self.stand_at}")


class Ingestion:
    """One connection. Methods raise DatabaseUnavailable when it is lost; a batch under way may have been kept."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._apart_until_s = 0.0  # until when bisecting may take; 0: the batch is not being bisected for blocked items
        self._blocked: list[int] = []
        self._route = Route()
        self.has_aside = True
        """Whether there may be records that this connection, or one before it, has set aside."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncGenerator[Ingestion, None]:
        async with await connect(settings, "ingest", **_SESSION) as connection:
            if not connection.pooled:
                with translated():
                    await connection.execute("select orchestrator.open_staging()")
            yield cls(connection)

    async def positions(self, topic: str) -> dict[int, Position]:
        """The position of each partition; those without an entry have not been begun."""
        rows = await self._all("select * from orchestrator.ingest_offsets(%s)", topic)
        return {row[0]: Position(*row[1:]) for row in rows}

    async def submit(
        self,
        topic: str,
        moves: Sequence[Move],
        rows: Sequence[EncodedRow],
        rejects: Sequence[Reject],
        rejected: Rejected,
    ) -> Kept:
        """Keeps `rows`, numbered from 0, and the rejects.

        A row that the database refuses becomes the reject that `rejected` makes of it. Raises OffsetsMovedError.
        """
        async with self._transaction(topic, moves):
            answers, refused = await self._apart(rows, self._submit)
            duplicates = sum(count for count, _ in answers)
            refused += [each for _, some in answers for each in some]
            await self._keep_rejects(topic, [*rejects, *(rejected(*each) for each in refused)])
            aside, self._blocked = self._blocked, []
            if aside:
                await self._set_aside(topic, [rows[n] for n in aside], [rejected(n, "id", "") for n in aside])
        self.has_aside |= bool(aside)
        return Kept(len(rows) - duplicates - len(refused) - len(aside), duplicates, len(refused))

    async def keep_aside(self) -> None:
        """Keeps the records set aside that no other session holds up any more."""
        [(_, left)] = await self._all("select kept, waiting from orchestrator.submit_set_aside()")
        self.has_aside = left > 0

    async def execute(
        self,
        topic: str,
        moves: Sequence[Move],
        commands: Sequence[Mapping[str, object]],
        rejects: Sequence[Reject],
        rejected: Rejected,
    ) -> Kept:
        """Carries out commands, in order, and answers each in the outbox; else as `submit`."""

        async def execute(items: Sequence[Mapping[str, object]]) -> None:
            document = msgspec.json.encode(items).decode()
            await self._all("select orchestrator.execute_commands(%s, %s::jsonb)", topic, document)

        async with self._transaction(topic, moves):
            await self._all(_COMMAND_PATIENCE)
            _, refused = await self._apart(commands, execute)
            refused += [(n, "event_id", _HELD) for n in self._blocked]
            for n, field, reason in refused:
                await execute([{**commands[n], "problem": {"field": field, "reason": _storable(reason)}}])
            await self._keep_rejects(topic, [*rejects, *(rejected(*each) for each in refused)])
        return Kept(len(commands) - len(rejects) - len(refused), 0, len(refused))

    @asynccontextmanager
    async def _transaction(self, topic: str, moves: Sequence[Move]) -> AsyncGenerator[None, None]:
        columns = [list(column) for column in zip(*sorted(moves), strict=True)] or [[]] * 5
        with translated():
            async with self._connection.transaction():
                self._apart_until_s, self._blocked = 0.0, []
                moved = await self._all(_ADVANCE, topic, *columns)
                if moved:
                    raise OffsetsMovedError(dict(moved))
                yield

    async def _apart(
        self, items: Sequence[T], work: Callable[[Sequence[T]], Awaitable[R]], first: int = 0
    ) -> tuple[list[R], list[Refused]]:
        """Runs `work` on all items; bisects when it fails. Returns its answers, and the items that it refuses.

        Notes in `_blocked` the numbers of items that another session holds up. Why this shares no helper with the other
        bisections stands in submission_calls.py.
        """
        if not items:
            return [], []
        if self._apart_until_s and time.monotonic() > self._apart_until_s:
            self._blocked += range(first, first + len(items))
            return [], []
        try:
            with _refusing():
                async with self._connection.transaction():
                    return [await work(items)], []
        except ValidationError as error:
            if len(items) == 1:
                return [], [(first, error.field, error.reason)]
        except Blocked as error:
            if len(items) == 1:
                self._blocked.append(first)
                return [], []
            await self._be_hasty(error)
        middle = len(items) // 2
        answers, refused = await self._apart(items[:middle], work, first)
        more_answers, more_refused = await self._apart(items[middle:], work, first + middle)
        return answers + more_answers, refused + more_refused

    async def _submit(self, rows: Sequence[EncodedRow]) -> tuple[int, list[Refused]]:
        if not self._apart_until_s and self._route.is_direct(rows) and await self._submit_direct(rows):
            return 0, []
        async with self._connection.cursor() as cursor:
            # While bisecting, the staging table may still hold rows that were submitted before.
            await cursor.execute("select orchestrator.open_staging()")
            async with cursor.copy(COPY_STAGED) as copy:
                await copy.write(staged(rows))
            await cursor.execute(_SUBMIT_HASTILY if self._apart_until_s else _SUBMIT)
            duplicates, numbers, fields, reasons = await cursor.fetchone() or (0, None, None, None)
        return duplicates, list(zip(numbers or (), fields or (), reasons or (), strict=True))

    async def _submit_direct(self, rows: Sequence[EncodedRow]) -> bool:
        done = False
        with suppress(errors.IntegrityError, errors.DataError):
            async with self._connection.transaction():
                done = await submit_direct(self._connection, rows)
        self._route.note(done)
        return done

    async def _be_hasty(self, error: Blocked) -> None:
        """Waits for no other session during the rest of the transaction."""
        if not self._apart_until_s:
            self._apart_until_s = time.monotonic() + _APART_S
            await self._all("set local lock_timeout = '20 ms'")
            holders = await self.holders()
            _log.warning(
                "records wait for another session's open transaction; the rest of their batch goes first",
                extra={"error": str(error), "holders": holders},
            )

    async def holders(self) -> str:
        """The sessions whose open transactions may hold this up, for an operator."""
        [(holders,)] = await self._all(HOLDERS)
        return str(holders)

    async def end_suspended(self) -> list[int]:
        """Ends the sessions of ingesters that have been within one COPY for ten seconds: their processes are suspended.

        PostgreSQL itself ends those that are idle in a transaction, but not those from which it awaits rows. Returns
        the process ids of the sessions.
        """
        return [pid for pid, _ in await self._all(_END_SUSPENDED)]

    async def _set_aside(self, topic: str, rows: Sequence[EncodedRow], records: Sequence[Reject]) -> None:
        async with self._connection.cursor() as cursor:
            await cursor.execute("select orchestrator.open_staging()")
            async with cursor.copy(COPY_STAGED) as copy:
                await copy.write(staged(rows))
        columns = zip(*((r.partition, r.offset, r.key, r.value) for r in records), strict=True)
        await self._all(_SET_ASIDE, topic, [row.n for row in rows], *map(list, columns))

    async def _keep_rejects(self, topic: str, rejects: Sequence[Reject]) -> None:
        if rejects:
            columns = [list(column) for column in zip(*sorted(rejects, key=_place), strict=True)]
            columns[4:] = [[_storable(text) for text in column] for column in columns[4:]]
            await self._all(_KEEP_REJECTS, topic, *columns)

    async def _all(self, query: LiteralString, *values: object) -> list[tuple[Any, ...]]:
        with translated():
            cursor = await self._connection.execute(query, values)
            return await cursor.fetchall() if cursor.description else []


@contextmanager
def _refusing() -> Iterator[None]:
    """Raises ValidationError for a value that the server will never accept."""
    try:
        with translated():
            yield
    except OrchestratorError as error:
        if isinstance(error.__cause__, errors.ProgramLimitExceeded | errors.StatementTooComplex):
            raise ValidationError("value", first_line(error.__cause__)) from error
        raise


def _place(reject: Reject) -> tuple[int, int]:
    return reject.partition, reject.offset


def _storable(text: str) -> str:
    """The text with escapes for what a column cannot hold: reasons quote what clients sent."""
    return text.replace("\x00", r"\u0000").encode(errors="backslashreplace").decode()


# A process that is suspended within its transaction must not block the consumer that has taken over its partitions.
_SESSION = {"idle_in_transaction_session_timeout": "5s", "lock_timeout": "10s"}
_END_SUSPENDED: LiteralString = """
select a.pid, pg_terminate_backend(a.pid) from pg_stat_activity a
where a.datname = current_database() and a.usename = current_user and a.pid <> pg_backend_pid()
  and a.application_name = current_setting('application_name')
  and a.state = 'active' and a.wait_event = 'ClientRead' and a.query_start < clock_timestamp() - interval '10 s'
"""
_ADVANCE: LiteralString = """
select partition, next_offset from orchestrator.advance_offsets(
  %s, %s::integer[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
"""
_SUBMIT: LiteralString = """
select count(*) filter (where result = 'duplicate'), array_agg(n) filter (where result = 'refused')
, array_agg(field) filter (where result = 'refused'), array_agg(reason) filter (where result = 'refused')
from orchestrator.try_submit_staged()
"""
_SUBMIT_HASTILY = _SUBMIT.replace("try_submit_staged", "submit_staged")
_COMMAND_PATIENCE: LiteralString = "set local lock_timeout = '2 s'"
_HELD = "another session holds the event in a transaction that is open; send the command again once it has ended"
_SET_ASIDE: LiteralString = """
select orchestrator.set_aside_staged(%s, %s::integer[], %s::integer[], %s::bigint[], %b::bytea[], %b::bytea[])
"""
_KEEP_REJECTS: LiteralString = """
select orchestrator.keep_rejects(
  %s, %s::integer[], %s::bigint[], %b::bytea[], %b::bytea[], %s::text[], %s::text[])
"""
