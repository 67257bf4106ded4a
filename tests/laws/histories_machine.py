"""Histories of submits, claims, finishes, releases, cancels, reschedules, redrives, maintenance and passing time.

The model beside the database is the specification in Python: what each call must answer and what it must leave. It
repeats numbers of the design as literals on purpose: taken from the product, they would share its mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.laws.leased import Leased
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
    gone: bool = False  # dropped with its day, past retention
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
            orchestrator.delivered_batch, orchestrator.dead_letter, orchestrator.statistic_folded,
            orchestrator.statistic"""
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
        """The events expire `life_s` after their time."""
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
        """In any state; of events that came back to one time by rescheduling, the answer names the first."""
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
        alive = {uid for uid, e in due.items() if not e.lost_too_often and not e.expired(self.now)}
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
        # Which expired or lost events a full claim visits depends on its lanes; a claim that is not full visits all.
        expired = self._ended([uid for uid, e in due.items() if e.expired(self.now)], "expired")
        lost_too_often = [uid for uid, e in due.items() if e.lost_too_often and not e.expired(self.now)]
        ended = {
            str(uid)
            for uid in self.client.column(
                "select event_id from orchestrator.dead_letter where event_id = any (%s::uuid[])", lost_too_often
            )
        }
        if len(leases) < batch:
            assert ended | expired == set(due) - alive
        for uid in ended:
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

    @rule(held=st.lists(leases, min_size=1, max_size=5), data=st.data(), again=st.booleans(), batched=st.booleans())
    def finish(self, held: list[tuple[Lease, int]], data: st.DataObject, again: bool, batched: bool) -> None:
        """By a worker that once had the lease: in time or late, with the right to it or without, perhaps twice.

        `batched`: as a dispatcher gives its results.
        """
        worker = held[0][1]
        batch: dict[tuple[str, int], Result] = {}
        for lease, holder in held:
            kind = data.draw(st.sampled_from(["delivered", "delivered", "retry", "fail"]))
            if holder == worker and lease.due_at <= self.now:
                started = self.now.timestamp()
                batch[lease.event_id, lease.attempt] = Result(
                    lease.event_id, lease.attempt, kind, started_at=started, finished_at=started
                )
        given = list(batch.values())
        answers = (
            self.client.finish_as_dispatcher([lease for lease, _ in held], given, worker=worker)
            if batched
            else self.client.finish(given, worker=worker)
        )
        told = [(answer.event_id, answer.result) for answer in answers]
        expected: list[tuple[str, str]] = []
        for (uid, attempt), result in sorted(batch.items()):
            event = self.model[uid]
            if event.end is None and event.lease_until is not None and event.attempt == attempt:
                ended = {"delivered": "delivered", "fail": "dead"}.get(result.result) or (
                    "dead" if event.exhausted else "retried"
                )
                if ended == "retried":
                    event.due_at = self.now + seconds(RETRY_S)
                if ended != "delivered":
                    expected.append((uid, ended))
                self._end(uid, attempt, ended)
                self.arrivals.append(Arrival(uid, attempt, datetime.fromtimestamp(result.started_at or 0, NOON.tzinfo)))
            elif not self._recorded(uid, attempt, worker):
                expected.append((uid, "stale"))
        assert sorted(told) == sorted(expected)
        if again:
            repeated = self.client.finish(given, worker=worker)
            assert {answer.result for answer in repeated} <= {"stale"}

    def _recorded(self, uid: str, attempt: int, worker: int) -> bool:
        return bool(
            self.client.value(
                """select exists (select from orchestrator.outcomes where event_id = %s and attempt = %s and worker = %s
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
        """Perhaps back to the time that its predecessor had."""
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
            # What the name stands for by now: what was rescheduled has become another.
            target = live[0] if live else max(
                named, key=lambda other: (named[other].end != "rescheduled", named[other].scheduled_at, other)
            )  # fmt: skip
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
        """Until no work is left: expired events end, the horizon moves, and days past retention go."""
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
