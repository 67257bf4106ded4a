"""Deliveries at the first attempt, as a dispatcher records them: rows of arrays that read as single outcomes do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest

from orchestrator.database import Claimed, Finished, Leases, NotDelivered
from orchestrator.database.delivered import delivered_arguments
from orchestrator.database.leases import FINISH_DELIVERED
from orchestrator.dispatch.attempt import DELIVERED, RETRY, Attempted, finished
from orchestrator.errors import Blocked
from orchestrator.settings import Settings
from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, Finish, event, results, seconds

BATCH = 20
ROWS: LiteralString = """select event_id, scheduled_at, due_at, claimed_at, started_at, finished_at, worker, attempt
  , status_code, result"""


class Dispatcher:
    """The connections of a dispatcher, whose calls are made one by one."""

    def __init__(self, database_url: str) -> None:
        self._runner = asyncio.Runner()
        self._opened = Leases.open(Settings.from_env({"DATABASE_URL": database_url}), "tests", None)
        self.leases = self._runner.run(self._opened.__aenter__())
        self.at(NOON)

    def at(self, moment: datetime) -> None:
        for connection in (self.leases._claiming, self.leases._finishing):
            self._runner.run(
                connection.execute("select set_config('orchestrator.now', %s, false)", (moment.isoformat(),))
            )

    def claim(self, batch: int = 1000) -> list[Claimed]:
        return self._runner.run(self.leases.claim(batch, lease_s=60, lookahead_s=0)).events

    def finish(self, given: list[Finished]) -> list[NotDelivered]:
        return self._runner.run(self.leases.finish(given))

    def close(self) -> None:
        self._runner.run(self._opened.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture
def dispatcher(client: Client, database_url: str) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(database_url)
    try:
        yield dispatcher
    finally:
        dispatcher.close()


def delivered(events: list[Claimed], status_code: int | None = 204) -> list[Finished]:
    """Results that differ by a microsecond each."""
    began = NOON.timestamp()
    return [finished(each, Attempted(DELIVERED, status_code), began + n * 1e-6, 0.25) for n, each in enumerate(events)]


def batches(client: Client) -> list[int]:
    return client.column("select cardinality(ids) from orchestrator.delivered_batch order by scheduled_at, first_id")


def shown(client: Client, ids: list[str]) -> list[Any]:
    return client.rows(f"{ROWS} from orchestrator.outcomes where event_id = any (%s::uuid[]) order by event_id", ids)


def test_a_batch_reads_as_rows_of_outcome_do(client: Client, dispatcher: Dispatcher) -> None:
    """Everywhere: in both views, in the answer about one event, in the counts. Due times are exact."""
    times = [NOON - timedelta(microseconds=n * 1000 + n % 3) for n in range(1, BATCH + 1)]
    ids = [client.schedule(scheduled_at=at) for at in times]
    claimed = dispatcher.claim()
    before = client.rows("select event_id::text, scheduled_at, due_at from orchestrator.timer order by event_id")
    assert dispatcher.finish(delivered(claimed)) == []
    assert batches(client) == [BATCH]
    assert client.rows("select from orchestrator.outcome") == []
    rows = shown(client, ids)
    assert [(str(row[0]), row[1], row[2]) for row in rows] == before
    by_id = {str(row[0]): row for row in rows}
    for n, each in enumerate(claimed):
        started = NOON + timedelta(microseconds=n)
        assert by_id[each.event_id][3:] == (
            NOON, started, started + seconds(0.25), dispatcher.leases.worker, 1, 204, "delivered",
        )  # fmt: skip
        [outcome] = client.get(each.event_id)["outcomes"]
        assert (outcome["attempt"], outcome["result"], outcome["status_code"], outcome["worker"]) == (
            1, "delivered", 204, "tests",
        )  # fmt: skip
    assert client.rows("select distinct status, attempt, last_status_code from orchestrator.event_status") == [
        ("delivered", 1, 204)
    ]
    assert client.totals() == {"accepted": BATCH, "delivered": BATCH}
    assert client.rows("select from orchestrator.timer") == []
    assert violations(client.connection, acknowledged=ids, finished=True) == []


@pytest.mark.parametrize("codes", [[200] * BATCH, [None] * BATCH, [200, None] * (BATCH // 2), [200, 204, 201, 202] * 5])
def test_each_status_code_is_kept(client: Client, dispatcher: Dispatcher, codes: list[int | None]) -> None:
    client.schedule_many(BATCH)
    claimed = sorted(dispatcher.claim(), key=lambda each: each.event_id)
    dispatcher.finish(
        [delivered([each], code)[0] for each, code in zip(claimed, codes, strict=True)],
    )
    assert batches(client) == [BATCH]
    assert client.column("select status_code from orchestrator.outcomes order by event_id") == codes


def test_a_batch_ends_with_its_ten_seconds_its_day_and_two_hundred_events(
    client: Client, dispatcher: Dispatcher
) -> None:
    midnight = NOON.replace(hour=0)
    ids = client.schedule_many(450, scheduled_at=NOON - seconds(1))
    ids += client.schedule_many(3, scheduled_at=midnight - timedelta(microseconds=1))
    ids += client.schedule_many(3, scheduled_at=midnight)
    ids += client.schedule_many(2, scheduled_at=midnight + seconds(9.999999))
    ids += client.schedule_many(2, scheduled_at=midnight + seconds(10))
    alone = client.schedule(scheduled_at=midnight + seconds(20))
    dispatcher.finish(delivered(dispatcher.claim()))
    assert batches(client) == [3, 5, 2, 200, 200, 50]
    # A batch of one is smaller as a row.
    assert client.column("select event_id::text from orchestrator.outcome") == [alone]
    assert len(shown(client, [*ids, alone])) == 461
    assert {client.status(uid) for uid in [*ids[::50], *ids[-10:], alone]} == {"delivered"}
    assert violations(client.connection, finished=True) == []


def test_among_many_results_only_what_a_batch_can_keep_is_in_it(client: Client, dispatcher: Dispatcher) -> None:
    client.schedule_many(BATCH + 5)
    given = delivered(dispatcher.claim())
    given[0].result, given[0].error = RETRY, "HTTP 503"
    given[1].result = "fail"
    given[2].error = "the connection broke in the answer"
    given[3].waited = '{"rate": 12}'
    given[4].timer = None
    told = {(each.event_id, each.result, each.attempt) for each in dispatcher.finish(given)}
    assert told == {(given[0].event_id, "retried", 1), (given[1].event_id, "dead", 1)}
    assert batches(client) == [BATCH]
    assert sorted(client.column("select event_id::text from orchestrator.outcome")) == sorted(
        each.event_id for each in given[:5]
    )
    assert client.totals() == {"accepted": BATCH + 5, "delivered": BATCH + 3, "dead": 1, "retried": 1}
    assert violations(client.connection) == []


def test_few_results_are_kept_as_rows(client: Client, dispatcher: Dispatcher) -> None:
    client.schedule_many(3)
    assert dispatcher.finish(delivered(dispatcher.claim())) == []
    assert (batches(client), client.value("select count(*) from orchestrator.outcome")) == ([], 3)


def test_a_batch_whose_reply_was_lost_is_neither_stale_nor_recorded_twice(
    client: Client, dispatcher: Dispatcher
) -> None:
    """Given again as a whole, in part, and by the other function."""
    ids = client.schedule_many(BATCH)
    given = delivered(dispatcher.claim())
    assert dispatcher.finish(given) == []
    before = shown(client, ids)
    assert dispatcher.finish(given) == []
    assert dispatcher.finish(given[3:7]) == []
    worker = dispatcher.leases.worker
    leases = [each.event_id for each in given]
    assert client.rows(
        "select * from orchestrator.finish_events(%s::uuid[], %s, %s, p_worker => %s)",
        leases, [1] * BATCH, ["delivered"] * BATCH, worker,
    ) == []  # fmt: skip
    assert shown(client, ids) == before
    assert client.totals() == {"accepted": BATCH, "delivered": BATCH}
    # Another worker has not delivered them, nor has this one at another attempt.
    for attempt, other in ((1, worker + 1), (2, worker)):
        stale = client.rows(
            "select * from orchestrator.finish_events(%s::uuid[], %s, %s, p_worker => %s)",
            leases[:2], [attempt] * 2, ["delivered"] * 2, other,
        )  # fmt: skip
        assert {(str(row[0]), *row[1:]) for row in stale} == {(uid, "stale", None, attempt) for uid in leases[:2]}


def test_of_a_batch_partly_recorded_the_rest_is_recorded(client: Client, dispatcher: Dispatcher) -> None:
    ids = client.schedule_many(2 * BATCH)
    given = delivered(dispatcher.claim())
    dispatcher.finish(given[::2])
    assert dispatcher.finish(given) == []
    assert len(shown(client, ids)) == 2 * BATCH
    assert client.totals() == {"accepted": 2 * BATCH, "delivered": 2 * BATCH}
    assert violations(client.connection, acknowledged=ids, finished=True) == []


def test_an_event_that_another_claim_or_a_cancel_took_is_stale_and_the_others_are_recorded(
    client: Client, dispatcher: Dispatcher
) -> None:
    ids = sorted(client.schedule_many(BATCH))
    claimed = dispatcher.claim()
    client.at(NOON + seconds(61))
    client.cancel(ids[0])
    taken = client.claim(3, worker=99)
    given = delivered(claimed)
    told = dispatcher.finish(given)
    lost = {ids[0], *(lease.event_id for lease in taken)}
    assert {(each.event_id, each.result, each.attempt) for each in told} == {(uid, "stale", 1) for uid in lost}
    assert len(shown(client, sorted(set(ids) - lost))) == BATCH - len(lost)
    assert client.status(ids[0]) == "cancelled"
    assert client.finish(results(taken), worker=99) == []
    assert client.totals() == {"accepted": BATCH, "cancelled": 1, "delivered": BATCH - 1}
    assert violations(client.connection, acknowledged=ids, finished=True, clock_goes_forward=False) == []


def test_timers_that_moved_since_the_claim_are_found_all_the_same(client: Client, dispatcher: Dispatcher) -> None:
    """Even where the place of one holds another by now."""
    ids = client.schedule_many(BATCH)
    first = client.schedule_many(5)
    claimed = dispatcher.claim()
    client.rows("delete from orchestrator.timer where event_id = any (%s::uuid[])", first)
    client.rows("vacuum full orchestrator.timer")
    assert dispatcher.finish(delivered([each for each in claimed if each.event_id in ids])) == []
    assert len(shown(client, ids)) == BATCH
    assert client.totals()["delivered"] == BATCH
    assert client.rows("select from orchestrator.timer") == []


def test_a_place_that_another_event_has_taken_ends_only_the_event_that_is_named(
    client: Client, dispatcher: Dispatcher
) -> None:
    client.schedule_many(BATCH + 1)
    claimed = sorted(dispatcher.claim(), key=lambda each: each.event_id)
    given = delivered(claimed)
    for each, next_one in zip(given, claimed[1:], strict=False):
        each.timer = next_one.timer
    bystander = given.pop()
    assert dispatcher.finish(given) == []
    assert client.column("select event_id::text from orchestrator.timer") == [bystander.event_id]
    assert client.totals() == {"accepted": BATCH + 1, "delivered": BATCH}


def test_a_result_given_twice_is_recorded_once(client: Client, dispatcher: Dispatcher) -> None:
    ids = client.schedule_many(BATCH)
    given = delivered(dispatcher.claim())
    assert dispatcher.finish([*given, *given[:3]]) == []
    assert len(shown(client, ids)) == BATCH
    assert client.totals() == {"accepted": BATCH, "delivered": BATCH}


@pytest.mark.parametrize("column", ["due_at", "started_at", "finished_at", "claimed_at"])
@pytest.mark.parametrize("by_s", [-86_400.0, 86_400.0])
def test_times_too_far_apart_for_one_batch_are_kept_as_rows(
    client: Client, dispatcher: Dispatcher, column: str, by_s: float
) -> None:
    ids = client.schedule_many(BATCH)
    given = delivered(dispatcher.claim())
    setattr(given[7], column, getattr(given[7], column) + by_s)
    assert dispatcher.finish(given) == []
    assert (batches(client), len(shown(client, ids))) == ([], BATCH)
    assert client.totals() == {"accepted": BATCH, "delivered": BATCH}


def test_an_event_due_long_before_the_others_of_its_call_has_a_batch_of_its_own(
    client: Client, dispatcher: Dispatcher
) -> None:
    ids = client.schedule_many(BATCH, scheduled_at=NOON - timedelta(hours=5))
    ids += client.schedule_many(BATCH, scheduled_at=NOON - timedelta(hours=3))
    client.rows("update orchestrator.timer set due_at = scheduled_at")
    client.forget_floors()
    assert dispatcher.finish(delivered(dispatcher.claim())) == []
    assert batches(client) == [BATCH, BATCH]
    assert {(row[2] - row[1], row[2]) for row in shown(client, ids)} == {
        (timedelta(0), NOON - timedelta(hours=5)), (timedelta(0), NOON - timedelta(hours=3)),
    }  # fmt: skip


def test_batches_are_announced_as_single_results_are(client: Client, dispatcher: Dispatcher) -> None:
    client.rows("select orchestrator.set_outbox('{timestamp}')")
    ids = client.schedule_many(BATCH)
    dispatcher.finish(delivered(dispatcher.claim()))
    told = client.column("select convert_from(value, 'UTF8')::json from orchestrator.outbox order by event_id")
    assert [message["id"] for message in told] == sorted(ids)
    assert {(m["result"], m["attempt"], m["due_at"], m["claimed_at"]) for m in told} == {
        ("delivered", 1, NOON.isoformat(), NOON.isoformat())
    }
    assert len(shown(client, ids)) == BATCH


def test_a_batch_lets_the_next_events_of_its_ordering_keys_go(client: Client, dispatcher: Dispatcher) -> None:
    for n in range(BATCH):
        for job in range(2):
            client.schedule(ordering_key=f"key-{n}", external_job_id=f"{n}-{job}", scheduled_at=NOON - seconds(2 - job))
    first = dispatcher.claim()
    assert len(first) == BATCH
    assert dispatcher.finish(delivered(first)) == []
    assert batches(client) == [BATCH]
    assert len(dispatcher.claim()) == BATCH
    assert violations(client.connection) == []


def test_a_batch_closes_the_breaker_of_a_destination_that_works_again(client: Client, dispatcher: Dispatcher) -> None:
    client.rows("select orchestrator.configure_destination('https://receiver.example', p_max_parallel => 100)")
    client.schedule_many(BATCH)
    given = delivered(dispatcher.claim())
    client.rows("update orchestrator.lane set breaker = 'half_open', tried_at = %s where lane > 63", NOON)
    assert dispatcher.finish(given) == []
    assert batches(client) == [BATCH]
    assert client.column("select breaker from orchestrator.lane where lane > 63") == ["closed"]


def test_a_batch_and_a_cancel_of_its_events_do_not_deadlock(
    client: Client, dispatcher: Dispatcher, connect: Connect
) -> None:
    """The timers are locked in the order of the ids, though they stand in another one."""
    ids = sorted(client.schedule_many(BATCH))
    client.rows("create temp table kept as select * from orchestrator.timer order by event_id desc")
    client.rows("delete from orchestrator.timer")
    client.rows("insert into orchestrator.timer select * from kept")
    given = delivered(dispatcher.claim())
    assert client.column("select event_id::text from orchestrator.timer order by ctid")[0] == ids[-1]
    other = connect()
    other.rows("begin")
    other.rows("select from orchestrator.timer where event_id = %s for update", ids[0])
    with pytest.raises(Blocked):
        dispatcher.finish(given)
    # Nobody else waits for what the batch had locked: it was stopped at its first timer.
    other.rows("select from orchestrator.timer where event_id = any (%s::uuid[]) order by event_id for update", ids)
    other.rows("rollback")
    assert dispatcher.finish(given) == []
    assert batches(client) == [BATCH]


def test_a_session_that_ends_within_a_batch_leaves_nothing_of_it(
    client: Client, dispatcher: Dispatcher, connect: Connect
) -> None:
    ids = client.schedule_many(BATCH)
    arguments = delivered_arguments(sorted(delivered(dispatcher.claim()), key=lambda each: each.event_id))
    assert arguments is not None
    other = connect()
    other.rows("begin")
    assert other.value(FINISH_DELIVERED, *arguments, 1) is None
    assert batches(other) == [BATCH]
    client.rows("select pg_terminate_backend(%s, 10000)", other.pid)
    assert (batches(client), client.value("select count(*) from orchestrator.timer")) == ([], BATCH)
    assert {client.status(uid) for uid in ids} == {"in_flight"}
    assert client.totals() == {"accepted": BATCH}


@pytest.mark.parametrize(
    "change",
    [
        {"ids": "reversed"}, {"ids": "null"}, {"batches": [2]}, {"batches": [1, 1]}, {"batches": [1, BATCH + 2]},
        {"due_at": []}, {"started_us": [1]}, {"finished_us": None}, {"due_us": [1, 2]}, {"status_codes": [200]},
        {"batches": None}, {"tids": []}, {"worker": None}, {"claimed_at": None},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_nobody_could_find_again_are_refused_and_nothing_is_recorded(
    client: Client, change: dict[str, Any]
) -> None:
    client.schedule_many(BATCH)
    client.claim()
    rows = client.rows("select event_id, ctid::text from orchestrator.timer order by event_id")
    given: dict[str, Any] = {
        "ids": [row[0] for row in rows], "tids": [row[1] for row in rows], "batches": [1], "scheduled_us": None,
        "due_at": [NOON.timestamp()], "due_us": None, "claimed_at": NOON.timestamp(), "claimed_us": None,
        "started_us": [1] * BATCH, "finished_us": [2] * BATCH, "status_code": 200, "status_codes": None, "worker": 1,
    }  # fmt: skip
    if change == {"ids": "reversed"}:
        change = {"ids": given["ids"][::-1]}
    elif change == {"ids": "null"}:
        change = {"ids": [*given["ids"][1:], None]}
    with pytest.raises(psycopg.DatabaseError) as refused:
        client.rows(FINISH_DELIVERED, *(given | change).values())
    assert refused.value.sqlstate in {"22023", "23514", "23502"}, refused.value
    assert client.value("select count(*) from orchestrator.timer") == BATCH
    assert client.totals() == {"accepted": BATCH}
    assert client.value(FINISH_DELIVERED, *given.values()) is None
    assert batches(client) == [BATCH]


def test_no_results_are_no_work(client: Client, dispatcher: Dispatcher) -> None:
    assert client.value(FINISH_DELIVERED, *[None] * 13) is None
    assert client.value(FINISH_DELIVERED, [], [], [], *[None] * 10) is None
    assert dispatcher.finish([]) == []


def test_batches_of_a_million_events_at_one_instant_are_looked_through_once_for_a_stale_result(
    client: Client, dispatcher: Dispatcher
) -> None:
    """Many batches enclose each id; the answer is right for those that are in one and for those that are in none."""
    ids = client.schedule_many(600)
    claimed = dispatcher.claim()
    for n in range(6):
        assert dispatcher.finish(delivered(claimed[n::6])) == []
    assert batches(client) == [100] * 6
    unknown = client.schedule(external_job_id="unknown")
    given = [*delivered(claimed), *delivered(claimed[:1])]
    given[-1].event_id = unknown
    assert dispatcher.finish(given) == [NotDelivered(unknown, "stale", None, 1)]
    assert {client.status(uid) for uid in ids} == {"delivered"}


def test_old_clients_read_the_answer_by_its_names(client: Client) -> None:
    uid = client.schedule()
    client.claim()
    assert client.rows(
        "select event_id::text, result, due_at from orchestrator.finish_events(%s::uuid[], '{2}', '{retry}')", [uid]
    ) == [(uid, "stale", None)]
    assert client.finish(results(client.at(NOON + seconds(61)).claim(), "fail")) == [Finish(uid, "dead", None, 2)]


def test_a_cancelled_event_shows_its_end_beside_events_in_batches(client: Client, dispatcher: Dispatcher) -> None:
    client.schedule_many(BATCH)
    dispatcher.finish(delivered(dispatcher.claim()))
    [answer] = client.submit(event(external_job_id="x", scheduled_at=NOON + seconds(5)))
    client.cancel(str(answer.id))
    assert client.rows("select status, count(*) from orchestrator.event_status group by 1 order by 1") == [
        ("cancelled", 1), ("delivered", BATCH),
    ]  # fmt: skip
