"""Any history of submits, claims, finishes, releases, cancels, reschedules, redrives, maintenance and passing time
keeps the laws; and the checker of the laws sees each of them broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.laws.histories_machine import DAY_S, HOSTS, RETRY_S, Histories
from tests.support.databases import Databases
from tests.support.laws import Arrival, violations
from tests.support.sql_client import NOON, Client, Result, seconds


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
