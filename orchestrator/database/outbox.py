"""The outbox as its publisher sees it, on a connection that it does not share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import LiteralString, NamedTuple

from orchestrator.database.connection import Connection, connect, translated
from orchestrator.events.topics import TopicRules
from orchestrator.settings import Settings

OUTBOX_CHANNEL = "orchestrator_outbox"

_TRANSACTION_TIMEOUT = {"transaction_timeout": "30s"}
_BATCH_BYTES = 1 << 24
_FETCHED = 200  # messages at a time, which bounds by how much a batch exceeds _BATCH_BYTES


class Message(NamedTuple):
    """A message to publish. `at` names it within the batch; `headers` is a JSON object of strings."""

    at: str
    floor: int
    kind: str
    headers: str | None
    key: bytes | None
    value: bytes | None


class Outbox:
    """Reads batches of messages, and records which were published and which failed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncGenerator[Outbox, None]:
        """Raises DatabaseUnavailable."""
        async with await connect(settings, "outbox", **_TRANSACTION_TIMEOUT) as connection:
            with translated():
                await connection.execute("select orchestrator.repair_after_restore()")
            yield cls(connection)

    async def switch(self, kinds: Sequence[str]) -> None:
        """Sets which kinds of messages the database writes to the outbox from now on."""
        with translated():
            await self._connection.execute("select orchestrator.set_outbox(%s)", (list(kinds),))

    async def tell_topics(self, rules: TopicRules) -> None:
        """Tells submissions in SQL which topics events may be delivered to."""
        with translated():
            values = (rules.ready, list(rules.own), list(rules.allowed))
            await self._connection.execute("select orchestrator.configure_topics(%s, %s, %s)", values)

    async def backlog(self) -> tuple[int, float]:
        """How many messages wait, counted up to 10,000, and for how many seconds the oldest of them has."""
        with translated():
            query = "select pending, oldest_seconds from orchestrator.outbox_backlog()"
            [backlog] = await (await self._connection.execute(query)).fetchall()
        return backlog

    @asynccontextmanager
    async def batch(self, limit: int, floor: int) -> AsyncGenerator[list[Message], None]:
        """The oldest messages, up to `limit` or about 16 MiB of them, in a transaction that ends with the block.

        There are none while another publisher works. `floor` is that of the last message of the batch before.
        """
        with translated():
            async with self._connection.transaction():
                messages: list[Message] = []
                size = 0
                async with self._connection.cursor("batch") as cursor:
                    await cursor.execute(_BATCH, (limit, floor), binary=True)
                    while size < _BATCH_BYTES and (rows := await cursor.fetchmany(_FETCHED)):
                        messages += map(Message._make, rows)
                        size += sum(len(row[5] or b"") for row in rows)
                yield messages

    async def published(self, messages: Sequence[Message]) -> None:
        """Deletes messages of the batch that the brokers have acknowledged."""
        await self._connection.execute("select orchestrator.outbox_published(%s::tid[])", (_tids(messages),))

    async def failed(self, messages: Sequence[Message], reasons: Sequence[str]) -> None:
        """Sets messages of the batch aside, so that they hold up no others."""
        await self._connection.execute(
            "select orchestrator.outbox_failed(%s::tid[], %s)", (_tids(messages), list(reasons))
        )


def _tids(messages: Sequence[Message]) -> str:
    return "{" + ",".join([f'"{message.at}"' for message in messages]) + "}"


_BATCH: LiteralString = (
    "select at::text, floor, kind, headers::text, key, value from orchestrator.outbox_batch(%s, %s::bigint)"
)
