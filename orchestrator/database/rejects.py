"""Rejects, for operators: records from Kafka that could not be kept."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import msgspec

from orchestrator.database.connection import Connection
from orchestrator.database.copying import COPY_STAGED, staged
from orchestrator.database.gateway import Database
from orchestrator.database.submission_calls import Submitted
from orchestrator.errors import OrchestratorError, ValidationError
from orchestrator.events.encoding import encode_row
from orchestrator.events.submission import Submission


class KeptReject(NamedTuple):
    """A reject with its bytes, and the event that it became if it was submitted again."""

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
    """Listing and resubmitting rejects, through the pool. Methods raise DatabaseUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, *, limit: int, before: int | None = None) -> list[bytes]:
        """Rejects as JSON, newest first, without their bytes; `before` is the last number of the page before."""
        rows = await self._database.rows("select orchestrator.list_rejects(%s, %s)", limit, before)
        return [row[0].encode() for row in rows]

    async def get(self, number: int) -> KeptReject | None:
        rows = await self._database.rows("select * from orchestrator.get_reject(%s)", number)
        return KeptReject(number, *rows[0]) if rows else None

    async def resubmit(self, number: int, submission: Submission) -> Submitted:
        """Keeps the event and notes it with the reject, both or neither.

        Raises ValidationError when the database refuses it.
        """

        async def work(connection: Connection, request: UUID) -> list[Submitted]:
            async with connection.transaction(), connection.cursor() as cursor:
                await cursor.execute("select orchestrator.open_staging()")
                async with cursor.copy(COPY_STAGED) as copy:
                    await copy.write(staged([encode_row(submission, 0)]))
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
                await cursor.execute(
                    "select orchestrator.keep_answer(%s, json_build_array(%s::json))",
                    (request, msgspec.json.encode(kept._asdict()).decode()),
                )
            return [kept]

        [kept] = await self._database.done_once(work)
        return Submitted(*kept)
