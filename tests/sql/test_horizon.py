"""The horizon: events beyond the last partition, which nobody can tell from the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import maintain, moved, reschedule, waiting

FAR = NOON + timedelta(days=50)
NEAR = NOON + timedelta(days=20)  # when the clock shows this, FAR has its partition


def whole(client: Client, uid: str) -> Any:
    shown = client.get(uid)
    assert shown is not None
    return shown


def events(client: Client) -> list[str]:
    return [str(uid) for uid in client.column("select id from orchestrator.event order by id")]


def test_an_event_beyond_the_partitions_waits_in_the_horizon_without_a_timer(client: Client) -> None:
    uid = client.schedule(scheduled_at=FAR, external_job_id="j")
    assert waiting(client) == [uid]
    assert client.rows("select * from orchestrator.event") == client.rows("select * from orchestrator.timer") == []
    shown = whole(client, uid)
    assert (shown["status"], shown["attempt"], shown["outcomes"]) == ("scheduled", 0, [])
    assert shown["scheduled_at"] == shown["due_at"] == FAR.isoformat()
    assert client.column("select orchestrator.events_by_external_id('j')") == [shown]
    assert client.totals() == {"accepted": 1}
    statistics = client.statistics()
    assert (statistics["live"], statistics["scheduled"], statistics["backlog"]) == (1, 1, 0)
    assert statistics["next_due_at"] == FAR.isoformat()


def test_the_history_of_events_is_the_same_before_and_after_their_move(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('slow')")
    ids = [
        client.schedule(scheduled_at=FAR, external_job_id="plain"),
        client.schedule(scheduled_at=FAR, external_job_id=None, headers={"X-A": "ä"}, payload=[1, {"b": None}]),
        client.schedule(scheduled_at=FAR, priority=7, max_retries=9, retry_policy="slow"),
        client.schedule(scheduled_at=FAR, spread_seconds=3600),
        client.schedule(scheduled_at=FAR, ordering_key="k", delivery_type="KAFKA", destination="orders"),
        client.schedule(scheduled_at=FAR, delivery_type="KAFKA", destination=...),
        client.schedule(scheduled_at=FAR, expires_at=(FAR + seconds(1)).isoformat()),
        client.schedule(scheduled_at=FAR, external_job_id="cancelled"),
        client.schedule(scheduled_at=FAR, external_job_id="away"),
    ]
    client.at(NOON + seconds(60))
    client.cancel(ids[-2])
    ids.append(moved(client, ids[-1], FAR + timedelta(hours=1)))
    before = [whole(client, uid) for uid in ids]
    assert [shown["status"] for shown in before] == [*["scheduled"] * 7, "cancelled", "rescheduled", "scheduled"]
    assert [outcome["result"] for outcome in before[7]["outcomes"]] == ["cancelled"]

    assert maintain(client.at(NEAR))["horizon_moved"] == 10
    assert waiting(client) == []
    assert [whole(client, uid) for uid in ids] == before
    assert violations(client.connection, acknowledged=ids) == []


def test_moved_events_are_delivered_by_priority_spread_and_order(client: Client) -> None:
    low, high = client.schedule(scheduled_at=FAR, priority=-3), client.schedule(scheduled_at=FAR, priority=8)
    spread = client.schedule(scheduled_at=FAR, spread_seconds=600)
    keys = [client.schedule(scheduled_at=FAR + seconds(n), ordering_key="k") for n in range(3)]
    maintain(client.at(NEAR))
    client.at(FAR + seconds(-1))
    assert client.claim_on() == []
    client.at(FAR)
    leases = client.claim(1)
    assert [lease.event_id for lease in leases] == [high]
    client.finish(results(leases))
    client.at(FAR + seconds(700))
    first = client.claim_on()
    assert {lease.event_id for lease in first} == {low, spread, keys[0]}
    [lease] = [lease for lease in first if lease.event_id == spread]
    assert FAR < lease.due_at < FAR + seconds(600)
    assert lease.due_at == FAR + client.value("select orchestrator.spread_shift(%s, '600 s')", spread)
    client.finish(results(first))
    for uid in keys[1:]:
        leases = client.claim_on()
        assert [lease.event_id for lease in leases] == [uid]
        client.finish(results(leases))


def test_a_destination_s_dedicated_lane_and_spread_hold_for_events_from_the_horizon(client: Client) -> None:
    uid = client.schedule(scheduled_at=FAR)
    client.rows("select orchestrator.configure_destination('receiver.example', p_spread => '600 s')")
    maintain(client.at(NEAR))
    [(lane, due_at)] = client.rows("select lane, due_at from orchestrator.timer")
    assert lane > 63
    assert due_at == FAR + client.value("select orchestrator.spread_shift(%s, '600 s')", uid)


# Duplicates


def test_an_event_is_a_duplicate_before_during_and_after_its_move(connect: Connect) -> None:
    client, mover = connect(), connect()
    items = [event(scheduled_at=FAR, external_job_id=job) for job in ("live", "ended")]
    ids = [str(answer.id) for answer in client.submit(*items)]
    client.cancel(ids[1])

    def again() -> list[tuple[str | None, str]]:
        return [(answer.id, answer.result) for answer in client.submit(*items)]

    duplicates = [(uid, "duplicate") for uid in ids]
    assert again() == duplicates
    client.rows("select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    assert again() == duplicates
    client.rows("set lock_timeout = '1 s'")
    mover.rows("begin")
    assert mover.value("select orchestrator.move_horizon()") == 2
    assert again() == duplicates
    mover.rows("rollback")
    assert again() == duplicates
    assert mover.value("select orchestrator.move_horizon()") == 2
    assert again() == duplicates
    maintain(client.at(NEAR))
    assert again() == duplicates
    assert events(client) == sorted(ids)
    assert [client.status(uid) for uid in ids] == ["scheduled", "cancelled"]
    assert client.totals() == {"accepted": 2, "cancelled": 1, "duplicate": 12}


def test_a_batch_that_repeats_itself_beyond_the_partitions_is_accepted_once(client: Client) -> None:
    items = [event(scheduled_at=at, external_job_id="j") for at in (FAR, NOON, FAR, NOON)]
    assert [answer.result for answer in sorted(client.submit(*items))] == ["accepted"] * 2 + ["duplicate"] * 2
    assert client.totals() == {"accepted": 2, "duplicate": 2}


def test_submitting_waits_for_a_day_that_gets_its_partition_and_finds_its_events(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    """Else the event could be in the horizon for one and in its partition for another."""
    early, late, maintainer = connect(), connect(), connect()
    item = event(scheduled_at=FAR, external_job_id="j")
    early.rows("begin")
    [answer] = early.submit(item)
    making = threads.submit(maintainer.rows, "select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    observer.wait_until_blocked(maintainer)
    submitting = threads.submit(late.submit, item)
    observer.wait_until_blocked(late)
    early.rows("commit")
    making.result(10)
    assert [(other.id, other.result) for other in submitting.result(10)] == [(answer.id, "duplicate")]
    assert observer.totals() == {"accepted": 1, "duplicate": 1}


def test_events_that_many_sessions_submit_during_a_move_are_kept_once(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    submitters, mover = [connect() for _ in range(4)], connect()
    jobs = [str(n) for n in range(60)]

    def submit(number: int) -> list[str]:
        answers = []
        for turn in range(12):
            part = jobs[turn * 5 : turn * 5 + 15]
            batch = [event(scheduled_at=FAR, external_job_id=job) for job in (part if number % 2 else reversed(part))]
            answers += submitters[number].submit(*batch)
        return [answer.result for answer in answers]

    running = [threads.submit(submit, number) for number in range(4)]
    mover.at(NEAR)
    while not all(job.done() for job in running):
        mover.rows("select orchestrator.run_maintenance(45)")
        mover.value("select orchestrator.move_horizon(7)")
    answered = [result for job in running for result in job.result()]
    maintain(mover)
    assert answered.count("accepted") == 60
    assert set(answered) == {"accepted", "duplicate"}
    assert waiting(mover) == []
    assert len(events(mover)) == mover.value("select count(*) from orchestrator.timer") == 60
    assert mover.totals()["accepted"] == 60
    assert violations(mover.connection) == []


# Moving


def test_the_horizon_moves_in_bounded_batches_the_earliest_first(client: Client) -> None:
    ids = [client.schedule(scheduled_at=FAR + seconds(n)) for n in (3, 1, 4, 0, 2)]
    client.schedule(scheduled_at=FAR + timedelta(days=30))
    client.rows("select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    for expected in (2, 2, 1, 0):
        assert client.value("select orchestrator.move_horizon(2)") == expected
        assert events(client) == sorted(ids)[: len(events(client))]
    assert len(waiting(client)) == 1


def test_maintenance_asks_to_be_called_again_until_the_horizon_is_moved(client: Client) -> None:
    client.schedule(scheduled_at=FAR)
    client.at(NEAR)
    reports = [client.value("select orchestrator.run_maintenance()") for _ in range(3)]
    assert [report["horizon_moved"] for report in reports] == [0, 1, 0]
    assert [report["more"] for report in reports[:2]] == [True, True]


@pytest.mark.parametrize("table", ["event", "timer", "outcome"])
def test_a_move_that_meets_a_full_disk_leaves_nothing_half_moved(client: Client, table: Any) -> None:
    ids = [client.schedule(scheduled_at=FAR + seconds(n)) for n in range(6)]
    for uid in ids[:3]:
        client.cancel(uid)
    client.rows("select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    client.rows(
        """create function public.refuse() returns trigger language plpgsql as $$
        begin
          if (select count(*) from orchestrator.event) >= 2 then
            raise exception 'could not extend file: No space left on device' using errcode = 'disk_full';
          end if;
          return new;
        end $$"""
    )
    client.connection.execute(
        f"create trigger full_disk after insert on orchestrator.{table} for each row execute function public.refuse()"
    )
    before = [whole(client, uid) for uid in ids]
    report = client.value("select orchestrator.run_maintenance()")
    assert report["problems"] == [
        {"step": "horizon_moved", "problem": "could not extend file: No space left on device"}
    ]
    assert report["horizon_moved"] == 0
    assert waiting(client) == ids
    assert events(client) == client.column("select event_id from orchestrator.timer") == []
    assert client.rows("select * from orchestrator.outcome") == []
    client.connection.execute(f"drop trigger full_disk on orchestrator.{table}")
    assert maintain(client)["horizon_moved"] == 6
    assert [whole(client, uid) for uid in ids] == before


@pytest.mark.parametrize("commits", [True, False])
def test_a_cancel_waits_for_a_move_and_finds_the_event_on_either_side(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, commits: bool
) -> None:
    mover, canceller = connect(), connect()
    uid = canceller.schedule(scheduled_at=FAR, external_job_id="j")
    mover.rows("select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    mover.rows("begin")
    mover.rows("select orchestrator.move_horizon()")
    cancelling = threads.submit(canceller.cancel, uid)
    observer.wait_until_blocked(canceller)
    mover.rows("commit" if commits else "rollback")
    [answer] = cancelling.result(10)
    assert (answer.result, answer.status) == ("cancelled", "cancelled")
    maintain(mover)
    assert observer.status(uid) == "cancelled"
    assert observer.rows("select * from orchestrator.timer") == []
    assert observer.outcomes(uid) == [(0, "cancelled")]
    assert observer.totals() == {"accepted": 1, "cancelled": 1}


@pytest.mark.parametrize("how", ["cancel", "reschedule"])
def test_a_move_leaves_events_that_another_session_is_ending_to_the_next_move(connect: Connect, how: str) -> None:
    mover, ender = connect(), connect()
    uid, other = ender.schedule(scheduled_at=FAR), ender.schedule(scheduled_at=FAR)
    mover.rows("select orchestrator.create_partitions(%s, %s)", FAR.date(), FAR.date())
    ender.rows("begin")
    [answer] = ender.cancel(uid) if how == "cancel" else reschedule(ender, uid, NOON + seconds(60))
    mover.rows("set lock_timeout = '1 s'")
    assert mover.value("select orchestrator.move_horizon()") == 1
    assert events(mover) == [other]
    ender.rows("commit")
    assert mover.value("select orchestrator.move_horizon()") == 1
    assert (answer.result, mover.status(uid)) == (f"{how}led".replace("rescheduleled", "rescheduled"),) * 2
    assert violations(mover.connection, acknowledged=[uid, other]) == []


def test_cancelling_by_external_id_reaches_both_sides_of_the_horizon(client: Client) -> None:
    near, far = (client.schedule(scheduled_at=at, external_job_id="j") for at in (NOON, FAR))
    assert [(answer.event_id, answer.result) for answer in client.cancel_external("j")] == [
        (far, "cancelled"),
        (near, "cancelled"),
    ]
    assert [answer.result for answer in client.cancel(far)] == ["already_cancelled"]
    assert client.claim() == []


def test_an_accepted_event_writes_one_message_on_both_sides_of_the_horizon(client: Client) -> None:
    client.rows("select orchestrator.set_outbox('{scheduled}')")
    uid = client.schedule(scheduled_at=FAR)
    maintain(client.at(NEAR))
    assert [str(told) for told in client.column("select event_id from orchestrator.outbox")] == [uid]


def test_the_horizon_begins_with_the_first_moment_beyond_the_partitions(client: Client) -> None:
    end = client.value("select end_day from orchestrator.partition_bounds()")
    inside = client.schedule(scheduled_at=end - timedelta(microseconds=1))
    beyond = client.schedule(scheduled_at=end)
    assert (events(client), waiting(client)) == ([inside], [beyond])
    maintain(client.at(NOON + timedelta(days=1)))
    assert (events(client), waiting(client)) == ([inside, beyond], [])


def test_a_partition_made_by_hand_does_not_hide_the_days_before_it(client: Client) -> None:
    """Days without a partition before one that has: their events are in the horizon, and stay what they are."""
    day = FAR.date()
    client.rows("select orchestrator.create_partitions(%s, %s)", day, day)
    maintain(client)
    items = [event(scheduled_at=FAR + timedelta(days=n), external_job_id="j") for n in (-1, 0, 1)]
    ids = [answer.id for answer in sorted(client.submit(*items))]
    assert waiting(client) == [ids[0], ids[2]]
    maintain(client)
    assert [(answer.id, answer.result) for answer in sorted(client.submit(*items))] == [
        (uid, "duplicate") for uid in ids
    ]


def test_the_days_that_can_be_scheduled_ahead_are_configurable(client: Client) -> None:
    client.rows("select orchestrator.configure_retention(p_max_schedule_ahead_days => 40)")
    end = NOON + timedelta(days=40)
    near, far = sorted(client.submit(*[event(scheduled_at=at) for at in (end - timedelta(microseconds=1), end)]))
    assert (near.result, far.result, far.field) == ("accepted", "refused", "scheduled_at")
    assert "more than 40 days ahead" in str(far.reason)
