"""Deliveries over HTTP: as many loops as connections, each with one attempt under way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from orchestrator.config import Settings
from orchestrator.database import Claimed, Finished
from orchestrator.dispatch.attempt import FAIL, RETRY, Attempted
from orchestrator.dispatch.due_queue import DueQueue
from orchestrator.dispatch.finisher import Finisher
from orchestrator.dispatch.http import Delivery
from orchestrator.metrics import Metrics

RECORDING_S = 1.0
"""What an attempt must leave of its lease, to record its result."""

_CUT_SHORT = Attempted(RETRY, error="the dispatcher stopped before the receiver answered")

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """What delivers: `HttpSender`, or nothing at all in a benchmark of the rest."""

    async def send(self, delivery: Delivery) -> Attempted: ...


class HttpDeliveries:
    """Attempts events as they fall due. `on_taken` is called whenever one has left the queue."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        now: Callable[[], float],
        finisher: Finisher,
        on_taken: Callable[[], None],
        sender: Sender,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._finisher = finisher
        self._on_taken = on_taken
        self._sender = sender
        self.due = DueQueue(now)
        self.in_flight = 0

    async def run(self) -> None:
        """Works until closed and done; cancelled, it records what it cut short."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._settings.http_max_connections):
                tasks.create_task(self._deliver())

    def close(self) -> list[Claimed]:
        """Begins no more attempts; returns the events that still wait for theirs."""
        return self.due.close()

    async def _deliver(self) -> None:
        needed_s = self._settings.http_timeout_s + RECORDING_S
        while (event := await self.due.get()) is not None:
            self._on_taken()
            started_at = self._now()
            if started_at + needed_s > event.lease_until:
                self._finisher.release([event])  # it might end after somebody else had begun
                continue
            self._metrics.event_lateness_seconds.observe(started_at - event.due_at)
            began_s = time.monotonic()
            self.in_flight += 1
            attempted = _CUT_SHORT
            try:
                attempted = await self._sender.send(_delivery(event))
            except msgspec.MsgspecError as error:
                attempted = Attempted(FAIL, error=f"headers: cannot be read: {error}")
            except Exception as error:  # one event must not end all the others
                _log.exception("an attempt failed in a way not foreseen", extra={"event_id": event.event_id})
                attempted = Attempted(RETRY, error=f"internal error: {type(error).__name__}")
            finally:
                self.in_flight -= 1
                took_s = time.monotonic() - began_s
                self._metrics.event_delivery_seconds("HTTP", attempted.verdict).observe(took_s)
                self._finisher.add(finished(event, attempted, started_at, took_s))


def finished(event: Claimed, attempted: Attempted, started_at: float, took_s: float) -> Finished:
    """The result of an attempt, as it is recorded."""
    return Finished(
        event.event_id,
        event.attempt,
        attempted.verdict,
        attempted.status_code,
        started_at,
        started_at + took_s,
        attempted.error,
        attempted.response,
        attempted.retry_after_s,
        event.claimed_at,
    )


def rfc3339(timestamp: str) -> str:
    """A time as the server writes it, 2030-01-31 08:00:00.5+00, the way the API writes it."""
    return f"{timestamp[:10]}T{timestamp[11:-3]}Z"


def _delivery(event: Claimed) -> Delivery:
    return Delivery(
        event.event_id,
        event.attempt,
        rfc3339(event.scheduled_at),
        event.destination or "",
        event.payload.encode(),
        msgspec.json.decode(event.headers) if event.headers else None,
    )
