"""Histories of submissions, results, operators, moves of the clock and claims by several workers, under limits.

The model beside the database is the specification in Python: it routes events to destinations, counts slots of a rate
and of a bound, runs every breaker and keeps the order of keys. At the end of every history all events must end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.laws.limits_claims import LEASE_S, MANY, ClaimChecks
from tests.laws.limits_model import Breaker, Event, Given, Limits, Noted
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, Result, seconds
from tests.support.sql_client import event as submission

RETRY_S = 7  # of the policies that the model uses: no jitter
HOUR = timedelta(hours=1)
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


class Histories(ClaimChecks, RuleBasedStateMachine):
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
            orchestrator.delivered_batch, orchestrator.dead_letter, orchestrator.statistic,
            orchestrator.statistic_folded"""
        )
        self.client.forget_floors()
        self.client.forget_destinations()
        self.client.rows("select setseed(0)")  # claims shuffle the lanes
        self.client.at(self.now)
        self.configure(0, **limits)

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
        """By a worker that once had the lease: in time or late, with the right to it or without."""
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
        dedicated = {name: lane for name, lane, _ in self._dedicated_lanes()}
        by_lane: defaultdict[int, list[Noted]] = defaultdict(list)
        for where, results in noted.items():
            if isinstance(where, int):
                by_lane[where] += results
            else:  # in a shared lane when it was leased
                by_lane[dedicated[where] if where in dedicated else dedicated[self.destination_of(where) or ""]] += (
                    results
                )
        settings = {lane: self.limits.get(name, Limits(lane)) for name, lane in dedicated.items()}
        for lane, results in by_lane.items():
            if lane in settings:
                count = [each for each in results if self.breakers[lane].counts(each)]
                settings[lane].adapt(count, self.now)
                self.breakers[lane].note(count, settings[lane], self.now)

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
            if over:  # the host takes over the settings of the pattern
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
        """An hour stands for a step of the clock, which may also go back."""
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
        lanes = {lane for _, lane, _ in self._dedicated_lanes()}
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
        """All events end: none was lost on the way."""
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
        """The next time at which the passing of time changes something."""
        moments = [self.client.claim_again_at(), *(each.open_until for each in self.breakers.values())]
        moments += [at for each in self.live() for at in (each.due_at, each.lease_until)]
        return min((at for at in moments if at is not None and at > self.now), default=self.now + seconds(LEASE_S))
