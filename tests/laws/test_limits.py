"""Any history of limits, failures, pauses, moves of the clock and claims by several workers keeps what limits promise.

The model beside the database is the specification in Python: it routes events to destinations, counts slots of a rate
and of a bound, runs every breaker and keeps the order of keys. What claims may not give is checked on each claim; what
they must give, on each claim that came to its end; and at the end of every history everything must drain.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, LiteralString, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.laws.leased import Leased
from tests.support.databases import Databases
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, Lease, Result, seconds, wait_for
from tests.support.sql_client import event as submission

LEASE_S = 30
RETRY_S = 7  # of the policies that the model uses: no jitter
HOUR = timedelta(hours=1)
GRAIN = timedelta(microseconds=20)
"""Times of slots are whole microseconds, gaps between them are not."""
AHEAD = timedelta(milliseconds=50)
"""How long before they are due events are claimed that take a slot."""
MANY = 200
NAMES = ["a.one.example", "b.one.example", "two.example", "*.one.example", "*.example"]
KEYS = [None, None, None, "red", "blue"]
SETTINGS: dict[str, Any] = {
    "rate": st.sampled_from([None, 0.2, 2.0, 7.0]),
    "burst": st.integers(1, 4),
    "max_parallel": st.sampled_from([None, None, 1, 3]),
    "spread_s": st.sampled_from([None, None, 15]),
    "breaker_failures": st.sampled_from([0, 2, 4]),
    "breaker_ratio": st.sampled_from([0, 0.5]),
    "adaptive": st.booleans(),
}
RESULTS = st.sampled_from([("delivered", 200), ("retry", None), ("retry", 429), ("retry", 500), ("fail", 404)])


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
        """When it is due under a spread: a share of it that its id decides."""
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
        """The theoretical arrival time; one that lies so far ahead is of a clock that was set back."""
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
    """Of one lane."""

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
        """What began before a breaker opened says nothing about its try."""
        if self.state == "half_open" and self.tried_at:
            return result.started_at >= self.tried_at - seconds(0.01)
        return self.state == "closed"

    def note(self, results: list[Noted], limits: Limits, now: datetime) -> None:
        """Results in one call, all that count. All ended at the same time."""
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
    """A lease, and who was given it when."""

    lease: Lease
    worker: int
    at: datetime


class Histories(RuleBasedStateMachine):
    client: Client
    hosts: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.now = NOON
        self.events: dict[str, Event] = {}
        self.limits: dict[str, Limits] = {}
        self.breakers: defaultdict[int, Breaker] = defaultdict(Breaker)
        self.given: list[Given] = []
        self.stepped_back = False
        self.jobs = 0

    @initialize(**SETTINGS)
    def start(self, **limits: Any) -> None:
        self.client.rows(
            """truncate orchestrator.event, orchestrator.horizon, orchestrator.timer, orchestrator.outcome,
            orchestrator.dead_letter, orchestrator.statistic, orchestrator.statistic_folded"""
        )
        self.client.forget_floors()
        self.client.forget_destinations()
        self.client.rows("select setseed(0)")  # claims shuffle the lanes
        self.client.at(self.now)
        self.configure(0, **limits)

    # What the model knows

    def destination_of(self, host: str) -> str | None:
        """The configured destination that a host belongs to: itself, else the longest pattern, else the first."""
        if host in self.limits:
            return host
        patterns = [name for name in self.limits if "*" in name and fnmatch.fnmatchcase(host, name)]
        return min(patterns, key=lambda name: (-len(name.replace("*", "")), name), default=None)

    def live(self) -> list[Event]:
        return [each for each in self.events.values() if not each.end]

    def held_back(self, event: Event) -> bool:
        """Whether its ordering key has it wait."""
        return event.key is not None and any(
            (other.end is None and (other.rank < event.rank or other.held(self.now))) or other.blocks
            for other in self.events.values()
            if other.key == event.key and other is not event
        )

    # Submitting and finishing

    @rule(
        due_s=st.lists(st.sampled_from([-30, -9, -9, -2, 0, 0.5, 4, 15, 40]), min_size=1, max_size=8),
        retries=st.integers(0, 2),
        host=st.integers(0, 2),
        priority=st.sampled_from([0, 0, 0, 5, -3]),
        key=st.sampled_from(KEYS),
        spread_s=st.sampled_from([None, None, 20]),
        blocking=st.booleans(),
    )
    def submit(
        self,
        due_s: list[float],
        retries: int,
        host: int,
        priority: int,
        key: str | None,
        spread_s: float | None,
        blocking: bool,
    ) -> None:
        name = self.hosts[host]
        batch = []
        for offset in due_s:
            self.jobs += 1
            batch.append(
                submission(
                    external_job_id=str(self.jobs), scheduled_at=self.now + seconds(offset), max_retries=retries,
                    destination=f"https://{name}/", priority=priority, ordering_key=key, spread_seconds=spread_s,
                    retry_policy="blocking" if blocking else "passing",
                )
            )  # fmt: skip
        answers = sorted(self.client.submit(*batch))
        assert [answer.result for answer in answers] == ["accepted"] * len(batch)
        destination = self.destination_of(name)
        window_s = spread_s or (self.limits[destination].spread_s if destination else None)
        for answer, offset in zip(answers, due_s, strict=True):
            at = self.now + seconds(offset)
            made = Event(str(answer.id), at, at, name, retries, priority, key, spread_s, blocking)
            made.due_at = max(self.now, made.shifted(window_s or 0))
            self.events[made.id] = made

    @precondition(lambda self: self.given)
    @rule(some=st.lists(st.integers(0, MANY), min_size=1, max_size=4), kinds=st.lists(RESULTS, min_size=1, max_size=3))
    def finish(self, some: list[int], kinds: list[tuple[str, int | None]]) -> None:
        """By whoever was given a lease once, sooner or later, rightly or not."""
        self._finish_given([self.given[n % len(self.given)] for n in some], kinds)

    def _finish_given(self, given: list[Given], kinds: list[tuple[str, int | None]]) -> None:
        worker = given[0].worker if given else 1
        batch: dict[tuple[str, int], Result] = {}
        for n, each in enumerate(given):
            lease = each.lease
            if each.worker == worker and lease.start_at <= self.now:
                started = max(lease.start_at, each.at)
                batch[lease.event_id, lease.attempt] = Result(
                    lease.event_id, lease.attempt, *kinds[n % len(kinds)], started_at=started.timestamp(),
                    finished_at=self.now.timestamp(),
                )  # fmt: skip
        self._finish(batch, worker)

    def _finish(self, batch: dict[tuple[str, int], Result], worker: int) -> None:
        lanes = self._lanes_of(uid for uid, _ in batch)
        self.client.finish(list(batch.values()), worker=worker)
        self.given = [each for each in self.given if (each.lease.event_id, each.lease.attempt) not in batch]
        noted: defaultdict[str | int, list[Noted]] = defaultdict(list)
        for (uid, attempt), result in sorted(batch.items()):
            event = self.events[uid]
            if event.end or event.lease_until is None or event.attempt != attempt:
                continue
            if result.result == "retry" and not event.exhausted:
                event.due_at = max(self.now + seconds(RETRY_S), event.scheduled_at)
                event.retrying = True
            else:
                event.end = "delivered" if result.result == "delivered" else "dead"
                event.blocks = event.end == "dead" and event.key is not None and event.blocking
            event.lease_until = event.bound_lane = None
            if lanes[uid] > 63 or result.result == "retry":
                started_at = datetime.fromtimestamp(result.started_at or 0, NOON.tzinfo)
                failed, throttled = result.result == "retry", result.status_code in (None, 429)
                noted[lanes[uid] if lanes[uid] > 63 else event.host].append(
                    Noted(not failed, failed and throttled, started_at)
                )
        own = {name: lane for name, lane, _ in self._own_lanes()}
        by_lane: defaultdict[int, list[Noted]] = defaultdict(list)
        for where, results in noted.items():
            if isinstance(where, int):
                by_lane[where] += results
            else:  # in a shared lane when it was leased
                by_lane[own[where] if where in own else own[self.destination_of(where) or ""]] += results
        settings = {lane: self.limits.get(name, Limits(lane)) for name, lane in own.items()}
        for lane, results in by_lane.items():
            if lane in settings:
                count = [each for each in results if self.breakers[lane].counts(each)]
                settings[lane].adapt(count, self.now)
                self.breakers[lane].note(count, settings[lane], self.now)

    def _lanes_of(self, ids: Iterable[str]) -> dict[str, int]:
        return {
            str(uid): lane
            for uid, lane in self.client.rows(
                "select event_id, lane from orchestrator.timer where event_id = any (%s::uuid[])", list(ids)
            )
        }

    def _own_lanes(self) -> list[tuple[str, int, bool]]:
        rows = self.client.rows(
            "select l.name, l.lane, d.configured from orchestrator.lane l join orchestrator.destination d using (name)"
        )
        return [(name, lane, configured) for name, lane, configured in rows]

    @precondition(lambda self: self.given)
    @rule(n=st.integers(0, MANY))
    def release(self, n: int) -> None:
        lease = self.given.pop(n % len(self.given)).lease
        event = self.events[lease.event_id]
        holds = event.end is None and event.lease_until is not None and event.attempt == lease.attempt
        lane = self._lanes_of([event.id]).get(event.id, 0)
        assert self.client.release([lease]) == int(holds)
        if holds:
            event.lease_until = event.bound_lane = None
            event.released += 1
            if self.breakers[lane].state == "half_open":
                self.breakers[lane].open_until = self.now

    @precondition(lambda self: self.events)
    @rule(n=st.integers(0, MANY), does=st.sampled_from(["cancel", "redrive", "pass"]))
    def end_or_raise(self, n: int, does: str) -> None:
        dead = [each for each in self.events.values() if each.end == "dead"]
        if does == "cancel":
            parked = [uid for uid, lane in self._lanes_of(self.events).items() if lane < 0]
            ahead = [each for each in self.live() if each.key in {self.events[uid].key for uid in parked}]
            some = sorted(ahead, key=lambda each: each.rank)[:2] or list(self.events.values())
            self._cancel(some[n % len(some)])
        elif dead:
            self._raise(dead[n % len(dead)], redrive=does == "redrive")

    def _cancel(self, event: Event) -> None:
        [answer] = self.client.cancel(event.id)
        if event.end:
            assert answer.result == ("already_cancelled" if event.end == "cancelled" else "finished")
        elif event.held(self.now):
            assert answer.result == "in_flight"
        else:
            assert answer.result == "cancelled"
            event.end, event.lease_until = "cancelled", None

    def _raise(self, event: Event, *, redrive: bool) -> None:
        if redrive:
            self.client.rows("select orchestrator.redrive_event(%s)", event.id)
            event.end, event.due_at, event.released = None, max(self.now, event.scheduled_at), event.attempt
            event.retrying = True
        else:
            assert self.client.value("select orchestrator.pass_dead_letter(%s)", event.id) is event.blocks
        event.blocks = False

    # Destinations

    @rule(name=st.integers(0, len(NAMES) - 1), **SETTINGS)
    def configure(
        self,
        name: int,
        rate: float | None,
        burst: int,
        max_parallel: int | None,
        spread_s: float | None,
        breaker_failures: int,
        breaker_ratio: float,
        adaptive: bool,
    ) -> None:
        adaptive = adaptive and max_parallel is not None
        destination = self._name(name)
        clear = [
            setting
            for setting, value in (("rate_per_second", rate), ("max_parallel", max_parallel), ("spread", spread_s))
            if value is None
        ]
        [lane] = self.client.column(
            """select lane from orchestrator.configure_destination(%s, p_rate_per_second => %s, p_burst => %s,
              p_max_parallel => %s, p_adaptive => %s, p_spread => make_interval(secs => %s), p_timeout => '40 s',
              p_breaker_failures => %s, p_breaker_ratio => %s, p_breaker_minimum => 5,
              p_breaker_window => '10 s', p_breaker_cooldown => '2 s',
              p_breaker_max_cooldown => '5 s', p_clear => %s)""",
            destination, rate, burst, max_parallel, adaptive, spread_s, breaker_failures, breaker_ratio, clear,
        )  # fmt: skip
        before = self.limits.get(destination)
        after = Limits(
            lane, rate, burst, max_parallel, spread_s, 40.0, breaker_failures, breaker_ratio, 5, 10.0, 2.0, 5.0,
            adaptive,
        )  # fmt: skip
        if before:
            assert lane == before.lane
            after.paused = before.paused
            if (before.rate, before.burst) == (rate, burst):
                after.next_slot_at, after.slots = before.next_slot_at, before.slots
            after.throttled_at = before.throttled_at
            if (before.max_parallel, before.adaptive) == (max_parallel, adaptive):
                after.parallel_now = before.parallel_now
        self.limits[destination] = after

    def _name(self, n: int) -> str:
        return self.hosts[n] if n < len(self.hosts) else NAMES[n]

    @rule(does=st.sampled_from(["pause", "resume", "resume", "delete", "pause all"]), n=st.integers(0, MANY))
    def operate(self, does: str, n: int) -> None:
        if does == "pause":
            self._pause(self._name(n % len(NAMES)))
        elif does == "pause all":
            self.client.rows("select orchestrator.pause_all()")
            assert self.client.claim(MANY) == []
            self.client.rows("select orchestrator.resume_all()")
        elif does == "resume":
            for name in self.limits:
                self._resume(name)
        elif self.limits:
            name = sorted(self.limits)[n % len(self.limits)]
            assert len(self.client.rows("select orchestrator.delete_destination(%s)", name)) == 1
            self.breakers.pop(self.limits.pop(name).lane, None)

    def _pause(self, destination: str) -> None:
        self.client.rows("select orchestrator.pause_destination(%s)", destination)
        [lane] = self.client.column("select lane from orchestrator.lane where name = %s", destination)
        if destination not in self.limits:
            over = self.destination_of(destination)
            self.limits[destination] = Limits(lane)
            if over:  # its settings become those of the host
                self.limits[destination] = Limits(
                    **{
                        **vars(self.limits[over]),
                        "lane": lane,
                        "next_slot_at": None,
                        "slots": [],
                        "parallel_now": None,
                        "throttled_at": None,
                    }
                )
        self.limits[destination].paused = True

    def _resume(self, destination: str) -> None:
        self.client.rows("select orchestrator.resume_destination(%s)", destination)
        self.limits[destination].paused = False

    # Time

    @rule(passed_s=st.sampled_from([0.1, 1, 3, 10, LEASE_S, 120, 3600, -3600]))
    def wait(self, passed_s: float) -> None:
        """An hour is a step of the clock, which goes back, too."""
        moment = self.now + seconds(passed_s)
        if abs(moment - NOON) < 6 * HOUR:
            self._set_clock(moment)
        if passed_s < 0:
            self.stepped_back = True
            for each in self.limits.values():
                each.slots = []

    def _set_clock(self, moment: datetime) -> None:
        self.now = moment
        self.client.at(moment)

    @rule()
    def raise_floors(self) -> None:
        self.client.rows("select orchestrator.raise_floors()")

    @rule()
    def maintain(self) -> None:
        self.client.rows("select orchestrator.run_maintenance(1, 1)")
        lanes = {lane for _, lane, _ in self._own_lanes()}
        for lane in set(self.breakers) - lanes:
            del self.breakers[lane]

    # Claiming

    @rule(
        batch=st.sampled_from([1, 4, MANY, MANY]),
        lookahead_s=st.sampled_from([0, 0, 1.5, 10]),
        worker=st.integers(1, 3),
        max_parallel=st.sampled_from([None, None, 2]),
    )
    def claim(self, batch: int, lookahead_s: float, worker: int, max_parallel: int | None) -> None:
        self._claim_and_keep(batch, lookahead_s, worker, max_parallel)

    def _claim_and_keep(self, batch: int, lookahead_s: float, worker: int, max_parallel: int | None) -> None:
        leases = self._claim(batch, lookahead_s, worker, max_parallel)
        self.given += [Given(lease, worker, self.now) for lease in leases]

    @rule(passed_s=st.sampled_from([0, 0.1, 1, 3, 8]), kinds=st.lists(RESULTS, min_size=1, max_size=4))
    def work(self, passed_s: float, kinds: list[tuple[str, int | None]]) -> None:
        """What a dispatcher does while time passes."""
        self._set_clock(self.now + seconds(passed_s))
        self._claim_and_keep(MANY, 1.5, 1, None)
        self._finish_given(self.given, kinds)

    def _claim(self, batch: int, lookahead_s: float, worker: int, max_parallel: int | None) -> list[Lease]:
        until = self.now + seconds(lookahead_s)
        leases: list[Lease] = []
        for _ in range(MANY):
            lanes = self._lanes_of(each.id for each in self.live())
            due = {each.id: each.due_at for each in self.live()}
            given = self.client.claim(
                batch - len(leases), worker=worker, lease_s=LEASE_S, lookahead_s=lookahead_s, max_parallel=max_parallel
            )
            again_at = self.client.claim_again_at()
            self._note_what_claims_moved()
            self._may_be_given(given, until, max_parallel)
            stayed = {each.id: lanes[each.id] for each in self.live() if each.due_at == due[each.id]}
            self._higher_go_first(given, stayed)
            leases += given
            if len(leases) >= batch or again_at is None or again_at > self.now:
                break
        else:
            raise AssertionError(f"claims do not come to an end: the last one said {again_at}")
        if len(leases) < batch:
            self._nothing_more_can_be_given(until, max_parallel, again_at)
        return leases

    def _note_what_claims_moved(self) -> None:
        """Claims put off what was submitted before its destination was spread, and bury what is forsaken."""
        kept = {str(uid): due_at for uid, due_at in self.client.rows("select event_id, due_at from orchestrator.timer")}
        for event in self.live():
            if event.id not in kept:
                assert event.forsaken
                event.end, event.lease_until = "dead", None
                event.blocks = event.key is not None and event.blocking
            elif kept[event.id] != event.due_at:
                spread_s = self._spread_s(event)
                assert event.attempt == 0
                assert spread_s
                assert event.due_at < kept[event.id] == event.shifted(spread_s)
                event.due_at = kept[event.id]

    def _spread_s(self, event: Event) -> float | None:
        """The spread that its destination gives it."""
        destination = self.destination_of(event.host)
        return self.limits[destination].spread_s if destination and not event.spread_s else None

    def _may_be_given(self, leases: list[Lease], until: datetime, max_parallel: int | None) -> None:
        by_lane: defaultdict[int, list[Lease]] = defaultdict(list)
        for lease in leases:
            event = self.events[lease.event_id]
            assert not event.end
            assert not event.held(self.now)
            assert not event.forsaken
            assert not self.held_back(event), f"{event} is not the first of its key"
            assert lease.due_at == event.due_at <= until
            if (spread_s := self._spread_s(event)) and event.attempt == 0:
                assert lease.due_at >= event.shifted(spread_s)
            by_lane[lease.lane].append(lease)
            event.attempt += 1
            event.lease_until = lease.lease_until
            event.bound_lane = None
            assert lease.attempt == event.attempt
            assert lease.due_at <= lease.start_at <= max(until, lease.due_at) + AHEAD
            assert lease.lease_until >= max(until, lease.start_at) + seconds(LEASE_S) - GRAIN
            destination = self.destination_of(event.host)
            if destination is None:
                assert lease.start_at == lease.due_at
            else:
                limits = self.limits[destination]
                assert lease.lane == limits.lane, f"{event.host} belongs to {destination}"
                assert not limits.paused
                assert limits.rate or lease.start_at == lease.due_at, f"{lease} of {destination}: {limits}"
                assert lease.lease_until >= lease.start_at + seconds((limits.timeout_s or 0) + 5), (
                    f"{lease} of {limits}"
                )
            if not self.stepped_back:
                late_ms = (max(lease.start_at, self.now) - lease.due_at) / timedelta(milliseconds=1)
                assert all(0 < waited_ms <= late_ms + 1 for waited_ms in (lease.waited or {}).values())
        own = {lane: name for name, lane, _ in self._own_lanes()}
        for lane, given in by_lane.items():
            if lane < 64:
                continue
            self._breaker_may_give(lane, given)
            limits = self.limits.get(own[lane], Limits(lane))
            if limits.rate:
                self._rate_may_give(limits, given)
            bound = limits.bound(max_parallel)
            if bound:
                for lease in given:
                    self.events[lease.event_id].bound_lane = lane
                assert self._under_way(lane) <= bound

    def _higher_go_first(self, leases: list[Lease], lanes: dict[str, int]) -> None:
        """Of what is due in an own lane, and was there before the claim, none that is left is of a higher priority."""
        left = [
            each
            for each in self.live()
            if each.due_at <= self.now and not each.held(self.now) and not each.forsaken and each.key is None
        ]
        for lease in leases:
            lowest = self.events[lease.event_id].priority
            for each in left:
                if lanes.get(each.id) == lease.lane > 63 and self._belongs(each, lease.lane):
                    assert each.priority <= lowest, f"{each} was left when {lease} was given"

    def _belongs(self, event: Event, lane: int) -> bool:
        destination = self.destination_of(event.host)
        return destination is not None and self.limits[destination].lane == lane

    def _breaker_may_give(self, lane: int, given: list[Lease]) -> None:
        breaker = self.breakers[lane]
        if breaker.state != "closed":
            assert breaker.lets_through(self.now)
            assert len(given) == 1
            breaker.state, breaker.tried_at, breaker.open_until = "half_open", self.now, given[0].lease_until

    def _rate_may_give(self, limits: Limits, given: list[Lease]) -> None:
        """GCRA: no slot sooner than the arrival time less the burst; and so no window with more than it may hold."""
        for start in sorted(max(lease.start_at, self.now) for lease in given):
            assert start >= limits.next_start(self.now) - GRAIN
            limits.take(start, self.now)
        limits.slots.sort()
        for n, last in enumerate(limits.slots):
            count = sum(last - seconds(10) < at for at in limits.slots[: n + 1])
            assert count <= (limits.rate or 0) * 10 + limits.burst + 1e-3

    def _under_way(self, lane: int) -> int:
        return sum(each.held(self.now) for each in self.live() if each.bound_lane == lane)

    def _nothing_more_can_be_given(self, until: datetime, max_parallel: int | None, again_at: datetime | None) -> None:
        own = {name: lane for name, lane, _ in self._own_lanes()}
        lost = {each.key for each in self.live() if each.lease_until is not None and not each.held(self.now)}
        lanes = self._lanes_of(each.id for each in self.live())
        for event in self.live():
            if event.due_at > until or event.held(self.now) or event.forsaken or self.held_back(event):
                continue
            if event.key in lost - {None}:
                continue  # whoever is first is let in when a claim comes across the one whose lease ran out
            destination = self.destination_of(event.host)
            lane = self.limits[destination].lane if destination else own.get(event.host)
            limits = self.limits[destination] if destination else Limits(lane or 0)
            if limits.paused or (lane and self.breakers[lane].state != "closed"):
                continue
            if lanes[event.id] > 63 and lanes[event.id] != lane:
                continue  # it no longer belongs there, and moves as that lane's limits allow, or by maintenance
            bound = limits.bound(max_parallel) if lane else None
            if bound and self._under_way(lane or 0) >= bound:
                continue
            if (bound or limits.rate) and event.due_at > self.now + AHEAD:
                assert again_at is not None
                assert again_at <= event.due_at
                continue
            assert limits.rate, f"{event} was not given"
            ends = min(until, self.now + AHEAD) if bound else until
            assert limits.next_start(self.now) > ends - GRAIN, f"{event} could have had a slot"
            assert again_at is not None

    @invariant()
    def laws_are_kept(self) -> None:
        found = violations(self.client.connection, acknowledged=self.events, clock_goes_forward=not self.stepped_back)
        assert found == [], found

    @invariant()
    def the_database_agrees_on_breakers_and_bounds(self) -> None:
        rows = self.client.rows(
            """select lane, name, breaker, openings, case when breaker <> 'closed' then open_until end, parallel_now
            from orchestrator.lane where name is not null"""
        )
        for lane, name, state, openings, open_until, parallel_now in rows:
            breaker, limits = self.breakers[lane], self.limits.get(name, Limits(lane))
            assert (state, openings) == (breaker.state, breaker.openings), name
            assert state == "closed" or open_until == breaker.open_until, name
            assert parallel_now == limits.parallel_now, name

    @invariant()
    def the_database_agrees_on_events(self) -> None:
        shown = Counter(self.client.column("select status from orchestrator.event_status"))
        expected = Counter(
            each.end or ("in_flight" if each.held(self.now) else "retrying" if each.retrying else "scheduled")
            for each in self.events.values()
        )
        assert shown == expected

    def teardown(self) -> None:
        """Everything comes to an end: nothing was lost on the way."""
        for name in self.limits:
            self._resume(name)
        for event in self.events.values():
            if event.blocks:
                self._raise(event, redrive=False)
        for _ in range(20 * len(self.events) + 20):
            leases = self._claim(MANY, 1.5, 1, None)
            self._set_clock(max([self.now, *(lease.start_at for lease in leases)]))
            self._finish_given([Given(lease, 1, self.now) for lease in leases], [("delivered", 200)])
            if not self.live():
                break
            if not leases:
                self.maintain()
                self._set_clock(self._next_moment())
        assert not self.live()

    def _next_moment(self) -> datetime:
        """When something may change by itself."""
        moments = [self.client.claim_again_at(), *(each.open_until for each in self.breakers.values())]
        moments += [at for each in self.live() for at in (each.due_at, each.lease_until)]
        return min((at for at in moments if at is not None and at > self.now), default=self.now + seconds(LEASE_S))


@pytest.mark.hypothesis
@pytest.mark.timeout(300)
def test_every_history_keeps_the_limits(databases: Databases) -> None:
    with databases.migrated() as url, Client(url) as client:
        client.keep_three_days()
        for name, blocks in (("passing", False), ("blocking", True)):
            client.rows(
                "insert into orchestrator.retry_policy (name, jitter, schedule, dead_blocks) values (%s, 0, %s, %s)",
                name, [seconds(RETRY_S)], blocks,
            )  # fmt: skip
        hosts = [*NAMES[:2], _neighbour(client, NAMES[0])]
        run_state_machine_as_test(
            type("Machine", (Histories,), {"client": client, "hosts": hosts}),
            settings=settings(
                max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


def _neighbour(client: Client, host: str) -> str:
    """Another host that shares its lane."""
    name: str = client.value(
        """select 'two-' || n || '.test' from generate_series(1, 1000) n
        where hashtextextended('two-' || n || '.test', 0) & 63 = hashtextextended(%s, 0) & 63 limit 1""",
        host,
    )
    return name


# Real sessions at once, on the real clock


class Fleet:
    """Threads that work until told to stop; what one of them raises fails the test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self.stopping = threading.Event()

    def start(self, count: int, work: Callable[[Client, int], None]) -> None:
        """`work` is given a session of its own and a number from 1, again and again."""
        for number in range(1, count + 1):
            self._threads.append(threading.Thread(target=self._run, args=(work, number)))
            self._threads[-1].start()

    def _run(self, work: Callable[[Client, int], None], number: int) -> None:
        try:
            with Client(self._url) as client:
                while not self.stopping.is_set():
                    work(client, number)
        except BaseException as error:
            self._errors.append(error)
            self.stopping.set()

    def finish(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


@contextmanager
def fleet(url: str) -> Iterator[Fleet]:
    working = Fleet(url)
    try:
        yield working
    finally:
        working.finish()


def _backlog(client: Client, host: str, count: int) -> None:
    client.rows(
        """select orchestrator.submit_events((
          select jsonb_agg(jsonb_build_object('source', 'tests', 'scheduled_at', to_json(now()) #>> '{}',
            'destination', 'https://' || %s || '/', 'payload', n)) from generate_series(1, %s) n))""",
        host, count,
    )  # fmt: skip


def test_eight_sessions_keep_a_rate_and_reach_it(database_url: str) -> None:
    rate, burst, run_s = 300, 20, 4.0
    starts: list[float] = []
    with Client(database_url) as client:
        client.rows("select orchestrator.configure_destination('one.example', %s, %s)", rate, burst)
        _backlog(client, "one.example", int(rate * run_s * 2))
    with fleet(database_url) as working:

        def work(client: Client, number: int) -> None:
            leases = client.claim(20, worker=number, lookahead_s=0.2)
            starts.extend(lease.start_at.timestamp() for lease in leases)
            client.finish([Result(lease.event_id, lease.attempt) for lease in leases], worker=number)
            if not leases:
                time.sleep(0.005)

        working.start(8, work)
        working.stopping.wait(run_s)
    starts.sort()
    for n in range(len(starts)):
        window = sum(at < starts[n] + 1.0 for at in starts[n:])
        assert window <= rate + burst, f"{window} in a second"
    assert len(starts) - burst >= 0.95 * rate * (starts[-1] - starts[0])


def test_eight_sessions_never_exceed_a_bound_though_some_vanish(database_url: str) -> None:
    bound, run_s, lease_s = 5, 4.0, 1.0
    under_way: list[tuple[float, int]] = []
    with Client(database_url) as client:
        client.rows("select orchestrator.configure_destination('one.example', p_max_parallel => %s)", bound)
        _backlog(client, "one.example", 3000)
    with fleet(database_url) as working:

        def work(client: Client, number: int) -> None:
            leases = client.claim(3, worker=number, lease_s=lease_s, lookahead_s=0.2)
            if not leases:
                time.sleep(0.005)
            elif random.random() < 0.02:
                return  # these leases run out
            else:
                under_way.append((time.monotonic(), len(leases)))
                time.sleep(random.uniform(0, 0.01))
                under_way.append((time.monotonic(), -len(leases)))
                client.finish([Result(lease.event_id, lease.attempt) for lease in leases], worker=number)

        def watch(client: Client, _: int) -> None:
            leased = client.value("select count(*) from orchestrator.timer where lease_until > clock_timestamp()")
            assert leased <= bound
            time.sleep(0.01)

        working.start(8, work)
        working.start(1, watch)
        working.stopping.wait(run_s)
    counts = list(itertools.accumulate(change for _, change in sorted(under_way)))
    assert max(counts) <= bound
    assert sum(change for _, change in under_way if change > 0) > 200  # it did not stand still


def test_two_sessions_that_trip_a_breaker_at_once_open_it_once(database_url: str) -> None:
    # Who looks on is in no transaction: in one, the server shows the activity of when it was first asked.
    with Client(database_url) as first, Client(database_url) as second, Client(database_url) as observer:
        first.rows("select orchestrator.configure_destination('one.example', p_breaker_failures => 3)")
        first.schedule_many(6, destination="https://one.example/", scheduled_at=datetime.now(NOON.tzinfo))
        leases = first.claim(6)
        assert len(leases) == 6
        results = [Result(lease.event_id, lease.attempt, "retry") for lease in leases]
        with ThreadPoolExecutor(1) as thread:
            with first.transaction():
                first.finish(results[:3])
                finishing = thread.submit(second.finish, results[3:])
                observer.wait_until_blocked(second)
            finishing.result(10)
        assert first.rows("select breaker, openings from orchestrator.lane where name = 'one.example'") == [("open", 1)]


def test_events_of_a_key_end_in_order_and_one_at_a_time_under_every_load(database_url: str) -> None:
    """Their times grow as they are submitted; claims, retries, releases and cancels go on all the while."""
    keys, each = 6, 60
    ended: defaultdict[str, list[int]] = defaultdict(list)
    holding: Counter[str] = Counter()
    lock = threading.Lock()
    submitted = Counter[int]()
    hosts = ["https://one.example/", "https://two.example/", "https://three.example/"]
    with Client(database_url) as client:
        client.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('soon', 0, '{5 ms}')")
        client.rows("select orchestrator.configure_destination('one.example', p_max_parallel => 4)")
        client.rows("select orchestrator.configure_destination('two.example', 500, 50, p_breaker_failures => 0)")
        client.rows("select orchestrator.configure_destination('three.example', p_breaker_failures => 0)")

    def submit(client: Client, number: int) -> None:
        for key in range(number, keys + 1, 2):
            if submitted[key] < each:
                now = datetime.now(NOON.tzinfo)
                client.submit(
                    *[
                        submission(
                            source=f"key {key}", external_job_id=str(submitted[key] + n), ordering_key=f"key {key}",
                            scheduled_at=now + timedelta(microseconds=n), destination=random.choice(hosts),
                            retry_policy="soon", max_retries=100, priority=random.choice([0, 3]),
                        )
                        for n in range(3)
                    ]
                )  # fmt: skip
                submitted[key] += 3
        time.sleep(0.01)

    def work(client: Client, number: int) -> None:
        leases = client.claim(random.choice([2, 50]), worker=number)
        with lock:
            for lease in leases:
                holding[lease.source] += 1
                assert holding[lease.source] == 1, f"two of {lease.source} at a time"
        time.sleep(random.uniform(0, 0.004))
        kinds = random.choices(["delivered", "retry", "release"], [6, 2, 1], k=len(leases))
        with lock:
            for lease, kind in zip(leases, kinds, strict=True):
                holding[lease.source] -= 1
                if kind == "delivered":
                    ended[lease.source].append(int(lease.external_job_id or -1))
        client.finish(
            [
                Result(lease.event_id, lease.attempt, kind)
                for lease, kind in zip(leases, kinds, strict=True)
                if kind != "release"
            ],
            worker=number,
        )
        client.release([lease for lease, kind in zip(leases, kinds, strict=True) if kind == "release"])

    def cancel(client: Client, _: int) -> None:
        ids = client.column("select event_id from orchestrator.timer order by random() limit 1")
        for uid in ids:
            client.cancel(str(uid))
        time.sleep(0.02)

    def operate(client: Client, _: int) -> None:
        client.rows(random.choice(operations))
        time.sleep(0.02)

    operations: list[LiteralString] = [
        "select orchestrator.run_maintenance(1, 1)",
        "select orchestrator.configure_destination('*.example', p_max_parallel => 7, p_breaker_failures => 3)",
        "select orchestrator.configure_destination('three.example', 500, 50, 3)",
        "select orchestrator.delete_destination('*.example')",
        "select orchestrator.delete_destination('three.example')",
        "select orchestrator.pause_destination('two.example')",
        "select orchestrator.resume_destination('two.example')",
        "select orchestrator.close_breaker('*.example')",
    ]
    with fleet(database_url) as working, Client(database_url) as client:
        working.start(2, submit)
        working.start(4, work)
        working.start(1, cancel)
        working.start(1, operate)
        wait_for(lambda: working.stopping.is_set() or min(submitted[key] for key in range(1, keys + 1)) >= each, 20)
        operations[:] = ["select orchestrator.resume_destination('two.example')"]
        wait_for(lambda: working.stopping.is_set() or not client.value("select count(*) from orchestrator.timer"), 20)
    with Client(database_url) as client:
        assert violations(client.connection, finished=True) == []
    assert len(ended) == keys
    for key, order in ended.items():
        assert order == sorted(order), f"{key} was delivered out of order"
