"""The dispatcher in the test's own process, on a real database and, where it matters, a real receiver."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg import sql

from orchestrator.database import listening
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dispatch import dispatcher as module
from orchestrator.dispatch.attempt import DELIVERED, FAIL, Attempted
from orchestrator.dispatch.http.sender import Delivery
from orchestrator.errors import OrchestratorError
from tests.conftest import MakeSettings, Spawn
from tests.support.dispatching import arrivals, assert_laws, dispatching, finished, soon, statuses
from tests.support.receiver import HANG, Answer, Receiver
from tests.support.sql_client import Client, event
from tests.support.waiting import eventually


class Gate:
    """A sender whose deliveries all wait until it is opened."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.sent: list[str] = []
        self._opened = asyncio.Event()

    async def send(self, delivery: Delivery) -> Attempted:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._opened.wait()
        finally:
            self.running -= 1
        self.sent.append(delivery.event_id)
        return Attempted(DELIVERED, 204)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
async def gate() -> Gate:
    return Gate()


@asynccontextmanager
async def deafness(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Every notification is lost."""

    async def refuse(*_: object) -> None:
        raise OSError("no listening")

    with monkeypatch.context() as patched:
        patched.setattr(listening, "connect", refuse)
        yield


def quick_policy(client: Client, *delays: str) -> None:
    """A retry policy named quick, without jitter."""
    client.rows(
        "insert into orchestrator.retry_policy (name, schedule, jitter) values ('quick', %s::interval[], 0)",
        list(delays),
    )


def schedule_apart(client: Client, count: int, scheduled_at: datetime) -> list[str]:
    """Events to as many destinations, so that no window but the dispatcher's own bounds them."""
    made = [
        event(scheduled_at=scheduled_at, destination=f"https://receiver-{n}.example.com/hooks") for n in range(count)
    ]
    return [str(answer.id) for answer in client.submit(*made)]


def outcomes(client: Client, event_id: str) -> list[Any]:
    return cast(list[Any], client.get(event_id)["outcomes"])


async def test_every_event_is_delivered_once_and_on_time_and_never_early(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with dispatching(settings(SCHEDULER_BATCH_SIZE="50")) as running:
        due = [soon(1 + n / 250) for n in range(250)]  # after they are submitted, on a busy machine as well
        answers = client.submit(*[event(scheduled_at=at, destination=receiver.url("/hook")) for at in due])
        ids = [str(answer.id) for answer in answers]
        await finished(client, ids)
    assert running.value("events_delivered_total") == 250
    assert running.value("event_lateness_seconds_count") == 250
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)
    assert statuses(client, ids) == {"delivered": 250}
    assert_laws(client, receiver.requests, ids)
    lateness = client.column("select extract(epoch from started_at - due_at)::float8 from orchestrator.outcomes")
    assert sorted(lateness)[len(lateness) // 2] < 0.1


async def test_events_are_held_before_they_are_due_and_fired_from_memory(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    due = soon(1.2)
    async with dispatching(settings()) as running:
        event_id = client.schedule(scheduled_at=due, destination=receiver.url())
        await eventually(lambda: running.value("events_held") == 1)
        assert soon(0) < due
        assert client.status(event_id) == "in_flight"
        client.connection.close()  # nothing more of the database is needed for this
        await receiver.wait_for(1)
        assert receiver.requests[0].arrived_at - due.timestamp() < 0.5


async def test_failures_are_retried_by_the_policy_and_recorded(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    quick_policy(client, "60 ms", "200 ms")
    url = receiver.script("/flaky", Answer(500, b"sorry \xff\x00!"), Answer(503, b"later"), Answer(204))
    async with dispatching(settings()) as running:
        event_id = client.schedule(scheduled_at=soon(0), destination=url, retry_policy="quick", max_retries=2)
        await finished(client, [event_id])
    assert running.value("events_retried_total") == 2
    told = outcomes(client, event_id)
    assert [(o["attempt"], o["result"], o["status_code"]) for o in told] == [
        (1, "retried", 500),
        (2, "retried", 503),
        (3, "delivered", 204),
    ]
    assert told[0]["response"] == "sorry \ufffd\ufffd!"
    assert told[0]["error"] == "HTTP 500 Internal Server Error"
    assert [request.headers["orchestrator-attempt"] for request in receiver.requests] == ["1", "2", "3"]
    first, second, third = (request.arrived_at for request in receiver.requests)
    assert 0.06 <= second - first < 1  # it is not left to the next poll
    assert 0.2 <= third - second < 1.2
    assert_laws(client, receiver.requests, [event_id])


async def test_a_retry_comes_no_sooner_than_the_receiver_asks(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    quick_policy(client, "10 ms")
    url = receiver.script("/busy", Answer(429, headers={"Retry-After": "1"}), Answer(204))
    async with dispatching(settings()):
        event_id = client.schedule(scheduled_at=soon(0), destination=url, retry_policy="quick")
        await finished(client, [event_id])
    first, second = receiver.requests
    assert 1.0 <= second.arrived_at - first.arrived_at < 2.0


async def test_an_event_dies_when_its_attempts_are_used_up_or_the_answer_is_final(
    settings: MakeSettings, client: Client, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    quick_policy(client, "1 ms")
    failing = receiver.script("/failing", Answer(500))
    gone = receiver.script("/gone", Answer(410, b"no such hook"))
    async with dispatching(settings()) as running:
        tried = client.schedule(scheduled_at=soon(0), destination=failing, retry_policy="quick", max_retries=2)
        final = client.schedule(scheduled_at=soon(0), destination=gone, max_retries=5)
        await finished(client, [tried, final])
    assert running.value("events_dead_total") == 2
    assert len(receiver.received("/failing")) == 3
    assert len(receiver.received("/gone")) == 1
    assert statuses(client, [tried, final]) == {"dead": 2}
    (last,) = outcomes(client, final)
    assert (last["result"], last["status_code"], last["response"]) == ("dead", 410, "no such hook")
    assert sorted(client.column("select event_id::text from orchestrator.dead_letter")) == sorted([tried, final])
    said = {cast(Any, record).event_id for record in caplog.records if record.message == "event is dead"}
    assert said == {tried, final}


@pytest.mark.parametrize("status", [0, 99, 999, None])
async def test_a_status_is_recorded_as_the_number_that_was_sent(
    settings: MakeSettings, client: Client, status: int | None
) -> None:
    class Odd:
        async def send(self, delivery: Delivery) -> Attempted:
            return Attempted(FAIL, status, "odd")

    async with dispatching(settings(), Odd()):
        event_id = client.schedule(scheduled_at=soon(0))
        await finished(client, [event_id])
    assert [outcome["status_code"] for outcome in outcomes(client, event_id)] == [status]


async def test_every_line_about_an_event_carries_its_id(
    settings: MakeSettings, client: Client, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "orchestrator")
    url = receiver.script("/flaky", Answer(500), Answer(204))
    quick_policy(client, "1 ms")
    async with dispatching(settings()):
        event_id = client.schedule(scheduled_at=soon(0), destination=url, retry_policy="quick")
        await finished(client, [event_id])
    lines = [record for record in caplog.records if record.name.startswith("orchestrator.dispatch")]
    assert [cast(Any, record).event_id for record in lines if "attempt" in record.message] == [event_id]
    assert cast(Any, lines[0]).error == "HTTP 500 Internal Server Error"


async def test_a_notification_wakes_the_dispatcher_long_before_the_poll(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000")):
        listeners = "select count(*) from pg_stat_activity where query ~ '^listen ' and datname = current_database()"
        await eventually(lambda: client.value(listeners) == 1)
        for n in range(3):
            client.schedule(scheduled_at=soon(0), destination=receiver.url())
            await receiver.wait_for(n + 1, timeout_s=5)
            submitted_at = client.value("select extract(epoch from max(created_at))::float8 from orchestrator.event")
            assert receiver.requests[-1].arrived_at - submitted_at < 2


async def test_polling_finds_due_events_without_notifications(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with deafness(monkeypatch), dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="300")):
        client.schedule(scheduled_at=soon(0), destination=receiver.url())
        await receiver.wait_for(1, timeout_s=3)


async def test_a_dispatcher_with_rare_polls_claims_again_when_the_next_event_is_due(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Known before the first claim, due after its look-ahead, long before the next poll; and nobody tells.
    due = soon(1.5)
    client.schedule(scheduled_at=due, destination=receiver.url())
    far_apart = settings(SCHEDULER_POLL_INTERVAL_MS="10000", SCHEDULER_LOOKAHEAD_MS="500")
    async with deafness(monkeypatch), dispatching(far_apart):
        await receiver.wait_for(1, timeout_s=5)
    assert 0 <= receiver.requests[0].arrived_at - due.timestamp() < 1


async def test_events_locked_by_another_session_do_not_cause_claims_without_a_pause(
    settings: MakeSettings, client: Client, receiver: Receiver, database_url: str
) -> None:
    event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
    with psycopg.connect(database_url) as locking:
        locking.execute("select from orchestrator.timer for update")
        far_apart = settings(SCHEDULER_POLL_INTERVAL_MS="10000", SCHEDULER_LOOKAHEAD_MS="0")
        async with dispatching(far_apart) as running:
            before, began_s = running.value("claim_seconds_count"), time.monotonic()
            await eventually(lambda: running.value("claim_seconds_count") >= before + 5)
            assert time.monotonic() - began_s > 0.4
            locking.rollback()
            await finished(client, [event_id])


async def test_no_more_deliveries_run_at_once_than_there_are_connections(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    ids = schedule_apart(client, 40, soon(0))
    async with dispatching(settings(HTTP_MAX_CONNECTIONS="3"), gate) as running:
        await eventually(lambda: gate.running == 3 and running.value("events_held") == 37)
        assert running.value("events_in_flight") == 3
        gate.open()
        await finished(client, ids)
    assert gate.most == 3
    assert sorted(gate.sent) == sorted(ids)


async def test_no_more_events_are_held_than_the_prefetch_allows(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    ids = schedule_apart(client, 100, soon(0))
    ours = settings(HTTP_MAX_CONNECTIONS="2", SCHEDULER_BATCH_SIZE="5", SCHEDULER_PREFETCH="12")
    async with dispatching(ours, gate) as running:
        await eventually(lambda: gate.running == 2 and running.value("events_held") >= 8)
        client.schedule(scheduled_at=soon(0))  # a notification does not make it claim more
        leased = "select count(*) from orchestrator.timer where lease_until is not null"
        await eventually(lambda: client.value("select count(*) from orchestrator.event") == 101)
        assert client.value(leased) <= 12 + 2
        gate.open()
        await eventually(lambda: client.value("select count(*) from orchestrator.timer") == 0)
    assert len(set(gate.sent)) == len(gate.sent) == len(ids) + 1


async def test_a_stop_lets_attempts_finish_and_hands_other_events_back_unspent(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    due_now = schedule_apart(client, 4, soon(-1))
    later = schedule_apart(client, 10, soon(1.4))
    async with dispatching(settings(HTTP_MAX_CONNECTIONS="4"), gate) as running:
        await eventually(lambda: gate.running == 4 and running.value("events_held") == 10)
        stopping = asyncio.create_task(running.stop())
        await eventually(lambda: running.value("events_released_total") == 10)
        gate.open()
        await asyncio.wait_for(stopping, 5)
    assert sorted(gate.sent) == sorted(due_now)
    assert statuses(client, due_now) == {"delivered": 4}
    spared = client.rows(
        "select lease_until, max_attempts - attempt from orchestrator.timer where event_id = any (%s::uuid[])", later
    )
    assert spared == [(None, 4)] * 10  # as many attempts as a new event has


async def test_an_attempt_that_outlasts_the_stop_is_cut_short_and_left_to_other_workers(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    url = receiver.script("/slow", HANG)
    event_id = client.schedule(scheduled_at=soon(0), destination=url)
    async with dispatching(settings(SHUTDOWN_TIMEOUT_SECONDS="0.5")) as running:
        await receiver.wait_for(1)
        began_s = time.monotonic()
        await running.stop()
        assert time.monotonic() - began_s < 2
    assert client.status(event_id) == "retrying"  # not when its lease has run out: now
    (outcome,) = outcomes(client, event_id)
    assert outcome["error"] == "the dispatcher stopped before the receiver answered"


async def test_a_stop_while_the_database_is_away_ends_in_time(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, gate: Gate
) -> None:
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        schedule_apart(client, 5, soon(0))
        schedule_apart(client, 5, soon(1.4))
    ours = settings(DATABASE_URL=url, SHUTDOWN_TIMEOUT_SECONDS="2", HTTP_MAX_CONNECTIONS="5")
    async with dispatching(ours, gate) as running:
        await eventually(lambda: gate.running == 5 and running.value("events_held") == 5)
        await asyncio.to_thread(postgres_server.kill)
        gate.open()
        began_s = time.monotonic()
        await running.stop()
        assert time.monotonic() - began_s < 3


async def test_a_stop_without_results_to_record_does_not_wait_for_a_database_that_is_away(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    ours = settings(DATABASE_URL=postgres_server.url("orchestrator"), SHUTDOWN_TIMEOUT_SECONDS="20")
    async with dispatching(ours) as running:
        await asyncio.to_thread(postgres_server.kill)
        await eventually(lambda: len(away(caplog)) >= 2)
        began_s = time.monotonic()
        await running.stop()
        assert time.monotonic() - began_s < 3


async def test_an_attempt_that_ends_after_the_stop_began_is_recorded_when_the_database_comes_back(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        ids = client.schedule_many(3, scheduled_at=soon(0))
    async with dispatching(settings(DATABASE_URL=url, SCHEDULER_POLL_INTERVAL_MS="50"), gate) as running:
        await eventually(lambda: gate.running == 3)
        await asyncio.to_thread(postgres_server.kill)
        await eventually(lambda: away(caplog))
        stopping = asyncio.create_task(running.stop())
        await asyncio.to_thread(postgres_server.start)
        gate.open()
        await asyncio.wait_for(stopping, 18)
    with Client(url) as client:
        assert statuses(client, ids) == {"delivered": 3}


def backends(client: Client) -> list[int]:
    """The process ids of all sessions of dispatchers."""
    return client.column(
        "select pid from pg_stat_activity where application_name ~ '^orchestrator ' and datname = current_database()"
    )


def terminate(client: Client) -> None:
    """Ends all sessions of dispatchers."""
    for pid in backends(client):
        client.rows("select pg_terminate_backend(%s)", pid)


async def test_a_database_that_hangs_is_given_up_and_connected_to_again(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.3)
    async with deafness(monkeypatch), dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="100")):
        with paused(backends(client)):
            event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
            await finished(client, [event_id], timeout_s=20)
    assert arrivals(receiver.requests) == {event_id: 1}


async def test_a_stop_while_the_database_hangs_ends_in_time(settings: MakeSettings, client: Client, gate: Gate) -> None:
    schedule_apart(client, 4, soon(0))
    ours = settings(SHUTDOWN_TIMEOUT_SECONDS="1", SCHEDULER_POLL_INTERVAL_MS="50", HTTP_MAX_CONNECTIONS="2")
    async with dispatching(ours, gate) as running:
        await eventually(lambda: gate.running == 2)
        with paused(backends(client)):
            gate.open()
            began_s = time.monotonic()
            await running.stop()
            assert time.monotonic() - began_s < 2


@contextmanager
def paused(pids: Iterable[int]) -> Iterator[None]:
    """These processes stand still within the block."""
    stopped = list(pids)
    assert stopped
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def set_read_only(client: Client, read_only: bool) -> None:
    """As a failover leaves a standby: sessions to come can be opened, and write nothing."""
    name = client.value("select current_database()")
    change = "alter database {} set default_transaction_read_only = {}"
    client.connection.execute(sql.SQL(change).format(sql.Identifier(name), sql.Literal("on" if read_only else "off")))


def away(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message.startswith("the database is away")]


async def test_a_database_that_refuses_every_claim_is_not_hammered(
    settings: MakeSettings, client: Client, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="50")) as running:
        set_read_only(client, True)
        event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
        terminate(client)
        await eventually(lambda: len(away(caplog)) >= 5)
        waits = [cast(Any, record).retry_in_s for record in away(caplog)]
        assert all(0.05 * 2**n <= wait <= 0.1 * 2**n for n, wait in enumerate(waits))
        assert running.value("database_reconnects_total") == 0
        set_read_only(client, False)
        await finished(client, [event_id])
        assert running.value("database_reconnects_total") == 1
    assert arrivals(receiver.requests) == {event_id: 1}


async def test_a_function_that_is_missing_for_a_while_does_not_end_the_dispatcher(
    settings: MakeSettings, client: Client, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="50")):
        client.rows("alter function orchestrator.claim_for_dispatch rename to claim_no_events")
        event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
        terminate(client)
        await eventually(lambda: "refuses to serve" in caplog.text)
        client.rows("alter function orchestrator.claim_no_events rename to claim_for_dispatch")
        await finished(client, [event_id])


async def test_a_database_without_the_schema_is_an_error_at_once(
    settings: MakeSettings, empty_database_url: str, gate: Gate
) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(OrchestratorError, match="run: orchestrator migrate")):
        async with dispatching(settings(DATABASE_URL=empty_database_url), gate):
            pass


async def test_notifications_that_are_no_times_do_no_harm(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    async with dispatching(settings()) as running:
        for payload in ("", "soon", "nan", "-inf", "inf", "1e999", "\U0001f514", "x" * 7000):
            client.rows("select pg_notify('orchestrator_due', %s)", payload)
        event_id = client.schedule(scheduled_at=soon(0), destination=receiver.url())
        await finished(client, [event_id])
        assert not running.task.done()


async def test_listening_is_taken_up_again_when_its_connection_is_lost(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_BACKOFF_S", 0.1)
    listeners = "select pid from pg_stat_activity where application_name = 'orchestrator listen' and query ~ '^listen '"
    async with dispatching(settings(SCHEDULER_POLL_INTERVAL_MS="10000")):
        await eventually(lambda: client.column(listeners))
        (first,) = client.column(listeners)
        client.rows("select pg_terminate_backend(%s)", first)
        await eventually(lambda: set(client.column(listeners)) - {first})
        client.schedule(scheduled_at=soon(0), destination=receiver.url())
        await receiver.wait_for(1, timeout_s=5)


async def test_an_event_that_cannot_be_sent_dies_alone(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    """The API refuses such headers, but an owner of the tables can write what he likes."""
    good = client.schedule_many(20, scheduled_at=soon(1), destination=receiver.url(), headers={"a": "b"})
    bad = client.schedule_many(2, scheduled_at=soon(1), destination=receiver.url())
    client.rows("""update orchestrator.event set headers = '{"a": 1}' where id = %s""", bad[0])
    client.rows("""update orchestrator.event set headers = '{"a": "\\ud800"}' where id = %s""", bad[1])
    async with dispatching(settings()):
        await finished(client, [*good, *bad])
    assert statuses(client, good) == {"delivered": 20}
    assert statuses(client, bad) == {"dead": 2}
    assert all("headers" in outcomes(client, event_id)[0]["error"] for event_id in bad)


async def test_a_sender_that_fails_costs_one_attempt_and_not_the_dispatcher(
    settings: MakeSettings, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        async def send(self, delivery: Delivery) -> Attempted:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("a fault in the program")
            return Attempted(DELIVERED, 204)

    client.rows("update orchestrator.retry_policy set initial_delay = '1 ms'")
    event_id = client.schedule(scheduled_at=soon(0))
    async with dispatching(settings(), Broken()):
        await finished(client, [event_id])
    assert client.outcomes(event_id) == [(1, "retried"), (2, "delivered")]
    assert outcomes(client, event_id)[0]["error"] == "internal error: RuntimeError"
    (line,) = [record for record in caplog.records if "unexpectedly" in record.message]
    assert cast(Any, line).event_id == event_id


async def test_a_lease_too_short_for_an_attempt_is_handed_back_and_claimed_again(
    settings: MakeSettings, client: Client, gate: Gate
) -> None:
    """What waits in memory behind slow receivers is not begun when another might begin it before its end."""
    allowed = settings(HTTP_TIMEOUT_SECONDS="0.1", SCHEDULER_LOOKAHEAD_MS="0", HTTP_MAX_CONNECTIONS="1")
    ids = client.schedule_many(3, scheduled_at=soon(0))
    async with dispatching(replace(allowed, lease_s=2.0), gate) as running:
        await eventually(lambda: gate.running == 1 and running.value("events_held") == 2)
        left = "select extract(epoch from min(lease_until) - clock_timestamp())::float8 from orchestrator.timer"
        await eventually(lambda: client.value(left) < 0.6)  # half a second too late, whatever its clock lags
        gate.open()
        await finished(client, ids)
        assert running.value("events_released_total") == 2
    assert sorted(gate.sent) == sorted(ids)
    assert statuses(client, ids) == {"delivered": 3}


async def test_results_that_waited_for_the_database_are_recorded_before_the_next_claim(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, gate: Gate
) -> None:
    """Their leases may have run out, and a claim would take them and have them delivered twice."""
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        ids = client.schedule_many(20, scheduled_at=soon(0))
    ours = settings(DATABASE_URL=url, SCHEDULER_POLL_INTERVAL_MS="50")
    async with dispatching(ours, gate) as running:
        await eventually(lambda: gate.running == 20)
        await asyncio.to_thread(postgres_server.kill)
        gate.open()
        await eventually(lambda: len(gate.sent) == 20)
        await asyncio.to_thread(end_all_leases, postgres_server)
        with Client(url) as client:
            await finished(client, ids)
            await eventually(lambda: running.value("database_reconnects_total") == 1)
            assert statuses(client, ids) == {"delivered": 20}
            assert client.value("select max(attempt) from orchestrator.outcomes") == 1
    assert sorted(gate.sent) == sorted(ids)


def end_all_leases(server: EmbeddedPostgres) -> None:
    """Starts the server; to those who connect, leases have run out already, as after an hour's outage."""
    server.start()
    with Client(server.url("orchestrator")) as client:
        client.rows(
            "update orchestrator.timer set lease_until = now() - interval '1 hour' where lease_until is not null"
        )


async def test_an_idle_dispatcher_sends_one_statement_a_poll_and_hardly_uses_the_processor(
    spawn: Spawn, postgres_server: EmbeddedPostgres
) -> None:
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        client.rows("alter system set log_statement = 'all'")
        client.rows("alter system set log_line_prefix = '%a|'")
        client.rows("select pg_reload_conf()")
        process = spawn("dispatch", DATABASE_URL=url)

        def statements() -> list[str]:
            log = postgres_server.log_file.read_text(errors="replace")
            return [part for part in log.split("orchestrator dispatch|LOG:  ")[1:] if "statement" in part[:10]]

        def looks() -> int:
            return sum("next_lease_end" in statement for statement in statements())

        await eventually(looks, 20)  # the start is over
        before, cpu_before_s, began_s = len(statements()), cpu_s(process.pid), time.monotonic()
        await eventually(lambda: looks() == 2, 20)
        lasted_s = time.monotonic() - began_s
        assert len(statements()) == before + 1
        assert lasted_s > 9
        assert (cpu_s(process.pid) - cpu_before_s) / lasted_s < 0.03


def cpu_s(pid: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
