"""Batches of records on their way to the brokers: a queue for each partition, with one batch under way.

aiokafka's own `send` costs a future and a task switch for each record; here they cost once for each batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.message_accumulator import BatchBuilder

from orchestrator.errors import KafkaUnavailable, OrchestratorError
from orchestrator.own_faults import own_fault, without_descriptors

_LINGER_S = 0.01
_STALLED_S = 5.0  # after which a partition takes no more until it has answered
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

T = TypeVar("T")
OnResult = Callable[[Sequence[T], OrchestratorError | None], None]
"""Called with the items of records, and their error: None once the brokers have acknowledged them."""

_log = logging.getLogger(__name__)


class RecordRefusedError(OrchestratorError):
    """The brokers will never take this record as it is."""


class TopicUnavailableError(OrchestratorError):
    """The topic does not exist, or this login may not write to it; an operator may mend that."""


class OutgoingRecord(NamedTuple, Generic[T]):
    """A record to send; `item` is what its sender knows it by."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    item: T


class _Batch(Generic[T]):
    __slots__ = ("builder", "deadline_s", "records")

    def __init__(self, builder: BatchBuilder, deadline_s: float) -> None:
        self.builder = builder
        self.deadline_s = deadline_s
        self.records: list[OutgoingRecord[T]] = []

    def add(self, record: OutgoingRecord[T]) -> bool:
        """Whether there was room; there always is for the first record, of any size."""
        added = self.builder.append(timestamp=None, key=record.key, value=record.value, headers=record.headers)
        if added is None:
            return False
        self.records.append(record)
        return True


class _PartitionQueue(Generic[T]):
    __slots__ = ("batches", "filling", "partition", "sent_s", "task", "topic", "under_way")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self.filling: _Batch[T] | None = None
        self.batches: deque[_Batch[T]] = deque()
        self.under_way: _Batch[T] | None = None
        self.sent_s: float | None = None
        self.task: asyncio.Task[None] | None = None

    def take_all(self) -> list[OutgoingRecord[T]]:
        """Takes out every record it holds, oldest first."""
        batches = [self.under_way, *self.batches, self.filling]
        self.under_way = self.filling = None
        self.batches.clear()
        return [record for batch in batches if batch for record in batch.records]


