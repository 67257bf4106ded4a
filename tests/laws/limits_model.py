"""The model of limits: an event, a destination's limits and a lane's breaker, as the design describes them.

Nothing here reads the database or the product's code. Defaults and bounds are repeated as literals on purpose: a model
that took them from the product would share its mistakes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from tests.laws.leased import Leased
from tests.support.sql_client import Lease, seconds


@dataclass
class Event(Leased):
    """An event as the model sees it."""

    id: str
    scheduled_at: datetime
    due_at: datetime
    host: str
    max_retries: int
    priority: int
    key: str | None
    spread_s: float | None
    blocking: bool
    attempt: int = 0
    released: int = 0
    retrying: bool = False
    lease_until: datetime | None = None
    bound_lane: int | None = None
    end: str | None = None
    blocks: bool = False

    def shifted(self, spread_s: float) -> datetime:
        """Its due time under a spread: its id decides how far into the spread."""
        return self.scheduled_at + seconds(spread_s * int(self.id[-8:], 16) / 2**32)

    @property
    def rank(self) -> tuple[datetime, str]:
        return self.scheduled_at, self.id


@dataclass
class Limits:
    """A configured destination."""

    lane: int
    rate: float | None = None
    burst: int = 1
    max_parallel: int | None = None
    spread_s: float | None = None
    timeout_s: float | None = None
    breaker_failures: int = 10
    breaker_ratio: float = 0.5
    breaker_minimum: int = 20
    breaker_window_s: float = 30.0
    breaker_cooldown_s: float = 5.0
    breaker_max_cooldown_s: float = 300.0
    adaptive: bool = False
    paused: bool = False
    next_slot_at: datetime | None = None
    slots: list[datetime] = field(default_factory=list)
    parallel_now: float | None = None
    throttled_at: datetime | None = None

    @property
    def gap(self) -> timedelta:
        return seconds(1 / self.rate) if self.rate else timedelta()

    def arrival(self, now: datetime) -> datetime | None:
        """The theoretical arrival time (GCRA), unless the clock was set back: then it lies too far ahead."""
        at = self.next_slot_at
        return at if at is not None and at <= now + seconds(11) + (self.burst + 1) * self.gap else None

    def next_start(self, now: datetime) -> datetime:
        at = self.arrival(now)
        return now if at is None else max(now, at - (self.burst - 1) * self.gap)

    def take(self, start: datetime, now: datetime) -> None:
        at = self.arrival(now)
        self.next_slot_at = (start if at is None else max(start, at)) + self.gap
        self.slots.append(start)

    def bound(self, default: int | None) -> int | None:
        """How many may be under way at once."""
        most = self.max_parallel or default
        return most if most is None or self.parallel_now is None else min(most, math.floor(self.parallel_now))

    def adapt(self, results: list[Noted], now: datetime) -> None:
        """AIMD: seven tenths when throttled, at most once a second; one more for every round of successes."""
        if not self.adaptive or self.max_parallel is None:
            return
        if any(each.throttled for each in results):
            if self.throttled_at is None or not now - seconds(1) < self.throttled_at <= now:
                self.parallel_now = max(1.0, 0.7 * (self.parallel_now or self.max_parallel))
                self.throttled_at = now
        elif self.parallel_now is not None:
            grown = self.parallel_now + sum(each.ok for each in results) / self.parallel_now
            self.parallel_now = grown if grown < self.max_parallel else None


class Noted(NamedTuple):
    """A result, as breakers count it."""

    ok: bool
    throttled: bool
    started_at: datetime


@dataclass
class Breaker:
    """The breaker of one lane."""

    state: str = "closed"
    failures: int = 0
    window_at: datetime | None = None
    attempts: int = 0
    failed: int = 0
    openings: int = 0
    open_until: datetime | None = None
    opened_at: datetime | None = None
    tried_at: datetime | None = None

    def lets_through(self, now: datetime) -> bool:
        if self.state == "closed" or self.open_until is None or self.open_until <= now:
            return True
        return any(at is not None and at > now for at in (self.opened_at, self.tried_at))  # the clock was set back

    def counts(self, result: Noted) -> bool:
        """An attempt that began before a breaker opened does not decide its trial."""
        if self.state == "half_open" and self.tried_at:
            return result.started_at >= self.tried_at - seconds(0.01)
        return self.state == "closed"

    def note(self, results: list[Noted], limits: Limits, now: datetime) -> None:
        """The results of one call that count. All of them ended at the same time."""
        count = [each.ok for each in results]
        if not count or (all(count) and not self.failures and self.window_at is None and self.state == "closed"):
            return
        failed = count.count(False)
        window = seconds(limits.breaker_window_s)
        failures = 0 if any(count) else self.failures + failed
        if self.window_at is None or not now - window <= self.window_at <= now:
            self.window_at = now if failed else None
            self.attempts, self.failed = (len(count) if failed else 0), failed
        else:
            self.attempts += len(count)
            self.failed += failed
        if self.state == "half_open":
            opens = not any(count)
            closes = not opens
        else:
            by_row = limits.breaker_failures > 0 and failures >= limits.breaker_failures
            by_ratio = limits.breaker_ratio > 0 and (
                self.attempts >= limits.breaker_minimum and self.failed >= limits.breaker_ratio * self.attempts
            )
            opens, closes = failed > 0 and (by_row or by_ratio), False
        self.failures = failures
        if opens or closes:
            self.failures = self.attempts = self.failed = 0
            self.window_at = None
        if opens:
            cooldown_s = min(limits.breaker_cooldown_s * 2**self.openings, limits.breaker_max_cooldown_s)
            self.open_until = now + seconds(cooldown_s)
            self.openings += 1
            if self.state == "closed":
                self.opened_at = now
            self.state = "open"
        elif closes:
            self.state, self.openings, self.open_until = "closed", 0, None


class Given(NamedTuple):
    """A lease, the worker that was given it, and when."""

    lease: Lease
    worker: int
    at: datetime
