"""Rejects: records from Kafka that could not be kept, for the operator who looks after them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

from orchestrator.config import Settings
from orchestrator.database.connection import Connection, connect, translated
from orchestrator.database.pool import COPY_SUBMISSIONS, Submitted
from orchestrator.errors import OrchestratorError, ValidationError
from orchestrator.events import Submission, copy_row


class KeptReject(NamedTuple):
    """A reject with its bytes; the event it became when it was submitted again, if it was."""

    number: int
    topic: str
    partition: int
    offset: int
    received_at: str
    key: bytes | None
    value: bytes | None
    field: str
    reason: str
    event_id: str | None
    resubmitted_at: str | None


class Rejects:
    """One connection. Methods raise DatabaseUnavailable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncGenerator[Rejects, None]:
        async with await connect(settings, "cli") as connection:
            yield cls(connection)

    async def page(self, *, limit: int, before: int | None = None) -> list[bytes]:
        """Rejects as JSON, newest first, without their bytes; `before` is the last number of the page before."""
        with translated():
            cursor = await self._connection.execute("select orchestrator.list_rejects(%s, %s)", (limit, before))
            return [row[0].encode() for row in await cursor.fetchall()]

    async def get(self, number: int) -> KeptReject | None:
        with translated():
            cursor = await self._connection.execute("select * from orchestrator.get_reject(%s)", (number,))
            row = await cursor.fetchone()
        return None if row is None else KeptReject(number, *row)

    async def resubmit(self, number: int, submission: Submission) -> Submitted:
        """Keeps the event and notes it with the reject, both or neither.
        Raises ValidationError when the database refuses it.
        """
        with translated():
            async with self._connection.transaction(), self._connection.cursor() as cursor:
                await cursor.execute("select orchestrator.open_staging()")
                async with cursor.copy(COPY_SUBMISSIONS) as copy:
                    await copy.write(copy_row(submission, 0))
                await cursor.execute(
                    "select id::text, result, field, reason, status from orchestrator.submit_staged_with_status()"
                )
                row = await cursor.fetchone()
                kept = Submitted(*row) if row else Submitted(submission.id, "accepted", status="scheduled")
                if kept.result == "refused":
                    raise ValidationError(kept.field or "value", kept.reason or "refused")
                await cursor.execute("select orchestrator.resubmitted_reject(%s, %s::uuid)", (number, kept.id))
                if await cursor.fetchone() != (True,):
                    raise OrchestratorError(f"there is no reject {number} any more")
        return kept
