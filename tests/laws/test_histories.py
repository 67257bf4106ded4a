"""Any history of submits, claims, finishes, releases, cancels, reschedules, redrives, maintenance and passing time
keeps the laws.

The model beside the database is the specification in Python: what each call must answer and what it must leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from tests.laws.leased import Leased
from tests.support.databases import Databases
from tests.support.laws import Arrival, violations
from tests.support.sql_client import NOON, Client, Lease, Result, event, seconds
from tests.support.upkeep import attached, maintain

LEASE_S = 30
RETRY_S = 20  # of the policy that the model uses: no jitter
DAY_S = 86400
ENDS = ("delivered", "retried", "dead", "cancelled", "redriven", "rescheduled", "expired")
HOSTS = ["https://one.example", "https://two.example", "https://three.example"]


@dataclass
class Expected(Leased):
    """An event as the model sees it."""

    scheduled_at: datetime
    due_at: datetime
    max_retries: int
    retries: int
    job: str
    expires_at: datetime | None = None
    predecessor: str | None = None
    successor: str | None = None
    attempt: int = 0
    released: int = 0
    retrying: bool = False
    lease_until: datetime | None = None
    end: str | None = None
    gone: bool = False  # with its day, past retention
    history: list[tuple[int, str]] = field(default_factory=list)

    def status(self, now: datetime) -> str:
        if self.end:
            return self.end
        if self.held(now):
            return "in_flight"
        return "retrying" if self.retrying else "scheduled"

    def expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now


class Histories(RuleBasedStateMachine):
    client: Client
    leases: Bundle[tuple[Lease, int]] = Bundle("leases")
    events: Bundle[str] = Bundle("events")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOON
        self.model: dict[str, Expected] = {}
        self.arrivals: list[Arrival] = []
        self.jobs = 0
        self.submitted: dict[str, dict[str, Any]] = {}

    @initialize()
    def start(self) -> None:
        self.client.rows(
            """truncate orchestrator.event, orchestrator.horizon, orchestrator.timer, orchestrator.outcome,
            orchestrator.dead_letter, orchestrator.statistic_folded, orchestrator.statistic"""
        )
        self.client.forget_floors()
        self.client.keep_three_days()
        self.client.forget_destinations()
        self.client.rows("select setseed(0)")  # claims shuffle the lanes
        self.client.at(self.now)

    @rule(
        target=events,
        due_s=st.lists(
            st.integers(-30, 90) | st.integers(-30, 90) | st.integers(2 * DAY_S, 6 * DAY_S), min_size=1, max_size=6
        ),
        retries=st.integers(0, 2),
        host=st.sampled_from(HOSTS),
        life_s=st.sampled_from([None, None, 5, 60, DAY_S]),
    )
    def submit(self, due_s: list[int], retries: int, host: str, life_s: int | None) -> Any:
        """Of life_s, after which they expire."""
        batch = []
        for offset in due_s:
            self.jobs += 1
            at = self.now + seconds(offset)
            batch.append(
                event(
                    external_job_id=str(self.jobs), scheduled_at=at, destination=host, max_retries=retries,
                    retry_policy="fixed", expires_at=... if life_s is None else (at + seconds(life_s)).isoformat(),
                )
            )  # fmt: skip
        answers = sorted(self.client.submit(*batch))
        assert [answer.result for answer in answers] == ["accepted"] * len(batch)
        for answer, item in zip(answers, batch, strict=True):
            at = datetime.fromisoformat(item["scheduled_at"])
            self.model[str(answer.id)] = Expected(
                at, max(at, self.now), retries, retries, item["external_job_id"],
                None if life_s is None else at + seconds(life_s),
            )  # fmt: skip
            self.submitted[str(answer.id)] = item
        return multiple(*[str(answer.id) for answer in answers])

    @rule(uid=events)
    def submit_again(self, uid: str) -> None:
        """Whatever has become of it; one that came back to a time by rescheduling is the one that had it first."""
        [answer] = self.client.submit(self.submitted[uid])
        again = self.model[uid]
        if again.gone:
            assert (answer.result, answer.field) == ("refused", "scheduled_at")
        else:
            first = next(
                other for other, e in self.model.items() if (e.job, e.scheduled_at) == (again.job, again.scheduled_at)
            )
            status = self.model[first].status(self.now)
            assert (answer.id, answer.result, answer.status) == (first, "duplicate", status)

    def _kept(self) -> dict[str, Expected]:
        return {uid: expected for uid, expected in self.model.items() if not expected.gone}

    def _waiting(self) -> set[str]:
        return {str(uid) for uid in self.client.column("select id from orchestrator.horizon where ended_at is null")}

    def _ended(self, ids: Any, result: str) -> set[str]:
        return {
            str(uid) for uid in self.client.column(
                "select distinct event_id from orchestrator.outcome where result = %s and event_id = any (%s::uuid[])",
                result, list(ids),
            )
        }  # fmt: skip

    @rule(
        target=leases,
        batch=st.sampled_from([1, 3, 100]),
        lookahead_s=st.sampled_from([0, 0, 10]),
        worker=st.integers(1, 3),
    )
    def claim(self, batch: int, lookahead_s: int, worker: int) -> Any:
        until = self.now + seconds(lookahead_s)
        waiting = self._waiting()
        due = {
            uid: e for uid, e in self.model.items()
            if not e.end and e.due_at <= until and not e.held(self.now) and uid not in waiting
        }  # fmt: skip
        leases = self.client.claim_on(batch, worker=worker, lease_s=LEASE_S, lookahead_s=lookahead_s)
        alive = {uid for uid, e in due.items() if not e.forsaken and not e.expired(self.now)}
        assert {lease.event_id for lease in leases} <= alive
        assert len(leases) == min(batch, len(alive))
        for lease in leases:
            expected = self.model[lease.event_id]
            expected.attempt += 1
            expected.lease_until = until + seconds(LEASE_S)
            assert (lease.attempt, lease.due_at, lease.lease_until, lease.expires_at) == (
                expected.attempt,
                expected.due_at,
                expected.lease_until,
                expected.expires_at,
            )
        # Which of the lost ones a full claim comes across depends on its lanes; one that is not full, on all.
        expired = self._ended([uid for uid, e in due.items() if e.expired(self.now)], "expired")
        forsaken = [uid for uid, e in due.items() if e.forsaken and not e.expired(self.now)]
        buried = {
            str(uid)
            for uid in self.client.column(
                "select event_id from orchestrator.dead_letter where event_id = any (%s::uuid[])", forsaken
            )
        }
        if len(leases) < batch:
            assert buried | expired == set(due) - alive
        for uid in buried:
            self._end(uid, self.model[uid].attempt, "dead")
        for uid in expired:
            self._end(uid, self.model[uid].attempt, "expired")
        return multiple(*[(lease, worker) for lease in leases])

    def _end(self, uid: str, attempt: int, result: str) -> None:
        expected = self.model[uid]
        expected.history.append((attempt, result))
        expected.lease_until = None
        if result == "retried":
            expected.retrying = True
        else:
            expected.end = result

    @rule(held=st.lists(leases, min_size=1, max_size=5), data=st.data(), again=st.booleans())
    def finish(self, held: list[tuple[Lease, int]], data: st.DataObject, again: bool) -> None:
        """By whoever was given a lease once, sooner or later, rightly or not, and perhaps told twice."""
        worker = held[0][1]
        batch: dict[tuple[str, int], Result] = {}
        for lease, holder in held:
            kind = data.draw(st.sampled_from(["delivered", "delivered", "retry", "fail"]))
            if holder == worker and lease.due_at <= self.now:
                started = self.now.timestamp()
                batch[lease.event_id, lease.attempt] = Result(
                    lease.event_id, lease.attempt, kind, started_at=started, finished_at=started
                )
        told = {answer.event_id: answer.result for answer in self.client.finish(list(batch.values()), worker=worker)}
        expected: dict[str, str] = {}
        for (uid, attempt), result in sorted(batch.items()):
            event = self.model[uid]
            if event.end is None and event.lease_until is not None and event.attempt == attempt:
                ended = {"delivered": "delivered", "fail": "dead"}.get(result.result) or (
                    "dead" if event.exhausted else "retried"
                )
                if ended == "retried":
                    event.due_at = self.now + seconds(RETRY_S)
                if ended != "delivered":
                    expected[uid] = ended
                self._end(uid, attempt, ended)
                self.arrivals.append(Arrival(uid, attempt, datetime.fromtimestamp(result.started_at or 0, NOON.tzinfo)))
            elif not self._recorded(uid, attempt, worker):
                expected.setdefault(uid, "stale")
        assert told == expected
        if again:
            repeated = self.client.finish(list(batch.values()), worker=worker)
            assert {answer.result for answer in repeated} <= {"stale"}

    def _recorded(self, uid: str, attempt: int, worker: int) -> bool:
        return bool(
            self.client.value(
                """select exists (select from orchestrator.outcome where event_id = %s and attempt = %s and worker = %s
                and result <> 'cancelled' and started_at is not null)""",
                uid, attempt, worker,
            )
        )  # fmt: skip

    @rule(held=consumes(leases))
    def release(self, held: tuple[Lease, int]) -> None:
        lease, _ = held
        expected = self.model[lease.event_id]
        holds = expected.end is None and expected.lease_until is not None and expected.attempt == lease.attempt
        assert self.client.release([lease]) == int(holds)
        if holds:
            expected.lease_until = None
            expected.released += 1

    def _named(self, job: str) -> dict[str, Expected]:
        return {uid: e for uid, e in self._kept().items() if e.job == job}

    @rule(uid=events, by_job=st.booleans())
    def cancel(self, uid: str, by_job: bool) -> None:
        job = self.model[uid].job
        named = {other: e for other, e in self._named(job).items() if by_job or other == uid}
        answers = self.client.cancel_external(job) if by_job else self.client.cancel(uid)
        assert {answer.event_id for answer in answers} == set(named)
        for answer in answers:
            expected = named[answer.event_id]
            if expected.end:
                assert answer.result == ("already_cancelled" if expected.end == "cancelled" else "finished")
            elif expected.held(self.now):
                assert answer.result == "in_flight"
            else:
                assert answer.result == "cancelled"
                self._end(answer.event_id, expected.attempt, "cancelled")
            assert answer.status == expected.status(self.now)

    @rule(
        target=events,
        uid=events,
        by_job=st.booleans(),
        offset_s=st.sampled_from([-30, 0, 20, 90, 2 * DAY_S, 5 * DAY_S]),
        life_s=st.sampled_from([None, None, 60]),
        back=st.booleans(),
    )
    def reschedule(self, uid: str, by_job: bool, offset_s: int, life_s: int | None, back: bool) -> Any:
        """Perhaps to the time that it, or the newest of its name, had before."""
        job = self.model[uid].job
        at = self.now + seconds(offset_s)
        before = self.model.get(self.model[uid].predecessor or "")
        if back and before is not None and before.scheduled_at > self.now - timedelta(days=1):
            at = before.scheduled_at
        answers = self.client.rows(
            """select event_id::text, result, status, successor::text, field
            from orchestrator.reschedule_event(%s, %s, %s, %s)""",
            None if by_job else uid, at, job if by_job else None, None if life_s is None else at + seconds(life_s),
        )  # fmt: skip
        named = self._named(job)
        if not named or (not by_job and uid not in named):
            assert answers == []
            return multiple()
        live = [other for other, e in named.items() if not e.end]
        target = uid
        if by_job:
            target = live[0] if live else max(named, key=lambda other: (named[other].scheduled_at, other))
        expected = named[target]
        expires_at = expected.expires_at if life_s is None else at + seconds(life_s)
        if by_job and expected.predecessor and expected.scheduled_at == at:
            assert answers == [(expected.predecessor, "already_rescheduled", "rescheduled", target, None)]
        elif expected.end == "rescheduled" and named.get(expected.successor or "", expected).scheduled_at == at:
            if expected.scheduled_at != at:
                assert answers == [(target, "already_rescheduled", "rescheduled", expected.successor, None)]
        elif expected.end or expected.held(self.now):
            status = expected.status(self.now)
            assert answers == [(target, "finished" if expected.end else "in_flight", status, expected.successor, None)]
        elif expires_at is not None and expires_at <= at:
            assert answers == [(target, "refused", expected.status(self.now), None, "expires_at")]
        elif any(other.scheduled_at == at and other.end != "rescheduled" for other in named.values()):
            assert answers == [(target, "refused", expected.status(self.now), None, "scheduled_at")]
        else:
            [(answered, result, status, successor, wrong)] = answers
            assert (answered, result, status, wrong) == (target, "rescheduled", "rescheduled", None)
            self._end(target, expected.attempt, "rescheduled")
            expected.successor = successor
            self.model[successor] = Expected(
                at, max(at, self.now), expected.retries, expected.retries, job, expires_at, target
            )
            self.submitted[successor] = self.submitted[target] | {"scheduled_at": at.isoformat()}
            self.submitted[successor].pop("expires_at", None)
            return successor
        return multiple()

    @rule(uid=events)
    def redrive(self, uid: str) -> None:
        expected = self.model[uid]
        answers = self.client.rows("select result, status from orchestrator.redrive_event(%s)", uid)
        if expected.gone:
            assert answers == []
        elif expected.end != "dead":
            assert answers == [("not_dead", expected.status(self.now))]
        elif expected.expired(self.now):
            assert answers == [("expired", "dead")]
        else:
            assert answers == [("redriven", "retrying")]
            expected.history.append((expected.attempt, "redriven"))
            expected.end = None
            expected.retrying = True
            expected.due_at = self.now
            expected.released = 0
            expected.max_retries = expected.attempt + expected.retries

    @rule(passed_s=st.sampled_from([1, 10, LEASE_S - 1, LEASE_S, 120, DAY_S, 3 * DAY_S]))
    def wait(self, passed_s: int) -> None:
        self.now += seconds(passed_s)
        self.client.at(self.now)

    @rule()
    def raise_floors(self) -> None:
        self.client.rows("select orchestrator.raise_floors()")

    @rule()
    def maintain(self) -> None:
        """Until nothing is left to do: what has expired ends, the horizon moves, and days past retention go."""
        waiting = self._waiting()
        self.client.rows("select orchestrator.configure_retention(1, 1)")
        maintain(self.client)
        tomorrow = (self.now + timedelta(days=1)).date()
        still = {uid for uid in waiting if self.model[uid].scheduled_at.date() > tomorrow}
        assert self._waiting() == still
        for uid in waiting - still:
            self.model[uid].due_at = max(self.model[uid].scheduled_at, self.now)
        overdue = {uid for uid, e in self.model.items() if not e.end and not e.held(self.now) and e.expired(self.now)}
        days = {name[-8:] for name in attached(self.client)}
        retired = {
            uid
            for uid, e in self._kept().items()
            if f"{e.scheduled_at:%Y%m%d}" not in days and e.scheduled_at.date() <= tomorrow
        }
        expired = self._ended(overdue, "expired") | overdue & retired
        assert overdue - waiting <= expired
        for uid in expired:
            self._end(uid, self.model[uid].attempt, "expired")
        for uid in retired:
            expected = self.model[uid]
            assert expected.end
            assert expected.scheduled_at.date() < (self.now - timedelta(days=1)).date()
            expected.gone = True
        self.arrivals = [arrival for arrival in self.arrivals if not self.model[arrival.event_id].gone]

    @invariant()
    def laws_are_kept(self) -> None:
        assert violations(self.client.connection, acknowledged=self._kept(), arrivals=self.arrivals) == []

    @invariant()
    def the_database_agrees_with_the_model(self) -> None:
        shown: dict[str, str] = dict(self.client.rows("select id::text, status from orchestrator.event_status"))
        kept = self._kept()
        assert shown == {uid: expected.status(self.now) for uid, expected in kept.items()}
        histories: dict[str, list[tuple[int, str]]] = {uid: [] for uid in kept}
        for uid, attempt, result in self.client.rows(
            """select event_id::text, attempt, result from orchestrator.outcomes
            order by attempt, result not in ('retried', 'delivered', 'dead'), result <> 'redriven'"""
        ):
            histories[uid].append((attempt, result))
        assert histories == {uid: expected.history for uid, expected in kept.items()}

    @invariant()
    def totals_are_those_of_the_model(self) -> None:
        statistics = self.client.statistics()
        totals = {name: count for name, count in statistics["totals"].items() if count}
        states = [expected.status(self.now) for expected in self.model.values() if not expected.end]
        assert {name: statistics[name] for name in ("live", "scheduled", "retrying", "in_flight")} == {
            "live": len(states),
            **{name: states.count(name) for name in ("scheduled", "retrying", "in_flight")},
        }
        results = [result for expected in self.model.values() for _, result in expected.history]
        assert {name: count for name, count in totals.items() if name != "duplicate"} == {
            name: count
            for name, count in {
                "accepted": len(self.model),
                **{name: results.count(name) for name in ENDS},
            }.items()
            if count
        }  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.hypothesis
def test_every_history_keeps_the_laws(databases: Databases) -> None:
    with databases.migrated() as url, Client(url) as client:
        # Breakers have a model of their own, see test_limits.py.
        client.rows(
            """alter table orchestrator.destination
            alter breaker_failures set default null, alter breaker_ratio set default null"""
        )
        client.rows(
            "insert into orchestrator.retry_policy (name, jitter, schedule) values ('fixed', 0, %s)", [seconds(RETRY_S)]
        )
        run_state_machine_as_test(
            type("Machine", (Histories,), {"client": client}),
            settings=settings(
                max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


@pytest.fixture
def machine(databases: Databases) -> Iterator[Histories]:
    """The state machine, to be driven by hand through a history that it once failed at."""
    with databases.migrated() as url, Client(url) as client:
        client.rows(
            "insert into orchestrator.retry_policy (name, jitter, schedule) values ('fixed', 0, %s)", [seconds(RETRY_S)]
        )
        machine: Histories = type("Machine", (Histories,), {"client": client})()
        machine.start()
        yield machine


def agrees(machine: Histories) -> None:
    machine.laws_are_kept()
    machine.the_database_agrees_with_the_model()
    machine.totals_are_those_of_the_model()


@pytest.mark.parametrize("passed_days", [3, 6, 9])
def test_an_event_that_overslept_in_the_horizon_is_known_when_it_is_submitted_again(
    machine: Histories, passed_days: int
) -> None:
    """It has expired, and its day is before the first that is kept, but nobody has moved it yet."""
    machine.maintain()
    machine.submit(due_s=[2 * DAY_S + 3600], retries=0, host=HOSTS[0], life_s=5)
    [uid] = machine.model
    for _ in range(passed_days // 3):
        machine.wait(passed_s=3 * DAY_S)
    machine.submit_again(uid=uid)
    agrees(machine)
    machine.maintain()
    machine.submit_again(uid=uid)
    agrees(machine)


def test_an_event_can_be_rescheduled_back_and_forth_between_two_times(machine: Histories) -> None:
    machine.submit(due_s=[60], retries=0, host=HOSTS[0], life_s=None)
    [uid] = machine.model
    for turn in range(6):
        moved = machine.reschedule(uid=uid, by_job=turn % 2 == 1, offset_s=90, life_s=None, back=turn > 0)
        assert isinstance(moved, str)
        uid = moved
        for each in list(machine.model):
            machine.submit_again(uid=each)
        agrees(machine)
    assert len(machine.model) == 7
    assert len({expected.scheduled_at for expected in machine.model.values()}) == 2


# The checker itself: each law is seen to be broken.

_ARM_ALL = """
insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, attempt, max_attempts)
select id, scheduled_at, scheduled_at, 0, 0, 0, 1, 4 from orchestrator.event on conflict do nothing
"""
_REPEAT = "insert into orchestrator.outcome select * from orchestrator.outcome where result = {};"
_START_AFTER_CANCEL = (
    _REPEAT.format("'dead'")
    + """
