"""A consumer's connection to the database; tries each call until it succeeds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol, TypeVar

import psycopg

from orchestrator.backoff import backoff_s
from orchestrator.database.ingestion import Ingestion, Move, OffsetsMovedError, Position
from orchestrator.errors import Blocked, DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import within

T = TypeVar("T")

_ANSWER_S = 30.0  # for a call of the database; one that hangs is given up with its connection

_log = logging.getLogger(__name__)


class Writable(Protocol):
    """A batch of records of one topic."""

    async def write(self, database: Ingestion, topic: str, moves: Sequence[Move]) -> None:
        """Keeps all of it in one transaction. May be called again. Raises as `Ingestion` does."""


class Writer:
    """One call at a time. Cancelling a call closes the connection; the next call opens another."""

    def __init__(self, settings: Settings, metrics: Metrics, topic: str) -> None:
        self._settings = settings
        self._metrics = metrics
        self._topic = topic
        self._connection = AsyncExitStack()
        self._database: Ingestion | None = None

    async def close(self) -> None:
        self._database = None
        await self._connection.aclose()

    async def positions(self) -> dict[int, Position]:
        """Where each partition stands in the database."""
        return await self._until_done(lambda database: database.positions(self._topic))

    async def write(self, batch: Writable, moves: Sequence[Move]) -> None:
        """Keeps a batch, however long that takes. Raises OffsetsMovedError when another consumer was first."""
        tries = 0

        async def once(database: Ingestion) -> None:
            nonlocal tries
            tries += 1
            await batch.write(database, self._topic, moves)

        try:
            with self._metrics.ingest_batch_seconds.time():
                await self._until_done(once)
        except OffsetsMovedError as moved:
            # The reply to a commit was lost, and the batch was kept by the try before.
            if tries == 1 or moved.stand_at != {move.partition: move.next_offset for move in moves}:
                raise

    async def keep_aside(self) -> None:
        """Keeps records that this connection set aside earlier, as maintenance does, too."""
        if self._database is not None and self._database.has_aside:
            await self._until_done(lambda database: database.keep_aside())

    async def _until_done(self, work: Callable[[Ingestion], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                found = await within(_ANSWER_S, self._once(work))
            except OffsetsMovedError:
                self._note_served(failures)
                raise
            except Blocked as error:
                failures += 1
                await self._back_off(failures, error, await self._holders())
            except (OrchestratorError, psycopg.Error, TimeoutError) as error:
                failures += 1
                await self.close()
                await self._back_off(failures, error)
            except BaseException:
                await self.close()
                raise
            else:
                self._note_served(failures)
                return found

    async def _once(self, work: Callable[[Ingestion], Awaitable[T]]) -> T:
        return await work(await self._connected())

    def _note_served(self, failures: int) -> None:
        if failures:
            self._metrics.database_reconnects_total.inc()
            _log.warning("the database is back", extra={"topic": self._topic})

    async def _connected(self) -> Ingestion:
        if self._database is None:
            self._database = await self._connection.enter_async_context(Ingestion.open(self._settings))
        return self._database

    async def _holders(self) -> str:
        """The sessions that hold a batch up; those of them that belong to suspended ingesters are ended."""

        async def found(database: Ingestion) -> str:
            holders = await database.holders()
            if ended := await database.end_suspended():
                _log.warning("ended sessions of ingesters that are suspended within a batch", extra={"pids": ended})
            return holders

        try:
            return await within(_ANSWER_S, self._once(found))
        except (OrchestratorError, psycopg.Error, TimeoutError):
            await self.close()
            return "unknown"

    async def _back_off(self, failures: int, error: Exception, holders: str | None = None) -> None:
        wait_s = backoff_s(failures)
        away = isinstance(error, DatabaseUnavailable | TimeoutError)
        message = "the database is away" if away else "the database refuses to serve"
        if holders:
            message = "another session's open transaction holds up a batch"
        extra = {
            "topic": self._topic,
            "error": str(error) or f"no answer within {_ANSWER_S:g} s",
            "retry_in_s": round(wait_s, 3),
        }
        if holders:
            extra["holders"] = holders
        _log.log(logging.WARNING if away else logging.ERROR, f"{message}; trying again", extra=extra)
        await asyncio.sleep(wait_s)
