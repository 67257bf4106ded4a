"""Deliveries to Kafka: due events go out in batches, and each is finished once its record is acknowledged.

A record that was not acknowledged in time may have arrived nevertheless. Its event is tried again, so delivery is at
least once, and consumers recognise repeats by `orchestrator-event-id`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from orchestrator.database import Claimed
from orchestrator.dispatch.attempt import (
    DELIVERED,
    FAIL,
    RECORDING_S,
    RETRY,
    Attempted,
    finished,
    has_expired,
    note_lateness,
    rfc3339,
    slot_missed,
)
from orchestrator.dispatch.clock import DatabaseClock
from orchestrator.dispatch.finisher import Finisher
from orchestrator.dispatch.http.secrets import SECRET_WAIT_S, SecretError, Secrets
from orchestrator.dispatch.options import NO_OPTIONS, Options, options_of
from orchestrator.dispatch.queue.due_queue import DueQueue
from orchestrator.dispatch.queue.stalls import QUICK_S, Stalls
from orchestrator.errors import KafkaUnavailable, OrchestratorError, OwnFaultError
from orchestrator.events.destination_name import destination_name
from orchestrator.events.topics import topic_rules
from orchestrator.events.tracing import with_tracing
from orchestrator.kafka.bulk_producer import BulkProducer, bulk_producer
from orchestrator.kafka.partition_queues import OutgoingRecord, RecordRefusedError
from orchestrator.metrics import Metrics
from orchestrator.own_faults import Postponing
from orchestrator.settings import Settings

_MAX_IN_FLIGHT = 2000
_MAX_IN_FLIGHT_BYTES = 1 << 25
_AWAY_S = 15.0  # the least wait of an event that found no broker: an outage must not use up its attempts
_UNCONFIGURED_S = 60.0
_OWN_PREFIX = "orchestrator-"
_CONTENT_TYPE = ("content-type", b"application/json")

_DELIVERED = Attempted(DELIVERED)
_UNCONFIGURED = Attempted(
    RETRY, error="KAFKA_BOOTSTRAP_SERVERS is not set for this dispatcher", retry_after_s=_UNCONFIGURED_S
)


class _Attempt(NamedTuple):
    event: Claimed
    options: Options
    started_at: float
    began_s: float
    payload_bytes: int


class KafkaDeliveries:
    """Attempts events when they are due. `on_taken` is called whenever some have left the queue.

    At most 2,000 records, or 32 MiB of them, are under way. While no broker answers, attempts fail at once. While
    brokers hang, waiting events are handed back, so that deliveries over HTTP go on. Every record has
    HTTP_TIMEOUT_SECONDS to be acknowledged, even if its destination sets another time-out.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: DatabaseClock,
        finisher: Finisher,
        on_taken: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._finisher = finisher
        self._on_taken = on_taken
        self._needed_s = settings.http_timeout_s + RECORDING_S
        self._secrets = Secrets(settings.secrets_directory)
        self._topics = topic_rules(settings)
        self._bytes = 0
        self._acknowledged = asyncio.Event()
        self._producer: BulkProducer[_Attempt] | None = None
        self.due = DueQueue(clock.now, on_room=on_room)
        self.stalls = Stalls(self.due, finisher.release, on_taken, window=0)
        self.in_flight = 0
        self._postponing = Postponing(metrics)
        self._fault: OwnFaultError | None = None

    async def run(self) -> None:
        """Works until closed and done; when cancelled, it records the attempts that it cut short."""
        if self._settings.kafka_servers is None:
            while events := await self.due.take(_MAX_IN_FLIGHT):
                self._on_taken()
                self._conclude(self._begun(events), _UNCONFIGURED)
            return
        timeout_s = self._settings.http_timeout_s
        async with bulk_producer(self._settings, "dispatch", self._on_result, timeout_s=timeout_s) as producer:
            self._producer = producer
            while events := await self.due.take(_MAX_IN_FLIGHT - self.in_flight):
                self._on_taken()
                if not await producer.ready():
                    self._finisher.release(events)
                    continue
                fault = self._fault or (producer.away.own if producer.away else None)
                if fault is not None:
                    await self._postpone(events, fault)
                    continue
                self._send(producer, self._begun(events))
                while self.in_flight >= _MAX_IN_FLIGHT or self._bytes >= _MAX_IN_FLIGHT_BYTES:
                    await self._next_result()
            while self.in_flight:
                await self._next_result()

    def close(self) -> list[Claimed]:
        """Begins no more attempts; returns the events that still wait for theirs."""
        if self._producer is not None:
            self._producer.stop_waiting()
        self._postponing.close()
        return self.due.close()

    async def _postpone(self, events: Sequence[Claimed], fault: OwnFaultError) -> None:
        self._fault = None
        try:
            await self._postponing.pause(fault, len(events))
        finally:
            self._finisher.release(events)

    async def _next_result(self) -> None:
        self._acknowledged.clear()
        try:
            async with asyncio.timeout(QUICK_S):
                await self._acknowledged.wait()
        except TimeoutError:
            self.stalls.stall_all()

    def _begun(self, events: Sequence[Claimed]) -> list[_Attempt]:
        started_at, latest, began_s = self._clock.now(), self._clock.latest(), time.monotonic()
        attempts = []
        for event in events:
            options = NO_OPTIONS if event.options is None else options_of(event.options)
            # Its attempt might end after another dispatcher has begun one.
            too_late = latest + self._needed_s > event.lease_until or has_expired(event, latest)
            if too_late or (options.rate and slot_missed(event, started_at, self._metrics)):
                self._finisher.release([event])
                continue
            note_lateness(event, started_at, self._metrics)
            attempt = _Attempt(event, options, started_at, began_s, len(event.payload))
            attempts.append(attempt)
            self._bytes += attempt.payload_bytes
        self.in_flight += len(attempts)
        return attempts

    def _send(self, producer: BulkProducer[_Attempt], attempts: Sequence[_Attempt]) -> None:
        topics: dict[str, list[OutgoingRecord[_Attempt]]] = defaultdict(list)
        for attempt in attempts:
            if attempt.options.fault is not None:
                self._conclude([attempt], attempt.options.fault)
                continue
            if refusal := self._topics.fault("KAFKA", attempt.event.destination):
                self._conclude([attempt], Attempted(FAIL, error=f"destination: {refusal}"))
                continue
            try:
                record = _record(attempt, self._secrets)
                topics[attempt.event.destination or self._settings.topic_ready].append(record)
            except SecretError as error:
                self._conclude([attempt], Attempted(RETRY, error=str(error), retry_after_s=SECRET_WAIT_S))
            except OwnFaultError as fault:
                self._give_back([attempt], fault)
            except ValueError as error:  # headers that came through SQL may hold this
                self._conclude([attempt], Attempted(FAIL, error=f"headers: cannot be sent: {error}"))
        for topic, records in topics.items():
            producer.send(topic, records)

    def _on_result(self, attempts: Sequence[_Attempt], error: OrchestratorError | None) -> None:
        if error is None:
            self._conclude(attempts, _DELIVERED)
        elif isinstance(error, RecordRefusedError):
            self._conclude(attempts, Attempted(FAIL, error=str(error)))
        elif isinstance(error, KafkaUnavailable) and error.own is not None:
            self._give_back(attempts, error.own)
        else:
            retry_after_s = _AWAY_S if isinstance(error, KafkaUnavailable) else None
            self._conclude(attempts, Attempted(RETRY, error=str(error), retry_after_s=retry_after_s))

    def _give_back(self, attempts: Sequence[_Attempt], fault: OwnFaultError) -> None:
        """Hands attempts back without spending them: this machine failed. The next ones begin after a pause."""
        self._fault = fault
        self._bytes -= sum(attempt.payload_bytes for attempt in attempts)
        self.in_flight -= len(attempts)
        self._finisher.release([attempt.event for attempt in attempts])
        if self.due.stalled:
            self.stalls.recover_all()
        self._acknowledged.set()

    def _conclude(self, attempts: Sequence[_Attempt], attempted: Attempted) -> None:
        now_s = time.monotonic()
        observe = self._metrics.event_delivery_seconds("KAFKA", attempted.verdict).observe
        results = []
        for attempt in attempts:
            took_s = now_s - attempt.began_s
            observe(took_s)
            name = destination_name("KAFKA", attempt.event.destination)
            self._metrics.destination_attempts_total.count("KAFKA", name, attempted.verdict)
            self._bytes -= attempt.payload_bytes
            results.append(finished(attempt.event, attempted, attempt.started_at, took_s))
        self.in_flight -= len(attempts)
        self._finisher.add(*results, at_once=any(attempt.options.bound for attempt in attempts))
        if self.due.stalled:
            self.stalls.recover_all()
        self._acknowledged.set()


