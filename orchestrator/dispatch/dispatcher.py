"""Claims events shortly before they are due, delivers each on time, and records what came of it.

One process runs a claimer, a listener, a finisher and as many delivery loops as HTTP connections. The claimer
keeps up to SCHEDULER_PREFETCH leased events in memory; polling finds what is due, notifications only make it
look sooner. When the database goes away, deliveries go on, results wait, and claiming resumes with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from contextlib import suppress
from typing import Protocol

import msgspec
import psycopg

from orchestrator.config import Settings
from orchestrator.database import NOTIFY_CHANNEL, Claimed, Finished, Leases, connect
from orchestrator.dispatch.clock import DatabaseClock
from orchestrator.dispatch.due_queue import DueQueue
from orchestrator.dispatch.finisher import Finisher
from orchestrator.dispatch.http import Attempted, Delivery
from orchestrator.errors import DatabaseUnavailable
from orchestrator.metrics import Metrics

_CLAIM_GAP_S = 0.01  # between claims that found less than a batch
_CLAIM_AHEAD_S = 0.25  # how long before it is due an expected event is claimed
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0
_LISTEN_S = 60.0

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """What delivers: `HttpSender`, or nothing at all in a benchmark of the rest."""

    async def send(self, delivery: Delivery) -> Attempted: ...


class Dispatcher:
    """One per process. `run` works until `stop` is set, then ends within SHUTDOWN_TIMEOUT_SECONDS."""

    def __init__(self, settings: Settings, metrics: Metrics, sender: Sender) -> None:
        self._settings = settings
        self._metrics = metrics
        self._sender = sender
        self._clock = DatabaseClock()
        self._due = DueQueue(self._clock.now)
        self._finisher = Finisher(metrics, self._expect)
        self._name = f"{settings.deployment} {socket.gethostname()}:{os.getpid()}"
        self._worker: int | None = None
        self._in_flight = 0
        self._stopping = asyncio.Event()
        self._room = asyncio.Event()
        self._wake = asyncio.Event()
        self._wake_due = float("inf")
        metrics.events_held.set_function(lambda: len(self._due))
        metrics.events_in_flight.set_function(lambda: self._in_flight)

    async def run(self, stop: asyncio.Event) -> None:
        """Dispatches until `stop` is set: then claims no more, lets running attempts end, releases the rest."""
        settings = self._settings
        async with asyncio.TaskGroup() as background:
            recording = background.create_task(self._connected(), name="claim and finish")
            listening = background.create_task(self._listen(), name="listen")
            deliveries = [background.create_task(self._deliver()) for _ in range(settings.http_max_connections)]
            await stop.wait()
            deadline_s = time.monotonic() + settings.shutdown_timeout_s
            listening.cancel()
            self._stopping.set()
            self._wake.set()
            self._room.set()
            self._finisher.release(self._due.close())
            _, running = await asyncio.wait(deliveries, timeout=max(0.0, 0.8 * settings.shutdown_timeout_s))
            for task in running:
                task.cancel()
            self._finisher.close()
            _, unrecorded = await asyncio.wait([recording], timeout=max(0.5, deadline_s - time.monotonic()))
            if unrecorded:
                recording.cancel()
            if running or self._finisher.pending:
                _log.warning(
                    "stopped with work unfinished; its leases run out by themselves",
                    extra={"attempts_running": len(running), "results_unrecorded": self._finisher.pending},
                )

    async def _connected(self) -> None:
        """Claims and finishes; connects again, with backoff, for as long as it takes."""
        backoff_s = 0.0
        while True:
            try:
                async with Leases.open(self._settings, self._name, self._worker) as leases:
                    if backoff_s:
                        self._metrics.database_reconnects_total.inc()
                        _log.warning("the database is back")
                    self._worker = leases.worker
                    backoff_s = 0.0
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._finisher.run(leases), name="finish")
                        both.create_task(self._claim(leases), name="claim")
                return
            except* DatabaseUnavailable as group:
                backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s or _FIRST_BACKOFF_S)
                _log.warning(
                    "the database is away; trying again",
                    extra={
                        "error": str(group.exceptions[0]),
                        "retry_in_s": backoff_s,
                        "results_waiting": self._finisher.pending,
                    },
                )
            if self._stopping.is_set() and not self._finisher.pending:
                return
            await asyncio.sleep(backoff_s * (0.5 + random.random() / 2))

    async def _claim(self, leases: Leases) -> None:
        settings, batch = self._settings, self._settings.batch_size
        while not self._stopping.is_set():
            while len(self._due) > settings.prefetch - batch and not self._stopping.is_set():
                self._room.clear()
                await self._room.wait()
            if self._stopping.is_set():
                return
            self._wake.clear()
            self._wake_due = float("inf")
            sent_s = time.monotonic()
            database_s, events = await leases.claim(batch, lease_s=settings.lease_s, lookahead_s=settings.lookahead_s)
            received_s = time.monotonic()
            self._clock.sample(database_s, sent_s, received_s)
            self._metrics.claim_seconds.observe(received_s - sent_s)
            if self._stopping.is_set():
                self._finisher.release(events)
                return
            if events:
                self._metrics.events_claimed_total.inc(len(events))
                self._due.put(events)
            if len(events) < batch:
                await self._rest(leases)

    async def _rest(self, leases: Leases) -> None:
        """Waits for the next poll, or until an event that no claim has seen may be due sooner."""
        poll_s = self._settings.poll_interval_s * random.uniform(1.0, 1.05)
        if self._settings.lookahead_s < poll_s:
            next_due = await leases.next_due_at()
            if next_due is not None:
                self._wake_at(next_due - self._settings.lookahead_s)
        ends_s = time.monotonic() + poll_s
        earliest_s = time.monotonic() + _CLAIM_GAP_S
        while (now_s := time.monotonic()) < ends_s and not self._stopping.is_set():
            until_due_s = self._wake_due - self._clock.now()
            if until_due_s <= 0 and now_s >= earliest_s:
                return
            wait_s = min(ends_s - now_s, max(until_due_s, earliest_s - now_s))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()

    def _expect(self, due_at: float) -> None:
        """Has the claimer look in time for an event that is due at `due_at`, yet not at once for each of many."""
        self._wake_at(due_at - min(self._settings.lookahead_s, _CLAIM_AHEAD_S))

    def _wake_at(self, database_s: float) -> None:
        """Has the claimer look again no later than this Unix time by the database's clock."""
        if database_s < self._wake_due:
            self._wake_due = database_s
            self._wake.set()

    async def _listen(self) -> None:
        """Hears of submissions that are due before the next poll. A hint: polling finds them all the same."""
        while True:
            with suppress(DatabaseUnavailable, psycopg.OperationalError, OSError):
                async with await connect(self._settings, "listen") as connection:
                    await connection.execute(f"listen {NOTIFY_CHANNEL}")
                    while True:
                        async for notification in connection.notifies(timeout=_LISTEN_S):
                            self._expect(float(notification.payload))
            await asyncio.sleep(_LAST_BACKOFF_S * random.random())

    async def _deliver(self) -> None:
        while (event := await self._due.get()) is not None:
            if not self._room.is_set() and len(self._due) <= self._settings.prefetch - self._settings.batch_size:
                self._room.set()
            started_at = self._clock.now()
            if started_at + self._settings.http_timeout_s > event.lease_until:
                self._finisher.release([event])  # it might end after somebody else had begun
                continue
            self._metrics.event_lateness_seconds.observe(started_at - event.due_at)
            began_s = time.monotonic()
            self._in_flight += 1
            try:
                attempted = await self._sender.send(_delivery(event))
            finally:
                self._in_flight -= 1
            took_s = time.monotonic() - began_s
            self._metrics.event_delivery_seconds("HTTP", attempted.verdict).observe(took_s)
            self._finisher.add(
                Finished(
                    event.event_id,
                    event.attempt,
                    attempted.verdict,
                    attempted.status_code,
                    started_at,
                    started_at + took_s,
                    attempted.error,
                    attempted.response,
                    attempted.retry_after_s,
                )
            )


def _delivery(event: Claimed) -> Delivery:
    return Delivery(
        event.event_id,
        event.attempt,
        f"{event.scheduled_at[:10]}T{event.scheduled_at[11:-3]}Z",  # the server writes 2030-01-31 08:00:00.5+00
        event.destination,
        event.payload.encode(),
        msgspec.json.decode(event.headers, type=dict[str, str]) if event.headers else None,
    )
