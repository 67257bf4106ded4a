"""Publishes the outbox to Kafka: at least once, and in order for each event."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import lru_cache

import msgspec

from orchestrator.backoff import backoff_s
from orchestrator.database.listening import listen
from orchestrator.database.outbox import OUTBOX_CHANNEL, Message, Outbox
from orchestrator.errors import OrchestratorError
from orchestrator.events.topics import topic_rules
from orchestrator.kafka.bulk_producer import BulkProducer, bulk_producer
from orchestrator.kafka.partition_queues import OutgoingRecord, RecordRefusedError, TopicUnavailableError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import end, within

_BATCH = 5000
_ANSWER_S = 30.0  # for a call of the database; one that hangs is given up with its connection
_BATCH_S = 60.0  # longer than its transaction may last
_ACKNOWLEDGED_S = 15.0  # half of the transaction's time-out; finding a topic is included
_GATHER_S = 0.05  # between batches that were not full
_PENDING_EVERY_S = 1.0
_AGAIN_S = 5.0  # until brokers that were away, or messages that they did not take, are tried again
_PATIENCE_S = 60.0  # how long a topic may be missing before its messages are set aside

_log = logging.getLogger(__name__)


async def publish(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    """Publishes until `stop` is set, then ends in bounded time. Waits for a database or brokers that are away.

    Several processes may publish: one of them works at a time, and another takes over when it ends. A message that the
    brokers will never take is set aside with the reason (`outbox_failure`) and logged. So is one whose topic has not
    existed for a minute.
    """
    await _Publisher(settings, metrics).run(stop)


class _Publisher:
    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._topics = {
            "scheduled": settings.topic_scheduled,
            "timestamp": settings.topic_timestamp,
            "dlq": settings.topic_dlq,
            "answer": settings.topic_answers,
        }
        self._wake = asyncio.Event()
        self._stopping = False
        self._switched = False
        self._floor = 0
        self._pending = 0
        self._counted_s = 0.0
        self._missing: dict[str, float] = {}
        self._waiting = 0
        self._settled = asyncio.Event()
        self._acknowledged: list[Message] = []
        self._failures: list[tuple[Message, OrchestratorError]] = []

    async def run(self, stop: asyncio.Event) -> None:
        async with (
            bulk_producer(
                self._settings, "outbox", self._on_result, timeout_s=_ACKNOWLEDGED_S, ordered=True
            ) as producer,
            asyncio.TaskGroup() as tasks,
        ):
            listening = tasks.create_task(
                listen(self._settings, OUTBOX_CHANNEL, lambda _: self._wake.set(), self._on_listening)
            )
            working = tasks.create_task(self._work(producer))
            await stop.wait()
            self._stopping = True
            self._wake.set()
            producer.stop_waiting()
            if self._switched:  # otherwise it waits for the database, and no message is under way
                await asyncio.wait([working], timeout=0.8 * self._settings.shutdown_timeout_s)
            await end(working, listening)

    def _on_listening(self, listens: bool) -> None:
        if listens:  # what was told before, nobody heard
            self._wake.set()

    async def _work(self, producer: BulkProducer[Message]) -> None:
        failures = 0
        while not self._stopping:
            try:
                async with AsyncExitStack() as opened:
                    outbox = await within(_ANSWER_S, opened.enter_async_context(Outbox.open(self._settings)))
                    if not self._switched:
                        await within(_ANSWER_S, outbox.switch(self._settings.outbox_topics))
                        await within(_ANSWER_S, outbox.tell_topics(topic_rules(self._settings)))
                        self._switched = True
                    self._floor = 0
                    while not self._stopping:
                        await self._round(outbox, producer)
                        failures = 0
            except Exception as error:
                self._metrics.set_outbox(math.nan, math.nan)
                if not isinstance(error, OrchestratorError | TimeoutError):
                    _log.exception("publishing the outbox failed unexpectedly")
                elif not failures:
                    _log.warning(
                        "the outbox waits for the database", extra={"error": str(error) or "no answer in time"}
                    )
                failures += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(backoff_s(failures)):
                        await self._wake_for_stop()

    async def _wake_for_stop(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._wake.wait()

    async def _round(self, outbox: Outbox, producer: BulkProducer[Message]) -> None:
        """Publishes a batch if there may be one, and rests unless more messages wait.

        Without a notification it only counts the messages: that is one statement, a batch is five.
        """
        began_s = time.monotonic()
        notified = self._wake.is_set()
        self._wake.clear()
        reachable = await producer.ready() and producer.away is None
        full, pause_s, rest_s = False, _GATHER_S, self._settings.outbox_interval_s
        if not reachable:
            pause_s, rest_s = _PENDING_EVERY_S, min(_AGAIN_S, rest_s)
        if not notified:
            await self._count(outbox)
        if reachable and not self._stopping and (notified or self._pending):
            full, kept = await within(_BATCH_S, self._publish_batch(outbox, producer))
            if kept:
                full, pause_s, rest_s = False, _PENDING_EVERY_S, min(_AGAIN_S, rest_s)
        if time.monotonic() > self._counted_s + _PENDING_EVERY_S:
            await self._count(outbox)
        if not full:
            await self._rest(began_s + pause_s, began_s + rest_s)

    async def _count(self, outbox: Outbox) -> None:
        self._counted_s = time.monotonic()
        self._pending, oldest_s = await within(_ANSWER_S, outbox.backlog())
        self._metrics.set_outbox(self._pending, oldest_s)

    async def _rest(self, earliest_s: float, latest_s: float) -> None:
        """Waits for a notification of messages, but at least until `earliest_s` and at most until `latest_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, latest_s - time.monotonic())):
                await self._wake.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, earliest_s - time.monotonic())):
                await self._wake_for_stop()

    async def _publish_batch(self, outbox: Outbox, producer: BulkProducer[Message]) -> tuple[bool, int]:
        """Publishes a batch; whether it was full, and how many of its messages must be tried again."""
        async with outbox.batch(_BATCH, self._floor) as messages:
            if not messages:
                return False, 0
            await self._send(producer, messages)
            refused = [(message, error) for message, error in self._failures if self._is_hopeless(message, error)]
            if refused:
                await outbox.failed([m for m, _ in refused], [str(error) for _, error in refused])
            if self._acknowledged:
                await outbox.published(self._acknowledged)
        settled = {message.at for message, _ in refused}
        kept = [(message, error) for message, error in self._failures if message.at not in settled]
        # No new message can appear below the floor; those that are kept must stay above it.
        self._floor = min((message.floor for message, _ in kept), default=messages[-1].floor)
        self._report(refused, kept)
        return len(messages) >= _BATCH, len(kept)

    async def _send(self, producer: BulkProducer[Message], messages: Sequence[Message]) -> None:
        """Sends messages; returns when the producer has reported the outcome of each, within its time-out."""
        self._acknowledged, self._failures, self._waiting = [], [], len(messages)
        self._settled.clear()
        records: dict[str, list[OutgoingRecord[Message]]] = defaultdict(list)
        for message in messages:
            headers = _headers(message.headers) if message.headers else []
            records[self._topics[message.kind]].append(OutgoingRecord(message.key, message.value, headers, message))
        for topic, theirs in records.items():
            producer.send(topic, theirs)
        await self._settled.wait()

    def _on_result(self, messages: Sequence[Message], error: OrchestratorError | None) -> None:
        if error is None:
            self._acknowledged += messages
            self._missing.pop(self._topics[messages[0].kind], None)
        else:
            self._failures += [(message, error) for message in messages]
        self._waiting -= len(messages)
        if not self._waiting:
            self._settled.set()

    def _is_hopeless(self, message: Message, error: OrchestratorError) -> bool:
        if isinstance(error, TopicUnavailableError):
            now_s = time.monotonic()
            return now_s - self._missing.setdefault(self._topics[message.kind], now_s) > _PATIENCE_S
        return isinstance(error, RecordRefusedError)

    def _report(
        self, refused: Sequence[tuple[Message, OrchestratorError]], kept: Sequence[tuple[Message, OrchestratorError]]
    ) -> None:
        self._metrics.outbox_published_total.inc(len(self._acknowledged))
        self._metrics.outbox_failed_total.inc(len(refused))
        if refused:
            _log.error(
                "messages of the outbox were set aside; mend the cause, then call orchestrator.retry_outbox_failures()",
                extra={"count": len(refused), "error": str(refused[0][1])},
            )
        if kept:
            context = {"count": len(kept), "error": str(kept[0][1])}
            _log.warning("messages of the outbox could not be published; trying again", extra=context)


@lru_cache(maxsize=256)
def _headers(text: str) -> list[tuple[str, bytes]]:
    given = msgspec.json.decode(text, type=dict[str, str | None])
    return [(name, value.encode("utf-8", "replace")) for name, value in given.items() if value is not None]