def _record(attempt: _Attempt, secrets: Secrets) -> OutgoingRecord[_Attempt]:
    event = attempt.event
    headers = _own_headers(event, attempt.options.secret_headers, secrets)
    headers += (
        ("orchestrator-event-id", event.event_id.encode()),
        ("orchestrator-attempt", b"%d" % event.attempt),
        ("orchestrator-scheduled-at", rfc3339(event.scheduled_at).encode()),
        _CONTENT_TYPE,
    )
    key = event.key.encode() if event.key is not None else None
    return OutgoingRecord(key, event.payload.encode(), headers, attempt)


def _own_headers(event: Claimed, secret_headers: Mapping[str, str] | None, secrets: Secrets) -> list[tuple[str, bytes]]:
    """An event's headers without those that deliveries set; its destination's secret headers replace others.

    Raises ValueError, SecretError.
    """
    given = msgspec.json.decode(event.headers, type=dict[str, str]) if event.headers else {}
    headers = with_tracing(given, event.correlation_id, event.traceparent) or {}
    if secret_headers:
        replaced = {name.lower() for name in secret_headers}
        headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
        headers |= {name: secrets.header(secret) for name, secret in secret_headers.items()}
    return [
        (name, value.encode())
        for name, value in headers.items()
        if not (lower := name.lower()).startswith(_OWN_PREFIX) and lower != "content-type"
    ]
