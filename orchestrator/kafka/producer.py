"""aiokafka's producer (0.14) with two faults mended: an idempotent one stays broken, and stopping may hang."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import BrokerResponseError, ProducerClosed, UnknownError
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator, MessageBatch
from aiokafka.producer.sender import Sender
from aiokafka.structs import TopicPartition

from orchestrator.tasks import retrieve

_CLOSE_TIMEOUT_S = 2.0


class Producer(AIOKafkaProducer):  # type: ignore[misc]  # untyped
    """Numbers on correctly after a batch that the broker refused, and can be abandoned.

    An idempotent producer numbers the records of a partition, and a broker takes only the next number. aiokafka
    counts a batch that was refused (a record too large for its topic) or never sent (its partition had no
    leader for long): every later record of that partition then fails with OutOfOrderSequenceNumber.
    """

    _sender: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._message_accumulator.__class__ = _Accumulator
        theirs = self._sender
        self._sender = _CountingSender(
            theirs.client,
            acks=theirs._acks,
            txn_manager=theirs._txn_manager,
            message_accumulator=theirs._message_accumulator,
            retry_backoff_ms=theirs._retry_backoff * 1000,
            request_timeout_ms=theirs._request_timeout_ms,
        )
        if self._txn_manager is not None:
            self._message_accumulator._batch_ttl = math.inf  # waits for a leader, as it does for an answer

    async def abandon(self) -> None:
        """Ends it within seconds; records that it still holds fail with ProducerClosed.

        aiokafka's own `stop` waits for everything to be delivered, for ever while no broker answers.
        """
        self._closed = True
        self._message_accumulator.fail_all(ProducerClosed())
        tasks = [*self._sender.under_way, *([self._sender.sender_task] if self._sender.sender_task else [])]
        if self.client._sync_task is not None:
            tasks.append(self.client._sync_task)
        for task in tasks:
            task.cancel()
        for connection in self.client._conns.values():
            if connection._writer is not None:
                connection._writer.transport.abort()  # an orderly end would wait for the broker
        if tasks:
            ended, _ = await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
            retrieve(*ended)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self.client.close()


class _Accumulator(MessageAccumulator):  # type: ignore[misc]  # untyped
    """Makes batches that may fail unobserved: whoever gave one up has told its sender."""

    def _append_batch(self, builder: BatchBuilder, tp: TopicPartition) -> MessageBatch:
        batch = super()._append_batch(builder, tp)
        batch.__class__ = _Batch
        return batch


class _Batch(MessageBatch):  # type: ignore[misc]  # untyped
    def failure(self, exception: BaseException) -> None:
        super().failure(exception)
        retrieve(self.future, self._drain_waiter)


class _CountingSender(Sender):  # type: ignore[misc]  # untyped
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.under_way: set[asyncio.Task[None]] = set()

    async def _send_produce_req(self, node_id: int, batches: dict[TopicPartition, MessageBatch]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.under_way.add(task)
        try:
            await super()._send_produce_req(node_id, batches)
        finally:
            self.under_way.discard(task)
        if self._txn_manager is not None:
            # No await came in between, so that nothing else of these partitions has been sent.
            for partition, batch in batches.items():
                if _was_refused(batch):
                    self._txn_manager.increment_sequence_number(partition, -batch.record_count)


def _was_refused(batch: MessageBatch) -> bool:
    """Whether the broker certainly did not append the batch: it refused the first attempt.

    In doubt the number stays taken, and later records fail. If another record got it, a broker that did append the
    first would drop the second as a repetition, and acknowledge it.
    """
    if not batch.future.done() or batch.retry_count != 1:
        return False
    error = batch.future.exception()
    return isinstance(error, BrokerResponseError) and not isinstance(error, UnknownError)
