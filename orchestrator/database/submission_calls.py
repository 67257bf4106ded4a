"""Submissions: the calls by which the API and the CLI keep them, one transaction for each batch.

Where the database refuses a batch, or another session blocks it, bisecting finds the submissions that are at fault.
The ingester (`Ingestion._apart`) and the finisher (`Finisher._finish`) bisect as well. They share no helper: each
catches other errors, counts on other savepoints, and does something else with the one item that is left, so that only
the halving itself is alike.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import LiteralString, NamedTuple

from psycopg import errors
from psycopg.rows import TupleRow

from orchestrator.database.connection import Connection
from orchestrator.database.copying import COPY_STAGED, Route, is_small, staged, submit_batch, submit_direct
from orchestrator.database.pool import Pool
from orchestrator.errors import Blocked, ValidationError
from orchestrator.events.encoding import EncodedRow, encode_row
from orchestrator.events.submission import Submission
from orchestrator.settings import Settings

_SLICE_BYTES = 1 << 20
_HASTE: LiteralString = "set local lock_timeout = '20 ms'"
_APART_S = 2.0  # for finding out which submissions of a batch are blocked

_SUBMIT: LiteralString = (
    "select n, id::text, result, field, reason, status from orchestrator.try_submit_staged_with_status()"
)
_SUBMIT_HASTILY: LiteralString = (
    "select n, id::text, result, field, reason, status from orchestrator.submit_staged_with_status()"
)

_log = logging.getLogger(__name__)
_staged: weakref.WeakSet[Connection] = weakref.WeakSet()  # those whose session has the staging table


class Submitted(NamedTuple):
    """What became of a submission: ``accepted``, ``duplicate``, or ``refused`` with field and reason.

    `id` is the one that the event is kept under, `status` the state of a duplicate. ``blocked``, from `submit_all` and
    `submit_free` only: another session has an uncommitted event of that id, and this one was not kept.
    """

    id: str
    result: str
    field: str | None = None
    reason: str | None = None
    status: str | None = None


class SubmissionCalls(Pool):
    """The part of `Database` that submits."""

    def __init__(
        self, settings: Settings, *, role: str, needs: Sequence[str] = (), serves_clients: bool = False
    ) -> None:
        super().__init__(settings, role=role, needs=needs, serves_clients=serves_clients)
        self._route = Route()

    async def submit(self, submissions: Sequence[Submission]) -> list[Submitted]:
        """Keeps the submissions, in one transaction; one answer each, in order.

        Raises ValidationError when the database refuses a value that no rule foresaw, and Blocked when one of them has
        waited for another session for 250 ms; nothing is kept then.
        """
        return await self._submit(submissions, _SUBMIT)

    async def submit_hastily(self, submissions: Sequence[Submission]) -> list[Submitted] | None:
        """As `submit`, but waits for other sessions 20 ms at most; None: that was too short, and nothing is kept."""
        try:
            return await self._submit(submissions, _SUBMIT_HASTILY, _HASTE)
        except Blocked:
            return None

    async def _submit(
        self, submissions: Sequence[Submission], submit: LiteralString, first: LiteralString | None = None
    ) -> list[Submitted]:
        if not submissions:
            return []
        encoded = await _encoded(submissions)
        answered: list[TupleRow] | None = None

        async def work(connection: Connection) -> list[TupleRow]:
            nonlocal answered
            before = answered
            if first is None and is_small(encoded):
                async with connection.transaction():
                    answered = await submit_batch(connection, encoded)
                return _true(before, answered, len(encoded))
            if first is None and self._route.is_direct(encoded):
                done = False
                with suppress(errors.IntegrityError, errors.DataError):
                    async with connection.transaction():
                        done = await submit_direct(connection, encoded)
                        answered = [] if done else before
                self._route.note(done)
                if done:
                    return []
            if connection not in _staged and not connection.pooled:
                await connection.execute("select orchestrator.open_staging()")
                _staged.add(connection)
            async with connection.transaction(), connection.cursor() as cursor:
                if connection.pooled:
                    await cursor.execute("select orchestrator.open_staging()")
                if first is not None:
                    await cursor.execute(first)
                async with cursor.copy(COPY_STAGED) as copy:
                    await copy.write(staged(encoded))
                await cursor.execute(submit)
                answered = await cursor.fetchall()
            return _true(before, answered, len(encoded))

        rows = await self._run(work, changes=True, names_holders=first is None)
        exceptions = {row[0]: Submitted(*row[1:]) for row in rows}
        return [
            exceptions.get(n) or Submitted(submission.id, "accepted", status="scheduled")
            for n, submission in enumerate(submissions)
        ]


def _true(before: list[TupleRow] | None, now: list[TupleRow], count: int) -> list[TupleRow]:
    """The answers that are true, when the reply to the commit of the run before was lost.

    If it was kept, what was new to it is a duplicate to this one; if one of those is new again, it was undone.
    """
    if before is None:
        return now
    exceptions = {row[0] for row in before}
    duplicates = {row[0] for row in now if row[2] == "duplicate"}
    undone = any(n not in duplicates for n in range(count) if n not in exceptions)
    return now if undone else before


async def _encoded(submissions: Sequence[Submission]) -> list[EncodedRow]:
    """The rows of COPY for all of them; lets other tasks run in between when that takes long."""
    rows = []
    size_bytes = 0
    for n, submission in enumerate(submissions):
        row = encode_row(submission, n)
        rows.append(row)
        size_bytes += len(row.fields)
        if size_bytes > _SLICE_BYTES:
            size_bytes = 0
            await asyncio.sleep(0)
    return rows


async def submit_all(database: SubmissionCalls, submissions: Sequence[Submission]) -> list[Submitted]:
    """Submits in one transaction; bisecting finds a submission that only the database refuses, and refuses it alone.

    A submission that would wait for another session's open transaction is answered as blocked; all others are kept.
    Raises DatabaseUnavailable. Halves that were already kept stay kept: submitting them again changes nothing.
    """
    try:
        return await database.submit(submissions)
    except Blocked as error:
        _log.warning(
            "submissions are set aside while another session's open transaction holds them up",
            extra={"error": str(error)},
        )
        return await submit_free(database, submissions)
    except ValidationError as error:
        if len(submissions) == 1:
            return [Submitted(submissions[0].id, "refused", error.field, error.reason)]
        middle = len(submissions) // 2
        first = await submit_all(database, submissions[:middle])
        return first + await submit_all(database, submissions[middle:])


async def submit_free(
    database: SubmissionCalls, submissions: Sequence[Submission], deadline_s: float | None = None
) -> list[Submitted]:
    """As `submit_all`, but waits for no other session: bisecting finds the blocked ones, in about two seconds.

    Submissions that were not tried by then (`deadline_s`, monotonic) count as blocked, too.
    """
    if deadline_s is None:
        deadline_s = time.monotonic() + _APART_S
    elif time.monotonic() > deadline_s:
        return [_blocked(submission) for submission in submissions]
    try:
        kept = await database.submit_hastily(submissions)
        if kept is not None:
            return kept
        if len(submissions) == 1:
            return [_blocked(submissions[0])]
    except ValidationError as error:
        if len(submissions) == 1:
            return [Submitted(submissions[0].id, "refused", error.field, error.reason)]
    middle = len(submissions) // 2
    first = await submit_free(database, submissions[:middle], deadline_s)
    return first + await submit_free(database, submissions[middle:], deadline_s)


def _blocked(submission: Submission) -> Submitted:
    return Submitted(submission.id, "blocked", "id", "another session holds it in a transaction that is open")