update orchestrator.outcome set result = 'cancelled', attempt = 0, finished_at = due_at
where ctid = (select min(ctid) from orchestrator.outcome where result = 'dead');
update orchestrator.outcome set result = 'retried', started_at = due_at + interval '1 s' where result = 'dead';
"""
)


_ABOVE_ALL = """
update orchestrator.control set floors = array_fill('infinity'::timestamptz, array[64]), rerouted_by = null
"""
_BEYOND_SPREAD = """
update orchestrator.event set spread = '1 s';
update orchestrator.timer set due_at = scheduled_at + interval '1.001 s', attempt = 0
"""


@pytest.mark.parametrize(
    ("damage", "law"),
    [
        ("delete from orchestrator.timer", "law 1"),
        ("delete from orchestrator.event", "law 1"),
        (_ARM_ALL, "law 1"),
        ("delete from orchestrator.dead_letter", "law 1"),
        ("delete from orchestrator.outcome", "law 1"),
        (_REPEAT.format("'retried'"), "law 6"),
        (_REPEAT.format("'delivered'"), "law 6"),
        ("update orchestrator.outcome set attempt = 7 where result = 'retried'", "law 6"),
        (_REPEAT.format("'retried'") * 4, "law 2"),
        ("update orchestrator.outcome set started_at = due_at - interval '1 us' where result = 'delivered'", "law 3"),
        ("update orchestrator.timer set due_at = scheduled_at - interval '1 us'", "law 3"),
        (_BEYOND_SPREAD, "law 3"),
        (_START_AFTER_CANCEL, "law 4"),
        ("update orchestrator.timer set lane = -1 - lane, ordering = 1", "law 7"),
        ("update orchestrator.timer set lane = -1", "law 8"),
        ("update orchestrator.timer set lane = 4711", "law 8"),
        (_ABOVE_ALL, "law 8"),
        ("update orchestrator.timer set priority = 9", "law 8"),
        ("update orchestrator.timer set slot = 64 where lease_until is null", "law 8"),
    ],
)  # fmt: skip
def test_the_checker_sees_each_law_broken(databases: Databases, damage: str, law: str) -> None:
    with databases.migrated() as url, Client(url) as client:
        client.at(NOON)
        client.schedule_many(4)
        delivered, failed, retried, _ = client.claim()
        client.finish(
            [
                Result(lease.event_id, 1, kind, started_at=NOON.timestamp())
                for lease, kind in ((delivered, "delivered"), (failed, "fail"), (retried, "retry"))
            ]
        )
        assert violations(client.connection) == []
        client.connection.execute(damage)
        assert law in {violation[:5] for violation in violations(client.connection)}


def test_the_checker_knows_that_a_dead_event_may_be_redriven(databases: Databases) -> None:
    with databases.migrated() as url, Client(url) as client:
        client.at(NOON)
        uid = client.schedule(max_retries=0)
        for result in ("fail", "fail", "delivered"):
            client.finish([Result(lease.event_id, lease.attempt, result) for lease in client.claim()])
            assert client.outcomes(uid)[-1][1] == {"fail": "dead"}.get(result, result)
            assert violations(client.connection, finished=True) == []
            client.rows("select orchestrator.redrive_event(%s)", uid)
            assert violations(client.connection) == []


def test_the_checker_sees_deliveries_that_receivers_missed_or_got_wrongly(databases: Databases) -> None:
    with databases.migrated() as url, Client(url) as client:
        client.at(NOON)
        first, second, third = client.schedule_many(3)
        client.cancel(third)
        client.finish([Result(lease.event_id, 1) for lease in client.claim()])
        good = [Arrival(first, 1, NOON), Arrival(second, 1, NOON)]
        slack = timedelta(milliseconds=5)

        def broken(*arrivals: Arrival) -> set[str]:
            found = violations(
                client.connection, arrivals=arrivals, clock_slack=slack, acknowledged=[first], finished=True
            )
            return {violation[:5] for violation in found}

        assert broken(*good) == set()
        assert broken(good[0]) == {"law 1"}
        assert broken(*good, Arrival(str(client.value("select gen_random_uuid()")), 1, NOON)) == {"law 1"}
        assert broken(*good, good[0]) == {"law 6"}
        assert broken(good[0], Arrival(second, 1, NOON - slack)) == set()
        assert broken(good[0], Arrival(second, 1, NOON - 2 * slack)) == {"law 3"}
        assert broken(*good, Arrival(third, 1, NOON + 2 * slack)) == {"law 4"}
        client.schedule()
        assert broken(*good) == {"law 1"}
        assert len(violations(client.connection, acknowledged=["00000000-0000-7000-8000-000000000000"])) == 1
