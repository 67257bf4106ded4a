"""Deliveries over HTTP: one loop for each connection, each with one attempt under way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from orchestrator.database import Claimed
from orchestrator.dispatch.attempt import (
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
from orchestrator.dispatch.http.sender import Delivery
from orchestrator.dispatch.options import NO_OPTIONS, Options, options_of
from orchestrator.dispatch.queue.destination_queue import http_windows
from orchestrator.dispatch.queue.due_queue import DueQueue
from orchestrator.dispatch.queue.stalls import QUICK_S, Stalls
from orchestrator.errors import OwnFaultError
from orchestrator.events.tracing import with_tracing
from orchestrator.metrics import Metrics
from orchestrator.own_faults import Postponing
from orchestrator.settings import Settings

_CUT_SHORT = Attempted(RETRY, error="the dispatcher stopped before the receiver answered")

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """What makes an attempt: `HttpSender`, or a stand-in in benchmarks of the rest."""

    async def send(self, delivery: Delivery) -> Attempted: ...


class HttpDeliveries:
    """Attempts events when they are due.

    `on_taken` is called whenever an event has left the queue, `on_room` when a stalled destination has room again.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: DatabaseClock,
        finisher: Finisher,
        on_taken: Callable[[], None],
        on_room: Callable[[], None],
        sender: Sender,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._finisher = finisher
        self._on_taken = on_taken
        self._sender = sender
        windows = http_windows(settings)
        kept = min(windows.first, max(0, settings.prefetch_due - 2 * settings.batch_size) // 10)
        self.due = DueQueue(clock.now, windows, on_room)
        self.stalls = Stalls(self.due, finisher.release, on_taken, windows.first, kept)
        self.in_flight = 0
        self._postponing = Postponing(metrics)

    async def run(self) -> None:
        """Works until closed and done; when cancelled, it records the attempts that it cut short."""
        async with asyncio.TaskGroup() as watching:
            watch = watching.create_task(self.stalls.watch())
            async with asyncio.TaskGroup() as attempts:
                for _ in range(self._settings.http_max_connections):
                    attempts.create_task(self._deliver())
            watch.cancel()

    def close(self) -> list[Claimed]:
        """Begins no more attempts; returns the events that still wait for theirs."""
        self._postponing.close()
        return self.due.close()

    async def _deliver(self) -> None:
        due = self.due
        while (event := await due.get()) is not None:
            self._on_taken()
            options = NO_OPTIONS if event.options is None else options_of(event.options)
            started_at, latest = self._clock.now(), self._clock.latest()
            timeout_s = options.timeout_s or self._settings.http_timeout_s
            # Its attempt might end after another dispatcher has begun one.
            too_late = latest + timeout_s + RECORDING_S > event.lease_until or has_expired(event, latest)
            if too_late or (options.rate and slot_missed(event, started_at, self._metrics)):
                due.ended(event)
                self._finisher.release([event])
                continue
            note_lateness(event, started_at, self._metrics)
            began_s = time.monotonic()
            self.in_flight += 1
            attempted: Attempted | None = _CUT_SHORT
            try:
                attempted = options.fault or await self._sender.send(_delivery(event, options))
            except msgspec.MsgspecError as error:
                attempted = Attempted(FAIL, error=f"headers: cannot be read: {error}")
            except OwnFaultError as fault:
                attempted = None
                await self._postponing.pause(fault)  # within this loop: every other event would fail alike
            except Exception as error:  # one event must not end all the others
                _log.exception("an attempt failed unexpectedly", extra=_followed(event))
                attempted = Attempted(RETRY, error=f"internal error: {type(error).__name__}")
            finally:
                self.in_flight -= 1
                took_s = time.monotonic() - began_s
                if attempted is None:
                    due.ended(event)
                    self._finisher.release([event])
                else:
                    quick = took_s <= QUICK_S and (attempted.error is None or not attempted.timed_out)
                    name = due.ended(event, quick)
                    self._metrics.event_delivery_seconds("HTTP", attempted.verdict).observe(took_s)
                    self._metrics.destination_attempts_total.count("HTTP", name, attempted.verdict)
                    self._finisher.add(finished(event, attempted, started_at, took_s), at_once=options.bound)


def _followed(event: Claimed) -> dict[str, str]:
    """What a line of the log names an event by."""
    return {"event_id": event.event_id} | ({"correlation_id": event.correlation_id} if event.correlation_id else {})


def _delivery(event: Claimed, options: Options) -> Delivery:
    return Delivery(
        event.event_id,
        event.attempt,
        rfc3339(event.scheduled_at),
        event.destination or "",
        event.payload.encode(),
        with_tracing(
            msgspec.json.decode(event.headers) if event.headers else None, event.correlation_id, event.traceparent
        ),
        options.timeout_s,
        options.signing_secret,
        options.secret_headers,
    )
