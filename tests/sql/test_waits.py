"""A transaction that somebody left open holds up what it has locked, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import HOST, NOON, Client, Lease, Result, event, results, seconds, wait_for

BOUND_MS = 3000  # on a busy machine; what waits for the holder would wait for ever
KEY = "client-1"


class Case(NamedTuple):
    """What is in the database before somebody leaves a transaction open. `held` and `free` are leases."""

    held: Lease
    free: list[Lease]
    keyed: Lease
    """Of the ordering key `KEY`, to a destination of its own."""
    dead: str
    horizon: str


def prepared(client: Client) -> Case:
    client.rows("select orchestrator.configure_destination('slow.example', p_rate_per_second => 1000)")
    client.rows("select orchestrator.set_outbox('{scheduled,timestamp,dlq}')")
    dead = client.schedule(max_retries=0)
    [lease] = client.claim(1)
    client.finish([Result(lease.event_id, lease.attempt, "retry", error="no")])
    horizon = client.schedule(scheduled_at=NOON + seconds(86_400 * 60))
    ids = client.schedule_many(3)
    limited = client.schedule(destination="https://slow.example/hook")
    failing = client.schedule(destination="https://new.example/hook")
    keyed = client.schedule(destination="https://keyed.example/hook", ordering_key=KEY)
    leases = {lease.event_id: lease for lease in client.claim_on(100)}
    free = [leases[each] for each in (*ids[1:], limited, failing)]
    client.rows("delete from orchestrator.outbox")
    return Case(leases[ids[0]], free, leases[keyed], dead, horizon)


def call(statement: LiteralString) -> Callable[[Client, Case], Any]:
    return lambda holder, case: holder.rows(statement)


HOLDERS: dict[str, Callable[[Client, Case], Any]] = {
    "cancel of one in flight": lambda holder, case: holder.cancel(case.held.event_id),
    "cancel of the horizon": lambda holder, case: holder.cancel(case.horizon),
    "submission": lambda holder, case: holder.submit(event(external_job_id="held")),
    "submission of a new priority": lambda holder, case: holder.submit(event(external_job_id="held", priority=5)),
    "submission beyond the horizon": lambda holder, case: holder.submit(
        event(scheduled_at=NOON + seconds(86_400 * 70))
    ),
    "configuring a new destination": call(
        "select orchestrator.configure_destination('new.example', p_rate_per_second => 5)"
    ),
    "configuring a destination": call(
        "select orchestrator.configure_destination('slow.example', p_rate_per_second => 5)"
    ),
    "deleting a destination": call("select orchestrator.delete_destination('slow.example')"),
    "pausing a destination": call("select orchestrator.pause_destination('slow.example')"),
    "pausing a new destination": call("select orchestrator.pause_destination('new.example')"),
    "closing a breaker": call("select orchestrator.close_breaker('slow.example')"),
    "resuming everything": call("select orchestrator.resume_all()"),
    "finish by hand": lambda holder, case: holder.finish([Result(case.held.event_id, case.held.attempt)]),
    "release by hand": lambda holder, case: holder.release([case.held]),
    "finish of an ordering key": lambda holder, case: holder.finish([Result(case.keyed.event_id, case.keyed.attempt)]),
    "redrive": lambda holder, case: holder.rows("select * from orchestrator.redrive_event(%s)", case.dead),
    "reschedule": lambda holder, case: holder.rows(
        "select * from orchestrator.reschedule_event(%s, %s)", case.horizon, NOON + seconds(3600)
    ),
    "retention": call("select orchestrator.configure_retention(9)"),
    "a locked row of control": call("select 1 from orchestrator.control for update"),
}


@pytest.fixture(params=list(HOLDERS))
def case(request: pytest.FixtureRequest, connect: Connect) -> Iterator[tuple[Client, Case]]:
    """A client that may not wait for long, while another session has left a transaction open."""
    client, holder = connect(), connect()
    case = prepared(client)
    holder.rows("begin")
    HOLDERS[request.param](holder, case)
    client.connection.execute(f"set statement_timeout = {BOUND_MS}".encode())
    yield client, case
    holder.rows("rollback")


def finish_as_a_dispatcher(client: Client, leases: Sequence[Lease]) -> set[str]:
    """Records results; names the events that are blocked."""
    given = results(leases, "retry", error="no")
    client.rows("set lock_timeout = '50 ms'")
    try:
        client.finish(given)
        return set()
    except psycopg.errors.LockNotAvailable:
        columns = [list(column) for column in zip(*given, strict=True)]
        rows = client.rows(
            """select event_id::text from orchestrator.finish_free_events(
              %s::uuid[], %s::integer[], %s::text[], %s::integer[], %s::float8[], %s::float8[],
              %s::text[], %s::text[], %s::float8[]) where result = 'blocked'""",
            *columns,
        )
        return {row[0] for row in rows}
    finally:
        client.rows("reset lock_timeout")


def test_a_transaction_left_open_stops_no_other_work(case: tuple[Client, Case]) -> None:
    """Every worker in one go: what one of them does must not depend on another, and each is bounded by the session."""
    client, given = case
    # Submissions
    new = client.schedule_many(3)
    prior = client.schedule(priority=7)
    later = client.schedule(scheduled_at=NOON + seconds(86_400 * 65))
    # Claims
    claimed = {lease.event_id: lease for lease in client.claim_on(100)}
    assert {*new, prior} <= claimed.keys()
    # Results
    blocked = finish_as_a_dispatcher(client, [*given.free, given.keyed, given.held, *(claimed[each] for each in new)])
    assert blocked <= {given.held.event_id, given.keyed.event_id}
    assert client.value("select count(*) from orchestrator.outcome where result = 'retried'") >= 7
    # Cancelling others
    assert client.cancel(later)[0].result == "cancelled"
    # The brakes, all of them, and on a destination that is in the way
    client.rows("select orchestrator.pause_all()")
    assert client.value("select paused_at from orchestrator.standstills()") == NOON
    assert client.claim() == []
    client.rows("select orchestrator.resume_all()")
    assert client.value("select paused_at from orchestrator.standstills()") is None
    for name in ("slow.example", "new.example", "other.example"):
        client.rows("select orchestrator.pause_destination(%s)", name)
        waiting = client.schedule(destination=f"https://{name}/hook")
        after = client.schedule()
        claimed = {lease.event_id: lease for lease in client.claim_on(100)}
        assert after in claimed
        assert waiting not in claimed
        client.rows("select orchestrator.resume_destination(%s)", name)
        client.rows("select orchestrator.close_breaker(%s)", name)
    # The outbox, floors, and maintenance
    messages = client.value("select count(*) from orchestrator.outbox_batch(1000)")
    assert messages == client.value("select count(*) from orchestrator.outbox") > 5
    client.rows("select orchestrator.raise_floors()")
    client.rows("select orchestrator.next_due_at(), orchestrator.statistics()")
    report = client.value("select orchestrator.run_maintenance()")
    assert report["statistics_folded"] > 0


def test_a_blocked_result_is_recorded_when_the_other_session_has_ended(connect: Connect) -> None:
    client, holder = connect(), connect()
    ids = client.schedule_many(2)
    leases = {lease.event_id: lease for lease in client.claim()}
    holder.rows("begin")
    holder.cancel(ids[0])
    assert finish_as_a_dispatcher(client, list(leases.values())) == {ids[0]}
    assert [client.status(each) for each in ids] == ["in_flight", "retrying"]
    # Not even when its lease is over does another get it.
    assert client.at(NOON + seconds(120)).claim() != []
    holder.rows("rollback")
    assert finish_as_a_dispatcher(client.at(NOON + seconds(120)), [leases[ids[0]]]) == set()
    assert client.status(ids[0]) == "retrying"


def test_results_of_a_locked_lane_are_recorded(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.rows("select orchestrator.configure_destination('receiver.example', p_max_parallel => 10)")
    client.schedule_many(3)
    leases = client.claim_on()
    holder.rows("begin")
    holder.rows("select orchestrator.pause_destination('receiver.example')")
    assert finish_as_a_dispatcher(client, leases) == set()
    assert client.value("select count(*) from orchestrator.outcome") == 3
    holder.rows("rollback")
    assert client.value("select failures from orchestrator.lane where name = 'receiver.example'") == 0


def test_a_claim_leaves_out_a_held_ordering_key_and_comes_back_ever_more_rarely(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.schedule_many(30, ordering_key=KEY)
    others = client.schedule_many(10)
    holder.rows("begin")
    holder.rows(
        """select pg_advisory_xact_lock(hashtext('orchestrator.ordering')
        , orchestrator.ordering_lock_number(t.ordering))
        from orchestrator.timer t where t.ordering is not null limit 1"""
    )
    # Although the held ones fill the batch.
    assert {lease.event_id for lease in client.claim(5)} < set(others)
    assert {lease.event_id for lease in client.claim(5)} < set(others)
    waits = []
    for _ in range(10):
        assert client.claim(5) == []
        again_at = client.claim_again_at()
        assert again_at is not None
        waits.append((again_at - NOON).total_seconds())
    assert waits == sorted(waits)
    assert waits[-1] > 1
    holder.rows("rollback")
    assert len(client.claim_on(5)) == 1
    assert client.claim_again_at() is None


def test_a_claim_leaves_out_a_locked_lane_and_serves_the_others(connect: Connect) -> None:
    client, holder = connect(), connect()
    for name in ("a.example", "b.example"):
        client.rows("select orchestrator.configure_destination(%s, p_max_parallel => 5)", name)
        client.schedule_many(3, destination=f"https://{name}/hook")
    holder.rows("begin")
    holder.rows("select orchestrator.configure_destination('a.example', p_rate_per_second => 10)")
    assert {lease.destination for lease in client.claim_on()} == {"https://b.example/hook"}
    assert client.claim_again_at() > NOON  # type: ignore[operator]
    holder.rows("rollback")
    assert {lease.destination for lease in client.claim_on()} == {"https://a.example/hook"}


def test_a_pause_holds_over_a_resume_that_commits_after_it(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.schedule()
    client.rows("select orchestrator.pause_all()")
    holder.rows("begin")
    holder.rows("select orchestrator.resume_all()")
    client.rows("select orchestrator.pause_all()")
    holder.rows("commit")
    assert client.claim() == []
    client.rows("select orchestrator.resume_all()")
    assert len(client.claim()) == 1
    assert client.value("select count(*) from orchestrator.control_note") == 0


def test_a_noted_pause_of_a_destination_is_carried_over_with_its_settings(connect: Connect) -> None:
    client, holder = connect(), connect()
    holder.rows("begin")
    holder.rows("select orchestrator.configure_destination('receiver.example', p_rate_per_second => 10)")
    note = client.value("select note from orchestrator.pause_destination('receiver.example')")
    assert f"pid {holder.pid} " in note
    holder.rows("commit")
    assert client.value("select state from orchestrator.destinations where name = 'receiver.example'") == "paused"
    client.schedule()
    assert client.claim_on() == []
    assert client.value("select count(*) from orchestrator.control_note") == 0
    row = client.rows(
        "select rate_per_second, paused_at from orchestrator.destinations where name = 'receiver.example'"
    )
    assert row == [(10, NOON)]
    assert client.value("select resumed from orchestrator.resume_destination('receiver.example')")
    assert len(client.claim_on()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["pause_destination", "resume_destination", "pause_destination"],
        ["pause_destination", "resume_destination", "close_breaker", "pause_destination", "close_breaker"],
        ["resume_destination", "pause_destination", "resume_destination"],
        ["close_breaker", "pause_destination", "pause_destination", "resume_destination"],
    ],
)
def test_the_last_note_about_a_destination_holds(connect: Connect, words: list[str]) -> None:
    client, holder = connect(), connect()
    client.rows("select orchestrator.configure_destination('receiver.example', p_max_parallel => 5)")
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.destination for update")
    for word in words:
        client.connection.execute(f"select orchestrator.{word}('receiver.example')".encode())
    holder.rows("rollback")
    client.schedule()
    last = next(word for word in reversed(words) if word != "close_breaker")
    assert len(client.claim_on()) == (last == "resume_destination")
    assert client.value("select count(*) from orchestrator.control_note") == 0


def test_a_pattern_whose_pause_is_only_noted_is_resumed_all_the_same(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.rows("select orchestrator.configure_destination('*.example', p_max_parallel => 5)")
    # One that fails, and was watched by somebody who did not see the pattern yet.
    client.rows(
        "insert into orchestrator.destination (name, configured, changed_at) values ('a.example', false, %s)", NOON
    )
    client.schedule(destination="https://b.example/hook")
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.destination where name = 'a.example' for update")
    assert f"pid {holder.pid} " in client.value("select note from orchestrator.pause_destination('*.example')")
    assert client.claim_on() == []
    assert client.value("select resumed from orchestrator.resume_destination('*.example')")
    assert len(client.claim_on()) == 1
    client.rows("select orchestrator.pause_destination('*.example')")
    holder.rows("rollback")
    client.schedule(destination="https://c.example/hook")
    assert client.claim_on() == []
    assert client.value("select count(*) from orchestrator.control_note") == 0
    assert client.value("select resumed from orchestrator.resume_destination('*.example')")
    assert len(client.claim_on()) == 1


def test_a_pattern_without_a_lane_is_not_paused_while_a_failing_host_of_it_is_held(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.rows(
        "insert into orchestrator.destination (name, configured, changed_at) values ('a.example', false, %s)", NOON
    )
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.destination for update")
    with pytest.raises(psycopg.errors.LockNotAvailable, match=f"cannot be paused yet: .*pid {holder.pid} "):
        client.rows("select orchestrator.pause_destination('*.example')")
    holder.rows("rollback")
    client.rows("select orchestrator.pause_destination('*.example')")
    client.schedule(destination="https://b.example/hook")
    assert client.claim_on() == []


def test_a_new_priority_is_claimed_though_its_note_cannot_be_carried_over(connect: Connect) -> None:
    client, holder = connect(), connect()
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.control for update")
    ids = {client.schedule(priority=3), client.schedule(priority=3)}
    assert client.value("select count(*) from orchestrator.control_note") == 1
    assert {lease.event_id for lease in client.claim()} == ids
    holder.rows("rollback")
    client.rows("select orchestrator.raise_floors()")
    assert client.rows(
        "select priorities, (select count(*) from orchestrator.control_note) from orchestrator.control"
    ) == [([3, 0], 0)]


def test_the_session_that_holds_others_up_is_named(connect: Connect, observer: Client, threads: Any) -> None:
    client, holder = connect(), connect()
    event_id = client.schedule()
    holder.rows("set application_name = 'psql of an operator'")
    holder.rows("begin")
    holder.connection.execute(f"select * from orchestrator.cancel_event('{event_id}')".encode())
    waiting = threads.submit(client.cancel, event_id)
    try:
        observer.wait_until_blocked(client)
        [(pid, name, state, query, blocks)] = observer.rows(
            "select pid, application_name, state, query, blocks from orchestrator.lock_holders('0 s') where blocks > 0"
        )
        text = observer.value("select orchestrator.holders_text('0 s')")
    finally:
        holder.rows("rollback")
    assert (pid, name, state, blocks) == (holder.pid, "psql of an operator", "idle in transaction", 1)
    assert query == "select * from orchestrator.cancel_event(…)"
    assert f"pid {holder.pid} (psql of an operator, user " in text
    assert waiting.result(10)[0].result == "cancelled"
    wait_for(lambda: observer.rows("select * from orchestrator.lock_holders('0 s')") == [])


@pytest.fixture
def prepares(client: Client) -> Iterator[Callable[[Client], None]]:
    """Prepares a session's open transaction as 'left behind'."""
    if client.value("show max_prepared_transactions") == "0":
        pytest.skip("the server allows no prepared transactions")

    def prepare(holder: Client) -> None:
        holder.rows("prepare transaction 'left behind'")

    yield prepare
    if client.value("select count(*) from pg_prepared_xacts where database = current_database()"):
        client.rows("rollback prepared 'left behind'")


