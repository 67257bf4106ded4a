"""A consumer of one topic, as the ingester needs it: aiokafka's, without its traps.

It reads each partition from the offset where it was placed, never from the group's offset in Kafka. Some things that
aiokafka does silently raise an error here: resetting to the log's beginning, skipping a record that is too large,
fetching a bad batch for ever, losing the records of one partition to another's error. Only aiokafka's public interface
is used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)

from orchestrator.errors import KafkaUnavailable
from orchestrator.ingest.partition import ConsumedRecord
from orchestrator.kafka.client import client_arguments, kafka_errors, start
from orchestrator.settings import Settings

_CALL_S = 30.0  # for brokers to answer
_ENDING_S = 2.0
_REJOINING_S = 1.0
_FETCH_BYTES = 8 << 20  # that all consumers of a process fetch at once; the brokers keep to it
_PARTITION_FETCH_BYTES = 512 << 10
_LARGEST_FETCH_BYTES = 256 << 20
_NEVER_MS = 2**31 - 1
_LOST_SIGHT_MS = 5000  # after which a topic may have been deleted, recreated and filled again

_log = logging.getLogger(__name__)


class MisplacedError(Exception):
    """A partition was placed at an offset that the log does not have; its place has to be found again."""


class UnreadableError(Exception):
    """The next records of `partition` cannot be read; None: which partition is not known."""

    def __init__(self, partition: int | None, reason: str) -> None:
        self.partition = partition
        super().__init__(reason)


class TooLargeError(Exception):
    """A record does not fit into a fetch: the consumer must be rebuilt with larger fetches."""


class Fetched(NamedTuple):
    """Records of a partition, and the offset to read on from; compaction and transactions may leave a gap before it."""

    partition: int
    records: Sequence[ConsumedRecord]
    next_offset: int


class Source:
    """A started consumer. Methods raise KafkaError or KafkaUnavailable when it has to be rebuilt."""

    def __init__(self, consumer: AIOKafkaConsumer, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic
        self._assigned: Collection[TopicPartition] = ()
        self._tps: Mapping[int, TopicPartition] = {}
        self._placed: dict[int, TopicPartition] = {}
        self._seen_ms: dict[int, int] = {}
        self._told: dict[int, int] = {}
        self._telling: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: Settings, topic: str, group: str, *, share: int = 1, fetch_factor: int = 1
    ) -> AsyncGenerator[Source, None]:
        """Joins the group. `share` consumers of this process divide its memory; `fetch_factor` enlarges fetches."""
        session_ms = round(settings.kafka_session_timeout_s * 1000)
        partition_bytes = min(_LARGEST_FETCH_BYTES, _PARTITION_FETCH_BYTES * fetch_factor)
        consumer = AIOKafkaConsumer(
            topic,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            check_crcs=True,
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=min(3000, session_ms // 4),
            max_poll_interval_ms=_NEVER_MS,  # waiting for the database is no reason to leave
            max_partition_fetch_bytes=partition_bytes,
            fetch_max_bytes=max(1 << 20, partition_bytes, _FETCH_BYTES // share),
            **client_arguments(settings, "ingest"),
        )
        source = cls(consumer, topic)
        try:
            with kafka_errors():
                # Joining may have to wait until the group has given up a lost member.
                async with asyncio.timeout(_CALL_S + settings.kafka_session_timeout_s):
                    await start(consumer)
        except UnknownTopicOrPartitionError:
            await source._close()
            raise _no_topic(topic) from None
        except BaseException:
            await source._close()
            raise
        try:
            yield source
        finally:
            await source._close()

    async def _close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait([self._telling])
        # stop() hangs while the broker is away, and needs more than one cancellation to end.
        stopping = asyncio.create_task(self._consumer.stop())
        for _ in range(3):
            _, running = await asyncio.wait([stopping], timeout=_ENDING_S)
            if not running:
                break
            stopping.cancel()
        if stopping.done() and not stopping.cancelled() and (error := stopping.exception()):
            _log.debug("a consumer ended with an error", extra={"error": str(error)})

    @property
    def moved(self) -> bool:
        """Whether the group has assigned other partitions since `assignment` was called."""
        return self._consumer.assignment() is not self._assigned

    def assignment(self) -> list[int]:
        """The partitions to read from now on; none is read until it is placed.

        Raises KafkaUnavailable when there are none because the topic does not exist.
        """
        self._assigned = self._consumer.assignment()
        if not self._assigned and not self._consumer.partitions_for_topic(self._topic):
            raise _no_topic(self._topic)
        self._tps = {tp.partition: tp for tp in self._assigned}
        self._placed = {}
        self._seen_ms = {}
        self._told = {}
        return sorted(self._tps)

    async def bounds(self, partitions: Collection[int]) -> dict[int, tuple[int, int]]:
        """The first and the end offset of each partition's log."""
        if not partitions:
            return {}
        tps = [self._tps[partition] for partition in partitions]
        with kafka_errors():
            async with asyncio.timeout(_CALL_S):
                begins = await self._consumer.beginning_offsets(tps)
                ends = await self._consumer.end_offsets(tps)
        return {tp.partition: (begins[tp], ends[tp]) for tp in tps}

    def place(self, partition: int, offset: int) -> None:
        """Reads the partition from this offset on."""
        tp = self._tps[partition]
        self._consumer.seek(tp, offset)
        self._consumer.resume(tp)
        self._placed[partition] = tp
        self._seen_ms.pop(partition, None)

    def pause(self, partition: int, offset: int) -> None:
        """Stops reading the partition."""
        tp = self._tps[partition]
        self._consumer.pause(tp)
        self._consumer.seek(tp, offset)  # a partition without an offset would hold up all others of its broker
        self._placed.pop(partition, None)

    async def wait(self, timeout_s: float) -> Fetched | None:
        """The next record of any partition, as soon as there is one."""
        tps = list(self._placed.values())
        if not tps:
            await asyncio.sleep(timeout_s)
            return None
        with _errors(None):
            # Takes one record, so that an error of one partition cannot lose records of another.
            found = await self._getmany(*tps, timeout_s=timeout_s, limit=1)
        return next((Fetched(tp.partition, records, records[0].offset + 1) for tp, records in found.items()), None)

    async def read(self, partition: int, limit: int) -> Fetched | None:
        """Up to `limit` fetched records of a partition; None once other partitions are assigned."""
        tp = self._placed[partition]
        with _errors(partition):
            found = await self._getmany(tp, timeout_s=0, limit=limit)
        if self.moved:
            return None
        return Fetched(partition, found.get(tp, ()), await self._consumer.position(tp))

    async def _getmany(
        self, *tps: TopicPartition, timeout_s: float, limit: int
    ) -> Mapping[TopicPartition, Sequence[ConsumedRecord]]:
        try:
            async with asyncio.timeout(timeout_s + _REJOINING_S):
                found = await self._consumer.getmany(*tps, timeout_ms=round(timeout_s * 1000), max_records=limit)
        except TimeoutError:  # while the group assigns partitions
            return {}
        # After another assignment, records may not follow the offset where the partition was placed.
        return {} if self.moved else found

    def lost_sight(self, partition: int) -> bool:
        """Whether brokers were silent about the partition for so long that its topic may be another; True only once."""
        polled_ms = self.polled_ms(partition)
        seen_ms = self._seen_ms.setdefault(partition, polled_ms)
        self._seen_ms[partition] = polled_ms
        return 0 < seen_ms < polled_ms - _LOST_SIGHT_MS

    def polled_ms(self, partition: int) -> int:
        """When a broker last answered for the partition, in Unix milliseconds; 0: never."""
        return 0 if self.moved else self._consumer.last_poll_timestamp(self._tps[partition]) or 0

    def ends(self, partition: int) -> tuple[int, int]:
        """The end of the log, and the offset up to which open transactions let it be read, as a broker last said."""
        if self.moved:
            return 0, 0
        tp = self._tps[partition]
        end = self._consumer.highwater(tp) or 0
        stable = self._consumer.last_stable_offset(tp)
        return end, end if stable is None or stable < 0 else stable

    def mirror(self, positions: Mapping[int, int]) -> None:
        """Commits positions that changed to the brokers, for tools that show lag. Nothing else depends on it."""
        news = {self._tps[number]: offset for number, offset in positions.items() if self._told.get(number) != offset}
        if news and not self.moved and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._tell(news))

    async def mirrored(self, timeout_s: float) -> None:
        """Waits for the answer to `mirror`."""
        if self._telling is not None:
            await asyncio.wait([self._telling], timeout=timeout_s)

    async def _tell(self, news: Mapping[TopicPartition, int]) -> None:
        try:
            async with asyncio.timeout(_CALL_S):
                await self._consumer.commit(news)
        except (KafkaError, TimeoutError) as error:
            _log.debug("the brokers did not take the copy of the offsets", extra={"error": str(error)})
        else:
            self._told |= {tp.partition: offset for tp, offset in news.items()}


def _no_topic(topic: str) -> KafkaUnavailable:
    return KafkaUnavailable(f"topic {topic} does not exist; run: orchestrator topics create")


@contextmanager
def _errors(partition: int | None) -> Iterator[None]:
    """Raises an error of this module, by its remedy, for what aiokafka raises about the records of a partition."""
    try:
        yield
    except RecordTooLargeError as error:
        raise TooLargeError(str(error)) from error
    except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
        raise MisplacedError(str(error)) from error
    except (CorruptRecordException, UnsupportedCodecError, ValueError) as error:
        raise UnreadableError(partition, str(error) or type(error).__name__) from error
