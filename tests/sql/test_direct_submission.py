"""Direct submission: events are copied into their table, and one call makes their timers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.errors import (
    CheckViolation,
    InsufficientPrivilege,
    InvalidParameterValue,
    LockNotAvailable,
    NotNullViolation,
    ObjectNotInPrerequisiteState,
    UniqueViolation,
)

from orchestrator.database.copying import COPY_EVENTS, OPEN_DIRECT
from orchestrator.events.submission import Submission
from tests.sql.conftest import Connect
from tests.sql.test_submit import COUNTS, submission, submit_staged
from tests.support.copying import copy_events, make_timers, submit_directly
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, results, seconds

WRITTEN = (
    "select to_jsonb(e) from orchestrator.event e order by e.id",
    "select to_jsonb(t) from orchestrator.timer t order by t.event_id",
    "select to_jsonb(s) from orchestrator.statistic s order by s.source_label, s.destination_label",
    "select c.priorities from orchestrator.control c",
)


def varied() -> list[Submission]:
    """Submissions with every field, for shared lanes, dedicated ones, and those of a pattern."""
    hosts = ["receiver.example", "slow.example", "a.spread.example", "b.spread.example", "receiver.example:443"]
    return [
        submission(f"job {n} é\\\t", destination=f"https://{host.upper()}/{n}", scheduled_at=NOON + seconds(n - 2))
        for n, host in enumerate(hosts)
    ] + [
        submission(destination=None, delivery_type="KAFKA"),
        submission("topic", destination="orders", delivery_type="KAFKA", headers=b'{"X-A": "b"}'),
        submission("late", scheduled_at=NOON - seconds(60), max_retries=0),
        submission("key", ordering_key="k", priority=7, retry_policy="slow", correlation_id="c 1"),
        submission("low", priority=-9, expires_at=NOON + seconds(5), source="others"),
        submission("spread", spread_seconds=3600.25),
        submission("own spread", spread_seconds=60, destination="https://a.spread.example/"),
        submission("traced", traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ]


def destinations(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('slow')")
    client.rows("select orchestrator.configure_destination('slow.example', p_max_parallel => 2)")
    client.rows("select orchestrator.configure_destination('*.spread.example', p_spread => '10 minutes')")


def written(client: Client) -> list[list[Any]]:
    return [client.column(query) for query in WRITTEN]


def staged_and_undone(client: Client, made: Sequence[Submission], dedicated: bool) -> list[list[Any]]:
    """What a staged submission writes of `varied`, with dedicated lanes or without any; it is rolled back."""
    if dedicated:
        destinations(client)
    else:
        client.rows("insert into orchestrator.retry_policy (name) values ('slow')")
    with client.transaction() as _, client.connection.transaction(force_rollback=True):
        assert submit_staged(client, made) == {}
        return written(client)


@pytest.mark.parametrize("dedicated", [False, True])
def test_a_direct_submission_writes_what_a_staged_one_writes(client: Client, dedicated: bool) -> None:
    made = varied()
    staged = staged_and_undone(client, made, dedicated)
    assert client.rows(COUNTS) == [(0, 0)]
    with client.transaction():
        submit_directly(client, made)
    assert written(client) == staged
    assert len(staged[1]) == len(made)
    assert violations(client.connection, acknowledged=[each.id for each in made]) == []


def test_events_that_went_in_directly_are_delivered(client: Client) -> None:
    made = [submission(str(n), destination=f"https://host-{n % 7}.example/") for n in range(300)]
    with client.transaction():
        submit_directly(client, made)
    client.finish(results(client.claim()))
    assert violations(client.connection, acknowledged=[each.id for each in made]) == []
    assert client.totals() == {"accepted": 300, "delivered": 300}


def test_several_direct_submissions_in_one_transaction_are_all_kept(client: Client) -> None:
    with client.transaction():
        submit_directly(client, [submission("a")])
        with pytest.raises(UniqueViolation), client.connection.transaction():
            submit_directly(client, [submission("a"), submission("b")])
        submit_directly(client, [submission("b"), submission("c")])
        assert submit_staged(client, [submission("c"), submission("d")]) == {0: ("duplicate", None)}
    assert client.rows(COUNTS) == [(4, 4)]


# What it does not take is refused as a whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"destination": "nowhere"},
        {"scheduled_at": NOON + timedelta(days=401)},
        {"scheduled_at": NOON - timedelta(days=365)},
        {"max_retries": 101},
        {"retry_policy": "unheard-of"},
        {"retry_policy": "Not a name"},
        {"headers": b"[]"},
        {"delivery_type": "SMTP"},
        {"source": ""},
        {"ordering_key": ""},
        {"priority": 10},
        {"expires_at": NOON},
        {"correlation_id": " "},
        {"traceparent": "00-0-0-01"},
    ],
)
def test_a_batch_with_a_mistake_is_refused_as_a_whole(client: Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckViolation), client.transaction():
        submit_directly(client, [submission("good"), submission("wrong", **wrong)])
    assert client.rows(COUNTS) == [(0, 0)]
    assert client.rows("select * from orchestrator.direct_submission") == []


def test_a_time_in_the_horizon_is_refused_although_its_day_has_a_partition(client: Client) -> None:
    client.rows("update orchestrator.control set horizon_at = %s", NOON + seconds(60))
    with client.transaction():
        submit_directly(client, [submission("before", scheduled_at=NOON + seconds(59))])
    with pytest.raises(CheckViolation), client.transaction():
        submit_directly(client, [submission("after", scheduled_at=NOON + seconds(60))])
    assert client.rows(COUNTS) == [(1, 1)]


@pytest.mark.parametrize("batch", [["a", "b", "a"], ["kept", "c"]])
def test_a_duplicate_is_refused(client: Client, batch: list[str]) -> None:
    client.schedule(external_job_id="kept", source="tests")
    with pytest.raises(UniqueViolation), client.transaction():
        submit_directly(client, [submission(job) for job in batch])
    assert client.rows(COUNTS) == [(1, 1)]


@pytest.mark.parametrize(
    "garbage", [b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"\0\x01\0\0\0\x04abcd\xff\xff", b"\0" * 100, b""]
)
def test_garbage_is_refused(client: Client, garbage: bytes) -> None:
    def copy_garbage() -> None:
        client.rows(OPEN_DIRECT)
        with client.connection.cursor().copy(COPY_EVENTS) as copy:
            copy.write(garbage)

    client.set_role("orchestrator_submit")
    with pytest.raises(psycopg.DataError), client.transaction():
        copy_garbage()
    with pytest.raises(psycopg.DataError), client.transaction():
        submit_directly(client, [submission(payload=b'{"a": ')])
    assert client.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


@pytest.mark.parametrize(
    "state",
    [
        "select orchestrator.set_outbox(array['scheduled'])",
        "update orchestrator.control set former_ids_until = '2100-01-01'",
    ],
)
def test_what_only_staging_does_is_staged(client: Client, state: str) -> None:
    client.connection.execute(state.encode())
    assert client.value(OPEN_DIRECT) is None


# No event is without a timer


def test_a_transaction_that_made_no_timers_cannot_commit(client: Client) -> None:
    with pytest.raises(ObjectNotInPrerequisiteState, match="submit_direct"), client.transaction():
        copy_events(client, [submission("a")])
    assert client.rows(COUNTS) == [(0, 0)]
    with client.transaction():  # and the session works on
        submit_directly(client, [submission("a")])
    assert client.rows(COUNTS) == [(1, 1)]


@pytest.mark.parametrize("named", [["a"], ["a", "b", "c"]])
def test_as_many_events_get_timers_as_were_copied(client: Client, named: Sequence[str]) -> None:
    def submit() -> None:
        copy_events(client, [submission("a"), submission("b")])
        make_timers(client, [submission(job) for job in named])

    with (
        pytest.raises(InvalidParameterValue, match=f"^2 events were inserted, but {len(named)} "),
        client.transaction(),
    ):
        submit()
    assert client.rows(COUNTS) == [(0, 0)]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("array[%(id)s]::uuid[], array[%(at)s], '{3}', '{2}', '{tests}', '{HTTP}', '{x}'", NotNullViolation),
        ("array[%(id)s]::uuid[], array[%(at)s], '{3}', '{}', '{tests}', '{HTTP}', '{x}'", NotNullViolation),
        ("array[%(id)s]::uuid[], array[%(at)s], '{}', '{1}', '{tests}', '{HTTP}', '{x}'", NotNullViolation),
        ("array[%(id)s]::uuid[], array[%(at)s], '{3,3}', '{1,1}', '{tests}', '{HTTP}', '{x}'", NotNullViolation),
        ("array[%(id)s]::uuid[], array[%(at)s], '{3}', null, null, null, null", NotNullViolation),
        ("array[]::uuid[], array[%(at)s], '{3}', '{1}', '{tests}', '{HTTP}', '{x}'", InvalidParameterValue),
        ("null, null, null, null, null, null, null", InvalidParameterValue),
    ],
)
def test_arrays_that_do_not_fit_together_fail(client: Client, call: str, error: type[Exception]) -> None:
    made = [submission("a")]

    def submit() -> None:
        copy_events(client, made)
        client.connection.execute(f"select orchestrator.submit_direct({call})".encode(), {"id": made[0].id, "at": NOON})

    with pytest.raises(error), client.transaction():
        submit()
    assert client.rows(COUNTS) == [(0, 0)]


@pytest.mark.parametrize("role", ["orchestrator_submit", "orchestrator_ingest", "orchestrator_ops"])
def test_a_role_that_submits_inserts_events_only_between_the_two_calls(connect: Connect, role: str) -> None:
    client = connect()
    client.set_role(role)
    with client.transaction():
        submit_directly(client, [submission("a")])
    copied_alone = (
        "insert into orchestrator.event (id, scheduled_at, created_at, max_retries, source, delivery_type, destination,"
        " payload) values (gen_random_uuid(), now(), now(), 3, 's', 'HTTP', 'http://a', '1')"
    )
    with pytest.raises(ObjectNotInPrerequisiteState, match="no timers"):
        client.connection.execute(copied_alone.encode())
    with client.transaction():
        submit_directly(client, [submission("b")])
        with pytest.raises(ObjectNotInPrerequisiteState, match="no timers"), client.connection.transaction():
            client.connection.execute(copied_alone.encode())
    with pytest.raises(ObjectNotInPrerequisiteState, match="open_direct"):
        make_timers(client, [submission("c")])
    for statement in (
        "update orchestrator.event set payload = '2'",
        "delete from orchestrator.event",
        "insert into orchestrator.event (predecessor) values (null)",
        "delete from orchestrator.direct_submission",
        "insert into orchestrator.direct_submission values ('1', now(), 0)",
    ):
        with pytest.raises(InsufficientPrivilege):
            client.connection.execute(statement.encode())
    client.rows("reset role")
    assert client.rows(COUNTS) == [(2, 2)]


@pytest.mark.parametrize("role", ["orchestrator_dispatch", "orchestrator_read"])
def test_no_other_role_inserts_events(connect: Connect, role: str) -> None:
    client = connect()
    client.set_role(role)
    for call in (OPEN_DIRECT, "insert into orchestrator.event (id) values (gen_random_uuid())"):
        with pytest.raises(InsufficientPrivilege):
            client.connection.execute(call.encode())


# Two at once


def test_a_second_session_waits_for_the_first_and_then_finds_duplicates(
    connect: Connect, threads: ThreadPoolExecutor, observer: Client
) -> None:
    first, second = connect(), connect()
    second.rows("set lock_timeout = 0")

    def overlapping() -> dict[int, tuple[str, str | None]]:
        return submit_staged(second, [submission("shared"), submission("own")])

    with first.transaction():
        submit_directly(first, [submission("shared"), submission("other")])
        waiting = threads.submit(overlapping)
        observer.wait_until_blocked(second)
    assert waiting.result() == {0: ("duplicate", None)}
    assert observer.rows(COUNTS) == [(3, 3)]


def test_a_direct_submission_waits_no_longer_than_a_quarter_of_a_second(connect: Connect) -> None:
    first, second = connect(), connect()
    with first.transaction():
        submit_directly(first, [submission("shared")])
        with pytest.raises(LockNotAvailable), second.transaction():
            submit_directly(second, [submission("shared"), submission("own")])
    assert second.value("show lock_timeout") == "0"
    assert second.rows(COUNTS) == [(1, 1)]


def test_sessions_that_submit_overlapping_batches_do_not_deadlock(
    connect: Connect, threads: ThreadPoolExecutor, client: Client
) -> None:
    sessions = [connect() for _ in range(4)]

    def work(session: Client, number: int) -> None:
        for turn in range(6):
            jobs = range(turn * 100, turn * 100 + 60) if number % 2 else range(turn * 100 + 59, turn * 100 - 1, -1)
            made = [submission(str(job), scheduled_at=NOON + seconds(job % 7)) for job in jobs]
            try:
                with session.transaction():
                    submit_directly(session, made)
            except (UniqueViolation, LockNotAvailable):
                submit_staged(session, made)

    for done in [threads.submit(work, session, number) for number, session in enumerate(sessions)]:
        done.result()
    assert client.rows(COUNTS) == [(360, 360)]
    assert client.totals()["accepted"] == 360


def test_a_session_that_ends_between_the_copy_and_the_call_leaves_nothing(connect: Connect, client: Client) -> None:
    dying = connect()
    dying.rows("begin")
    copy_events(dying, [submission("a")])
    client.rows("select pg_terminate_backend(%s, 5000)", dying.pid)
    with pytest.raises(psycopg.OperationalError):
        make_timers(dying, [submission("a")])
    assert client.rows(COUNTS) == [(0, 0)]
    with client.transaction():
        submit_directly(client, [submission("a")])
    assert client.rows(COUNTS) == [(1, 1)]


def test_floors_wait_for_an_open_direct_submission(connect: Connect, client: Client) -> None:
    client.at(None)
    early = submission("early", scheduled_at=NOON - timedelta(days=1))
    submitting = connect().at(NOON)
    with submitting.transaction():
        copy_events(submitting, [early])
        for n in range(3):
            client.at(NOON + seconds(10 * n)).rows("select orchestrator.raise_floors()")
        make_timers(submitting, [early])
    client.rows("select orchestrator.raise_floors()")
    assert [lease.event_id for lease in client.claim()] == [early.id]


def test_a_destination_that_gets_a_lane_meanwhile_gets_its_timers(connect: Connect, client: Client) -> None:
    submitting = connect()
    made = [submission(str(n), destination="https://slow.example/") for n in range(3)]
    with submitting.transaction():
        copy_events(submitting, made)
        client.rows("select orchestrator.configure_destination('slow.example', p_max_parallel => 2)")
        client.rows("select orchestrator.reroute_remaining()")
        make_timers(submitting, made)
    for _ in range(3):
        client.rows("select orchestrator.reroute_remaining()")
    lane = client.value("select lane from orchestrator.lane where name = 'slow.example'")
    assert client.column("select lane from orchestrator.timer") == [lane] * 3
    assert client.value("select rerouted_by from orchestrator.control") is None


def test_dispatchers_are_told_of_what_is_due_soon(connect: Connect) -> None:
    client, listening = connect(), connect()
    listening.rows("listen orchestrator_due")
    with client.transaction():
        submit_directly(client, [submission("soon", scheduled_at=NOON + seconds(5)), submission("a")])
    [told] = listening.connection.notifies(timeout=10, stop_after=1)
    assert float(told.payload) == NOON.timestamp()