def test_a_prepared_transaction_that_holds_others_up_is_named_with_its_remedy(
    connect: Connect, client: Client, observer: Client, threads: Any, prepares: Callable[[Client], None]
) -> None:
    holder = connect()
    event_id = client.schedule()
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.timer where event_id = %s for update", event_id)
    prepares(holder)
    waiting = threads.submit(client.cancel, event_id)
    try:
        observer.wait_until_blocked(client)
        [(pid, state, gid, blocks, remedy)] = observer.rows(
            "select h.pid, h.state, h.query, h.blocks, orchestrator.holder_remedy(h)"
            " from orchestrator.lock_holders('0 s') h where h.blocks > 0"
        )
        text = observer.value("select orchestrator.holders_text('0 s')")
    finally:
        observer.rows("rollback prepared 'left behind'")
    assert (pid, state, gid, blocks) == (None, "prepared", "left behind", 1)
    assert remedy == "rollback prepared 'left behind'"
    assert text.startswith("prepared transaction 'left behind' (user ")
    assert waiting.result(10)[0].result == "cancelled"
    wait_for(lambda: observer.rows("select * from orchestrator.lock_holders('0 s')") == [])


def test_a_session_that_has_only_read_is_named_when_it_blocks(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.keep_three_days()
    day = NOON.date() - timedelta(days=20)
    client.rows("select orchestrator.create_partitions(%s, %s)", day, day)
    holder.rows("begin")
    holder.rows("select count(*) from orchestrator.event")
    assert client.rows("select * from orchestrator.lock_holders('0 s')") == []
    assert client.column("select pid from orchestrator.lock_holders('2 s', '0 s')") == [holder.pid]
    wait_for(lambda: client.rows("select * from orchestrator.lock_holders('2 s', '100 ms')") != [])
    reports = [client.value("select orchestrator.run_maintenance()") for _ in range(2)]
    [problem] = reports[-1]["problems"]
    assert problem["step"] == "partitions_detached"
    assert f"pid {holder.pid} " in problem["problem"]


def test_maintenance_names_the_session_that_blocked_a_step_and_advances_other_keys(connect: Connect) -> None:
    client, holder = connect(), connect()
    for key in ("a", "b"):
        client.schedule_many(2, ordering_key=key)
    client.finish(results(client.claim_on()))  # the seconds wait below 0 no more: have them do so, as after a crash
    client.rows("update orchestrator.timer set lane = -1 - lane where lane >= 0")
    holder.rows("begin")
    holder.rows(
        """select pg_advisory_xact_lock(hashtext('orchestrator.ordering')
        , orchestrator.ordering_lock_number(t.ordering))
        from orchestrator.timer t order by t.event_id limit 1"""
    )
    holder.rows("select pg_sleep(0.1)")  # a younger transaction is nobody's fault, and not named
    report = client.value("select orchestrator.run_maintenance()")
    [problem] = report["problems"]
    assert problem["step"] == "orderings_advanced"
    assert f"pid {holder.pid} " in problem["problem"]
    assert client.value("select count(*) from orchestrator.timer where lane >= 0") == 1


def test_maintenance_goes_on_when_it_cannot_keep_the_retention_settings(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.schedule()
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.control for update")
    wait_for(lambda: client.rows("select * from orchestrator.lock_holders('100 ms')") != [])
    report = client.value("select orchestrator.run_maintenance(31, 8)")
    problems = {problem["step"]: problem["problem"] for problem in report["problems"]}
    assert f"pid {holder.pid} " in problems["retention_configured"]
    assert report["statistics_folded"] == 1
    holder.rows("rollback")
    assert client.value("select orchestrator.run_maintenance(31, 8)")["problems"] == []
    assert client.rows("select retention_days, partition_days_ahead from orchestrator.control") == [(8, 31)]


def test_a_record_that_was_set_aside_is_kept_once_the_other_session_has_ended(connect: Connect) -> None:
    client, holder = connect(), connect()
    holder.rows("begin")
    [answer] = holder.submit(event(external_job_id="held"))
    client.rows("select orchestrator.open_staging()")
    with client.transaction():
        client.rows(
            """insert into pg_temp.submission
              (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload, max_retries)
            select 7, %s, %s, 'tests', 'held', 'HTTP', %s, '{}', 3""",
            answer.id,
            NOON,
            f"{HOST}/hook",
        )
        client.rows(
            "select orchestrator.set_aside_staged('topic', '{7}', '{0}', '{41}', array[null::bytea], '{x}'::bytea[])"
        )
    assert client.rows("select kept, waiting from orchestrator.submit_set_aside()") == [(0, 1)]
    [problem] = client.value("select orchestrator.run_maintenance()")["problems"]
    assert problem["step"] == "submissions_kept"
    holder.rows("rollback")
    assert client.value("select orchestrator.run_maintenance()")["submissions_kept"] == 1
    assert client.status(str(answer.id)) == "scheduled"
    assert client.value("select count(*) from orchestrator.submission_aside") == 0


def test_a_cancel_by_filter_leaves_out_events_that_another_session_has_locked(connect: Connect) -> None:
    client, holder = connect(), connect()
    ids = client.schedule_many(5)
    beyond = client.schedule(scheduled_at=NOON + seconds(86_400 * 60))
    also_beyond = client.schedule(scheduled_at=NOON + seconds(86_400 * 60))
    holder.rows("begin")
    holder.cancel(ids[2])
    holder.cancel(beyond)
    [(matched, cancelled, in_flight)] = client.rows(
        "select matched, cancelled, in_flight from orchestrator.cancel_events(p_source => 'tests')"
    )
    assert (matched, cancelled, in_flight) == (7, 5, 0)
    assert client.status(also_beyond) == "cancelled"
    holder.rows("rollback")
    assert client.value("select cancelled from orchestrator.cancel_events(p_source => 'tests')") == 2


@pytest.mark.parametrize("how", ["redriven from orchestrator.redrive", "purged from orchestrator.purge"])
def test_a_sweep_of_dead_letters_leaves_out_those_that_another_session_has_locked(connect: Connect, how: str) -> None:
    client, holder = connect(), connect()
    ids = client.schedule_many(3, max_retries=0)
    client.finish(results(client.claim(), "fail", error="no"))
    holder.rows("begin")
    holder.rows("select * from orchestrator.redrive_event(%s)", ids[1])
    client.rows("set statement_timeout = '2 s'")
    query = f"select matched, {how}_dead_letters(p_source => 'tests')"
    assert client.connection.execute(query.encode()).fetchall() == [(3, 2)]


def test_a_day_that_cannot_be_opened_for_a_session_in_the_horizon_is_kept_there(connect: Connect) -> None:
    client, holder = connect(), connect()
    client.keep_three_days()
    for table in ("event", "outcome", "delivered_batch"):
        client.connection.execute(f"drop table orchestrator.{table}_p{NOON:%Y%m%d}".encode())
    client.rows("select orchestrator.update_horizon_start()")
    holder.rows("begin")
    holder.submit(event(scheduled_at=NOON + seconds(86_400 * 60)))
    client.rows("set lock_timeout = '50 ms'")
    event_id = client.schedule()
    assert client.value("select count(*) from orchestrator.horizon where id = %s", event_id) == 1
    holder.rows("rollback")
    client.rows("reset lock_timeout")
    for _ in range(3):
        client.rows("select orchestrator.run_maintenance()")
    assert [lease.event_id for lease in client.claim_on()] == [event_id]


def test_a_writing_transaction_that_has_nothing_to_do_with_timers_does_not_keep_lanes_from_settling(
    connect: Connect,
) -> None:
    client, foreign, submitter = connect(), connect(), connect()
    foreign.rows("create table public.of_another_program (n integer)")
    foreign.rows("begin")
    foreign.rows("insert into public.of_another_program values (1)")
    submitter.rows("begin")
    submitter.schedule(destination="https://slow.example/hook")
    client.rows("select orchestrator.configure_destination('slow.example', p_rate_per_second => 5)")
    rerouted: LiteralString = "select rerouted_by is not null from orchestrator.control"
    for _ in range(2):
        client.rows("select orchestrator.run_maintenance()")
        assert client.value(rerouted)  # who was submitting then may have used the lane of before
    submitter.rows("commit")
    client.rows("select orchestrator.run_maintenance()")
    client.rows("select orchestrator.run_maintenance()")
    assert not client.value(rerouted)
    assert client.value("select count(*) from orchestrator.timer where lane < 64") == 0
    foreign.rows("rollback")
