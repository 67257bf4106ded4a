"""A producer for very many records: it stays connected, finds topics, and reports each record's outcome."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Generic

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from orchestrator.backoff import backoff_s
from orchestrator.errors import KafkaUnavailable, OrchestratorError, OwnFaultError
from orchestrator.kafka.client import started_producer
from orchestrator.kafka.partition_queues import OnResult, OutgoingRecord, PartitionQueues, T, TopicUnavailableError
from orchestrator.kafka.partitions import partition_of
from orchestrator.own_faults import own_fault
from orchestrator.settings import Settings

_LOOKS_S = (0.0, 0.1, 0.2, 0.4, 0.8)  # waits between looks: a topic that is being created appears within moments
_ONE_LOOK = (0.0,)  # at a topic that did not exist a moment ago
_METADATA_S = 5.0
_UNKNOWN_FOR_S = 1.0  # a topic that was not found is not looked for again within this time
_REMEMBERED_S = 60.0
_KEYLESS_RUN = 64  # records without a key go to one partition in runs, so that batches fill
_STOPPED = "stopped before the brokers had answered"

_log = logging.getLogger(__name__)


class BulkProducer(Generic[T]):
    """Use `bulk_producer`, which keeps it connected in the background."""

    def __init__(
        self,
        settings: Settings,
        role: str,
        tasks: asyncio.TaskGroup,
        on_result: OnResult[T],
        *,
        timeout_s: float,
        ordered: bool,
    ) -> None:
        self._settings = settings
        self._role = role
        self._tasks = tasks
        self._on_result = on_result
        self._broken = asyncio.Event()
        self._queues = PartitionQueues(tasks, on_result, self._break, timeout_s=timeout_s, ordered=ordered)
        self._producer: AIOKafkaProducer | None = None
        self._ready = asyncio.Event()
        self._parked: dict[str, list[OutgoingRecord[T]]] = {}
        self._looking: set[asyncio.Task[None]] = set()
        self._unknown: dict[str, tuple[float, TopicUnavailableError]] = {}
        self._topics: set[str] = set()
        self._keyless = random.randrange(1 << 16)
        self.away: KafkaUnavailable | None = None
        """Why no broker can be reached; None while one can."""

    async def ready(self) -> bool:
        """Waits until there is a connection, or the reason for none in `away`.

        False after `stop_waiting`, if there is neither.
        """
        await self._ready.wait()
        return self._producer is not None or self.away is not None

    def stop_waiting(self) -> None:
        """Ends every `ready` at once."""
        self._ready.set()

    def send(self, topic: str, records: list[OutgoingRecord[T]]) -> None:
        """Takes in records for one topic; calls `on_result` for each within a bounded time, perhaps at once."""
        producer = self._producer
        if producer is None:
            self._on_result([r.item for r in records], self.away or KafkaUnavailable("not connected yet"))
            return
        partitions = producer.client.cluster.partitions_for_topic(topic)
        if not partitions:
            self._park(producer, topic, records)
            return
        count, add = len(partitions), self._queues.add
        for record in records:
            if record.key is None:
                self._keyless += 1
                add(topic, self._keyless // _KEYLESS_RUN % count, record)
            else:
                add(topic, partition_of(record.key, count), record)

    def drop(self) -> None:
        """Gives up on every record that is not acknowledged yet."""
        stopped = KafkaUnavailable(_STOPPED)
        for task in self._looking:
            task.cancel()
        self._queues.drop(stopped)
        self._fail_parked(stopped)

    async def keep_connected(self) -> None:
        """Connects, and connects again whenever the connection breaks; never returns."""
        failures = 0
        while True:
            try:
                async with started_producer(self._settings, self._role) as producer:
                    self._connected(producer)
                    failures = 0
                    await self._broken.wait()
                    await self._queues.settled()
                    await producer.abandon()  # records that were given up must not be delivered later
            except KafkaUnavailable as error:
                self._disconnected(error)
            except OrchestratorError as error:  # a file that KAFKA_SSL_CA_FILE or the like names
                fault = OwnFaultError("settings", str(error), "mend it and start again")
                self._disconnected(KafkaUnavailable(str(error), fault))
            except Exception as error:
                _log.exception("connecting to Kafka failed unexpectedly")
                self._disconnected(KafkaUnavailable(f"internal error: {type(error).__name__}", own_fault(error)))
            if self.away is not None:
                failures += 1
                await asyncio.sleep(backoff_s(failures))

    def _connected(self, producer: AIOKafkaProducer) -> None:
        if self.away is not None:
            _log.warning("Kafka is back", extra={"producer": self._role})
        self.away = None
        self._broken.clear()
        self._topics = set()
        self._producer = producer
        self._queues.use(producer)
        self._ready.set()

    def _break(self) -> None:
        self._producer = None
        self._ready.clear()
        self._broken.set()

    def _disconnected(self, error: KafkaUnavailable) -> None:
        if self.away is None:
            _log.warning("Kafka is away; trying again", extra={"producer": self._role, "error": str(error)})
        self._producer = None
        self.away = error
        self._queues.drop(error)
        self._fail_parked(error)
        self._ready.set()

    def _park(self, producer: AIOKafkaProducer, topic: str, records: list[OutgoingRecord[T]]) -> None:
        """Keeps records until it is known whether their topic exists; records for other topics go on."""
        until_s, unknown = self._unknown.get(topic, (0.0, None))
        if unknown is not None and asyncio.get_running_loop().time() < until_s:
            self._on_result([r.item for r in records], unknown)
        elif topic in self._parked:
            self._parked[topic] += records
        else:
            self._parked[topic] = records
            task = self._tasks.create_task(self._look_up(producer, topic))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _look_up(self, producer: AIOKafkaProducer, topic: str) -> None:
        error: OrchestratorError | None = None
        try:
            self._topics.add(topic)
            await _find(producer, topic, _ONE_LOOK if topic in self._unknown else _LOOKS_S)
            self._unknown.pop(topic, None)
            await self.ready()
        except TopicUnavailableError as unknown:
            error = unknown
            # Otherwise the client would ask for it for ever, and names that do not exist would pile up.
            self._topics.discard(topic)
            producer.client.set_topics(self._topics)
            now_s = asyncio.get_running_loop().time()
            self._unknown = {name: entry for name, entry in self._unknown.items() if entry[0] > now_s - _REMEMBERED_S}
            self._unknown[topic] = now_s + _UNKNOWN_FOR_S, unknown
        except (TimeoutError, KafkaError, KafkaUnavailable):
            error = KafkaUnavailable(f"{topic}: no broker says whether this topic exists")
        records = self._parked.pop(topic, [])
        if error is not None:
            self._on_result([record.item for record in records], error)
        else:
            self.send(topic, records)

    def _fail_parked(self, error: OrchestratorError) -> None:
        for records in self._parked.values():
            self._on_result([record.item for record in records], error)
            records.clear()


async def _find(producer: AIOKafkaProducer, topic: str, looks_s: Sequence[float]) -> None:
    """Returns once the topic's partitions are known. Raises TopicUnavailableError, and errors that mean no broker."""
    client = producer.client
    for wait_s in looks_s:
        await asyncio.sleep(wait_s)
        async with asyncio.timeout(_METADATA_S):
            await client.add_topic(topic)
            updated = await client.force_metadata_update()
        if not updated:
            raise KafkaUnavailable("no broker answers")
        if client.cluster.partitions_for_topic(topic):
            return
        if topic in client.cluster.unauthorized_topics:
            raise TopicUnavailableError(f"{topic}: not allowed to write to this topic")
    raise TopicUnavailableError(f"{topic}: no such topic")


@asynccontextmanager
async def bulk_producer(
    settings: Settings, role: str, on_result: OnResult[T], *, timeout_s: float, ordered: bool = False
) -> AsyncGenerator[BulkProducer[T], None]:
    """A producer that connects in the background; leaving the block gives up on records that are not acknowledged.

    Every record has `timeout_s` to be acknowledged. With `ordered`, no record of a partition is sent after one that
    failed until that failure has been reported.
    """
    async with asyncio.TaskGroup() as tasks:
        bulk = BulkProducer(settings, role, tasks, on_result, timeout_s=timeout_s, ordered=ordered)
        connecting = tasks.create_task(bulk.keep_connected())
        try:
            yield bulk
        finally:
            connecting.cancel()
            bulk.drop()
