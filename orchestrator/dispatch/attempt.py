"""An attempt to deliver an event, over HTTP or to Kafka: whether it may begin, and its outcome."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.database import Claimed, Finished
from orchestrator.metrics import LATE_S, Metrics

RECORDING_S = 1.0
"""An attempt must end this long before its lease does, so that its result can be recorded."""

_SLOT_S = 0.25  # after its start, within which an attempt may still use its slot under a rate limit

DELIVERED, RETRY, FAIL = "delivered", "retry", "fail"


class Attempted(NamedTuple):
    """The outcome of an attempt. `verdict`: ``delivered``, ``retry`` (try again later) or ``fail`` (final).

    `response` quotes up to 1,024 characters of a failure's body; `retry_after_s` is how long to wait at least.
    """

    verdict: str
    status_code: int | None = None
    error: str | None = None
    response: str | None = None
    retry_after_s: float | None = None

    @property
    def timed_out(self) -> bool:
        return self.error is not None and self.error.startswith("timeout: ")


def note_lateness(event: Claimed, started_at: float, metrics: Metrics) -> None:
    """Counts how late an attempt begins; it counts as late only if no pause, breaker or limit held its event back."""
    late_s = started_at - event.due_at
    metrics.event_lateness_seconds.observe(late_s)
    if late_s > LATE_S and event.waited is None:
        metrics.events_late_total.inc()


def slot_missed(event: Claimed, started_at: float, metrics: Metrics) -> bool:
    """Whether an attempt that begins now would miss its slot under a rate limit; the next claim gives it another."""
    if started_at <= event.start_at + _SLOT_S:
        return False
    metrics.event_slots_missed_total.inc()
    return True


def has_expired(event: Claimed, latest: float) -> bool:
    """Whether no attempt may begin any more; the next claim ends the event."""
    return event.expires_at is not None and latest >= event.expires_at


def finished(event: Claimed, attempted: Attempted, started_at: float, took_s: float) -> Finished:
    """The result of an attempt, as the finisher records it."""
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
        event.waited,
        event.correlation_id,
        event.scheduled_at,
        event.due_at,
        event.timer,
    )


def rfc3339(timestamp: str) -> str:
    """A time of PostgreSQL, 2030-01-31 08:00:00.5+00, in the form that the API and deliveries use."""
    return f"{timestamp[:10]}T{timestamp[11:-3]}Z"