class PartitionQueues(Generic[T]):
    """Fills batches and sends them through the producer it was last given, in order of each partition.

    A batch leaves when it is full. When its queue is idle it leaves at once, but no sooner than 10 ms after the last
    such departure: a single record does not wait, and many travel together. Each record has `timeout_s` to be
    acknowledged. When the outcome of one is in doubt, the producer is put away and `on_broken` called: batches under
    way stay with it, and waiting ones go to the next producer. With `ordered`, every record that waits behind a
    failed one in its queue fails, too, so that none overtakes another.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        on_result: OnResult[T],
        on_broken: Callable[[], None],
        *,
        timeout_s: float,
        ordered: bool,
    ) -> None:
        self._tasks = tasks
        self._on_result = on_result
        self._on_broken = on_broken
        self._timeout_s = timeout_s
        self._ordered = ordered
        self._loop = asyncio.get_running_loop()
        self._queues: dict[tuple[str, int], _PartitionQueue[T]] = {}
        self._filling: set[_PartitionQueue[T]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._departed_s = 0.0
        self._producer: AIOKafkaProducer | None = None
        self._create_batch: Callable[[], BatchBuilder] | None = None
        self._usable = asyncio.Event()
        self._sending = 0
        self._settled = asyncio.Event()
        self._settled.set()

    def use(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer
        self._create_batch = producer.create_batch
        self._usable.set()

    async def settled(self) -> None:
        """Waits until nothing is under way any more."""
        await self._settled.wait()

    def add(self, topic: str, partition: int, record: OutgoingRecord[T]) -> None:
        """Takes a record in; call `use` first."""
        queue = self._queues.get((topic, partition))
        if queue is None:
            queue = self._queues[topic, partition] = _PartitionQueue(topic, partition)
        elif queue.sent_s is not None and self._loop.time() > queue.sent_s + _STALLED_S:
            self._on_result([record.item], KafkaUnavailable(f"{topic}: its brokers do not answer just now"))
            return
        batch = queue.filling
        if batch is not None:
            if batch.add(record):
                return
            queue.batches.append(batch)
            self._start(queue)
        queue.filling = self._batch([record], self._loop.time() + self._timeout_s)
        self._filling.add(queue)
        if self._alarm is None:
            self._alarm = self._loop.call_at(max(self._departed_s + _LINGER_S, self._loop.time()), self._depart)

    def drop(self, error: OrchestratorError) -> None:
        """Gives up on every record, under way or not."""
        queues, self._queues = self._queues, {}
        self._filling.clear()
        for queue in queues.values():
            if queue.task is not None:
                queue.task.cancel()
            self._report(queue.take_all(), error)

    def _batch(self, records: Sequence[OutgoingRecord[T]], deadline_s: float) -> _Batch[T]:
        if self._create_batch is None:
            raise RuntimeError("there has been no producer yet")
        batch: _Batch[T] = _Batch(self._create_batch(), deadline_s)
        for record in records:
            batch.add(record)
        return batch

    def _depart(self) -> None:
        now_s = self._departed_s = self._loop.time()
        for queue in [queue for queue in self._filling if queue.task is None]:
            self._filling.discard(queue)
            if queue.filling is not None:
                queue.batches.append(queue.filling)
                queue.filling = None
                self._start(queue)
        # Queues with a batch under way fill the next one meanwhile.
        self._alarm = self._loop.call_at(now_s + _LINGER_S, self._depart) if self._filling else None

    def _start(self, queue: _PartitionQueue[T]) -> None:
        if queue.task is None:
            queue.task = self._tasks.create_task(self._work(queue))

    async def _work(self, queue: _PartitionQueue[T]) -> None:
        while queue.batches:
            batch = queue.under_way = queue.batches.popleft()
            error = await self._send(queue, batch)
            queue.under_way = None
            if error is None:
                self._report(batch.records, None)
            elif isinstance(error, RecordRefusedError) and len(batch.records) > 1:
                middle = len(batch.records) // 2
                for half in (batch.records[middle:], batch.records[:middle]):
                    queue.batches.appendleft(self._batch(half, batch.deadline_s))
            else:
                self._report(batch.records, error)
                if self._ordered:
                    self._report(
                        queue.take_all(), KafkaUnavailable(f"not sent, as a record before it was not: {error}")
                    )
        queue.task = None
        if queue.filling is None:
            del self._queues[queue.topic, queue.partition]

    async def _send(self, queue: _PartitionQueue[T], batch: _Batch[T]) -> OrchestratorError | None:
        """None once the brokers have acknowledged the batch."""
        topic = queue.topic
        producer = None
        try:
            async with asyncio.timeout_at(batch.deadline_s):
                while (producer := self._producer) is None:
                    self._usable.clear()
                    await self._usable.wait()
                self._sending += 1
                self._settled.clear()
                queue.sent_s = self._loop.time()
                try:
                    await (await producer.send_batch(batch.builder, topic, partition=queue.partition))
                finally:
                    queue.sent_s = None
                    self._sending -= 1
                    if not self._sending:
                        self._settled.set()
            return None
        except TimeoutError:
            late = f"{topic}: no acknowledgement within {self._timeout_s:g} s"
            # aiokafka tries to connect until then, and does not say why that fails.
            error: OrchestratorError = KafkaUnavailable(late, without_descriptors())
        except _TOO_LARGE:
            size = sum(len(record.key or b"") + len(record.value or b"") for record in batch.records)
            error = RecordRefusedError(f"{topic}: a record of {size} bytes is larger than max.message.bytes allows")
        except InvalidTopicError:
            error = RecordRefusedError(f"{topic}: the brokers take no records for it from outside")
        except TopicAuthorizationFailedError:
            error = TopicUnavailableError(f"{topic}: not allowed to write to this topic")
        except UnknownTopicOrPartitionError:
            error = TopicUnavailableError(f"{topic}: no such topic")
        except KafkaError as failure:
            said = f"{topic}: {type(failure).__name__}: {str(failure) or 'no answer'}"
            error = KafkaUnavailable(said, without_descriptors())
        except Exception as failure:  # one batch must not end all the others
            _log.exception("a batch failed unexpectedly", extra={"topic": topic})
            error = KafkaUnavailable(f"{topic}: internal error: {type(failure).__name__}", own_fault(failure))
        if producer is not None and producer is self._producer and isinstance(error, KafkaUnavailable):
            self._producer = None
            self._on_broken()
        return error

    def _report(self, records: Sequence[OutgoingRecord[T]], error: OrchestratorError | None) -> None:
        if records:
            self._on_result([record.item for record in records], error)
