"""Processes that are killed, paused and cut off while they work. Afterwards everything that arrived is counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dispatch.http.sender import HttpSender
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import free_port, status, submission, until
from tests.support.cutting_proxy import CuttingProxy
from tests.support.dispatching import (
    Running,
    arrivals,
    assert_laws,
    dispatching,
    finished,
    soon,
    statuses,
)
from tests.support.processes import Spawned
from tests.support.receiver import HANG, Answer, Receiver
from tests.support.sql_client import Client, event
from tests.support.waiting import eventually

# Short leases, as the settings allow them: they last 7.9 s, look-ahead included.
SHORT = {
    "HTTP_TIMEOUT_SECONDS": "0.8",
    "SCHEDULER_LOOKAHEAD_MS": "1000",
    "SCHEDULER_LEASE_SECONDS": "6.9",
    "SCHEDULER_BATCH_SIZE": "500",
    "SCHEDULER_PREFETCH": "1000",
}
AFTER_LEASES_S = 20.0


def submitted(client: Client, *events: dict[str, Any]) -> list[str]:
    """Accepts the events in one transaction."""
    answers = client.submit(*events)
    assert {answer.result for answer in answers} == {"accepted"}
    return [str(answer.id) for answer in answers]


def spread(count: int, first: datetime, seconds: float, destination: str) -> list[dict[str, Any]]:
    """Events due evenly over that time."""
    step = timedelta(seconds=seconds / count)
    return [event(scheduled_at=first + n * step, destination=destination) for n in range(count)]


async def dispatchers_listen(client: Client, count: int) -> None:
    """Waits until so many dispatchers have registered and hear notifications."""
    listening = """
        select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'orchestrator listen' and query ~ '^listen '"""
    await eventually(lambda: client.value(listening) == count, 20)
    await eventually(lambda: client.value("select count(*) from orchestrator.worker where worker > 0") >= count, 20)


async def delivered(client: Client, receiver: Receiver, ids: list[str], repeated: list[str] | None = None) -> None:
    """Waits until all are finished: delivered, having arrived once, or twice if `repeated`; and the laws hold."""
    await finished(client, ids, AFTER_LEASES_S)
    expected = dict.fromkeys(ids, 1) | dict.fromkeys(repeated or [], 2)
    assert arrivals(receiver.requests) == expected
    assert statuses(client, ids) == {"delivered": len(ids)}
    assert_laws(client, receiver.requests, ids)


async def caught_at_work(client: Client, receiver: Receiver, process: Spawned) -> tuple[list[str], list[str]]:
    """20 events whose attempts are in flight, unanswered, and 100 that the process holds until they are due."""
    await dispatchers_listen(client, 1)
    hanging = receiver.script("/hanging", HANG)
    now, later = soon(0), soon(0.9)
    ids = submitted(
        client,
        *[event(scheduled_at=now, destination=hanging) for _ in range(20)],
        *[event(scheduled_at=later, destination=receiver.url("/held")) for _ in range(100)],
    )
    await receiver.wait_for(20, "/hanging")
    assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 120
    assert process.returncode is None
    return ids[:20], ids[20:]


async def test_a_killed_database_loses_nothing_and_attempts_in_flight_are_recorded_when_it_is_back(
    spawn: Spawn, postgres_server: EmbeddedPostgres, receiver: Receiver
) -> None:
    url = postgres_server.url("orchestrator")
    slow = receiver.script("/slow", Answer(204, delay_s=0.6))
    with Client(url) as client:
        process = spawn("dispatch", DATABASE_URL=url, **SHORT)
        await dispatchers_listen(client, 1)
        ids = submitted(client, *spread(600, soon(0.5), 2.5, receiver.url("/quick")))
        in_flight = submitted(client, *[event(scheduled_at=soon(0.5), destination=slow) for _ in range(20)])
    await receiver.wait_for(20, "/slow")
    await asyncio.to_thread(postgres_server.kill)
    await process.wait_for_log("the database is away")
    await asyncio.to_thread(postgres_server.start)
    await process.wait_for_log("the database is back")
    with Client(url) as client:
        await delivered(client, receiver, ids + in_flight)
        attempts = client.column(
            "select attempt from orchestrator.outcomes where event_id = any (%s::uuid[])", in_flight
        )
        assert attempts == [1] * 20
    assert await process.stop() == 0


async def test_a_database_that_is_killed_again_and_again_loses_nothing(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, receiver: Receiver
) -> None:
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        ids = submitted(client, *spread(900, soon(0.5), 3.0, receiver.url()))
    short = replace(settings(DATABASE_URL=url, HTTP_TIMEOUT_SECONDS="0.8"), lease_s=3.0)
    async with dispatching(short):
        for seen in (100, 400, 700):
            await receiver.wait_for(seen)
            await asyncio.to_thread(postgres_server.kill)
            await asyncio.to_thread(postgres_server.start)
        with Client(url) as client:
            await delivered(client, receiver, ids)


async def test_a_killed_dispatcher_loses_no_event_and_repeats_only_attempts_in_flight(
    spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    process = spawn("dispatch", **SHORT)
    in_flight, held = await caught_at_work(client, receiver, process)
    await process.kill()
    receiver.script("/hanging", Answer(204))
    spawn("dispatch", **SHORT)
    await delivered(client, receiver, in_flight + held, repeated=in_flight)


async def test_a_dispatcher_that_slept_through_its_leases_does_no_harm(
    spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    sleeper = spawn("dispatch", **SHORT)
    in_flight, held = await caught_at_work(client, receiver, sleeper)
    sleeper.pause()
    receiver.script("/hanging", Answer(204))
    other = spawn("dispatch", **SHORT)
    await delivered(client, receiver, in_flight + held, repeated=in_flight)
    sleeper.resume()
    await eventually(lambda: sleeper.log().count("lease was lost before its result was recorded") == len(in_flight))
    assert await sleeper.stop() == 0
    assert await other.stop() == 0
    await delivered(client, receiver, in_flight + held, repeated=in_flight)
    workers = client.column("select distinct worker from orchestrator.outcomes")
    assert len(workers) == 1  # nothing that the sleeper said was recorded


async def test_two_dispatchers_share_the_work_and_deliver_nothing_twice(
    spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    processes = [spawn("dispatch", SCHEDULER_BATCH_SIZE="50", SCHEDULER_PREFETCH="100") for _ in range(2)]
    await dispatchers_listen(client, 2)
    herd = spread(1000, soon(1), 0.001, receiver.url())
    ids = submitted(client, *herd, *spread(500, soon(0), 1.5, receiver.url()))
    await delivered(client, receiver, ids)
    shares = Counter(client.column("select worker from orchestrator.outcomes"))
    assert len(shares) == 2
    assert [await process.stop() for process in processes] == [0, 0]


async def test_a_stopped_dispatcher_finishes_its_attempts_and_leaves_other_events_to_others_at_once(
    spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    slow = receiver.script("/slow", Answer(204, delay_s=0.05))
    few = {"HTTP_MAX_CONNECTIONS": "5", "SCHEDULER_BATCH_SIZE": "50", "SCHEDULER_PREFETCH": "100"}
    process = spawn("dispatch", **few)
    await dispatchers_listen(client, 1)
    ids = submitted(client, *spread(300, soon(0), 0.1, slow))
    await receiver.wait_for(40)
    began_s = time.monotonic()
    assert await process.stop() == 0
    assert time.monotonic() - began_s < 5
    assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 0
    assert client.value("select count(*) from orchestrator.outcomes") == len(receiver.requests) < 300
    spawn("dispatch")
    await delivered(client, receiver, ids)


async def test_a_finish_whose_reply_is_lost_is_repeated_and_recorded_once(
    settings: MakeSettings, database_url: str, client: Client, receiver: Receiver
) -> None:
    client.rows("update orchestrator.retry_policy set initial_delay = '1 ms'")
    gone = receiver.script("/gone", Answer(410))
    flaky = receiver.script("/flaky", Answer(500), Answer(204))
    async with CuttingProxy(database_url) as proxy, dispatching(settings(DATABASE_URL=proxy.url)) as running:
        proxy.cut_after("finish_events")
        ids = submitted(
            client,
            *spread(30, soon(0), 0.001, receiver.url()),
            event(scheduled_at=soon(0), destination=gone),
            event(scheduled_at=soon(0), destination=flaky),
        )
        await finished(client, ids)
        await eventually(lambda: running.value("database_reconnects_total") == 1)
        await eventually(lambda: running.value("events_delivered_total") == 31)
        assert proxy.cuts == 1
        assert running.value("events_stale_total") == 0
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1) | {ids[-1]: 2}
    assert statuses(client, ids) == {"delivered": 31, "dead": 1}
    assert client.outcomes(ids[-2]) == [(1, "dead")]
    assert client.outcomes(ids[-1]) == [(1, "retried"), (2, "delivered")]
    assert client.totals() == {"accepted": 32, "delivered": 31, "dead": 1, "retried": 1}
    assert_laws(client, receiver.requests, ids)


async def test_a_claim_whose_reply_is_lost_is_made_good_when_its_leases_end(
    settings: MakeSettings, database_url: str, client: Client, receiver: Receiver
) -> None:
    ids = submitted(client, *spread(30, soon(0), 0.001, receiver.url()))
    async with CuttingProxy(database_url) as proxy:
        proxy.cut_after("claim_for_dispatch")
        short = replace(settings(DATABASE_URL=proxy.url, HTTP_TIMEOUT_SECONDS="0.5"), lease_s=2.0, lookahead_s=0.0)
        async with dispatching(short):
            assert proxy.cuts == 1
            assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 30
            await delivered(client, receiver, ids)
    assert set(client.column("select attempt from orchestrator.outcomes")) == {2}


async def test_leases_that_ended_while_their_claim_waited_for_a_lock_are_not_used(
    settings: MakeSettings, database_url: str, client: Client, receiver: Receiver
) -> None:
    client.rows("select * from orchestrator.configure_destination(%s, p_max_parallel => 10)", receiver.url())
    ids = submitted(client, *spread(5, soon(0), 0.001, receiver.url()))
    short = replace(settings(HTTP_TIMEOUT_SECONDS="0.5"), lease_s=2.0, lookahead_s=0.0)
    waiting = """select count(*) from pg_stat_activity
        where datname = current_database() and application_name ~ 'dispatch' and wait_event_type = 'Lock'"""
    async with HttpSender(short) as sender:
        with Client(database_url) as holder, holder.connection.transaction():
            holder.rows("lock table orchestrator.timer in access exclusive mode")
            running = Running(short, sender)
            await eventually(lambda: client.value(waiting) >= 1)
            began = client.value("select clock_timestamp()")
            await eventually(lambda: client.value("select clock_timestamp() - %s > interval '2.2 s'", began))
        await delivered(client, receiver, ids)
        await running.stop()
    # The first lease of each was over before the dispatcher heard of it.
    assert set(client.column("select attempt from orchestrator.outcomes")) == {2}


async def test_a_slow_database_makes_deliveries_late_but_repeats_none(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    client.rows(
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.25); return null; end'"
    )
    client.rows("create trigger slow after insert on orchestrator.outcome execute function slow()")
    client.rows("create trigger slow after update on orchestrator.timer execute function slow()")
    async with dispatching(settings()):
        ids = submitted(client, *spread(400, soon(0), 0.5, receiver.url()))
        await delivered(client, receiver, ids)


async def test_a_database_that_becomes_read_only_while_delivering_loses_nothing(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres_server.url("orchestrator")
    with Client(url) as client:
        client.rows("set default_transaction_read_only = off")
        ids = submitted(client, *spread(300, soon(0.3), 1.0, receiver.url()))
        short = replace(settings(DATABASE_URL=url, HTTP_TIMEOUT_SECONDS="0.8"), lease_s=3.0)
        async with dispatching(short):
            await receiver.wait_for(50)
            set_read_only(client, "on")
            await eventually(lambda: sum("read-only" in getattr(r, "error", "") for r in caplog.records) >= 3)
            set_read_only(client, "off")
            await delivered(client, receiver, ids)


def set_read_only(client: Client, value: str) -> None:
    client.connection.execute(f"alter system set default_transaction_read_only = {value}".encode())
    client.rows("select pg_reload_conf()")


async def test_acknowledged_submissions_are_kept_and_the_others_can_be_sent_again(
    spawn: Spawn, postgres_server: EmbeddedPostgres
) -> None:
    url, port = postgres_server.url("orchestrator"), free_port()
    spawn("api", DATABASE_URL=url, SERVER_PORT=str(port))
    answers: dict[int, tuple[int, str | None]] = {}
    due = soon(86400).isoformat()
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False) as http:
        await until(lambda: ready(http), 20)

        async def submit(n: int) -> tuple[int, str | None]:
            body = submission(external_job_id=f"job-{n}", scheduled_at=due)
            answer = await http.post("/api/v1/events", json=body)
            return answer.status_code, answer.json().get("id")

        enough = asyncio.Event()

        async def submit_on(first: int) -> None:
            n = first
            while not enough.is_set():
                answers[n] = await submit(n)
                n += 8

        async with asyncio.TaskGroup() as tasks:
            for first in range(8):
                tasks.create_task(submit_on(first))
            await eventually(lambda: len(answers) >= 100)
            await asyncio.to_thread(postgres_server.kill)
            await asyncio.to_thread(postgres_server.start)
            before = len(answers)
            await eventually(lambda: len(answers) >= before + 100, 30)
            enough.set()
        assert {answer for answer, _ in answers.values()} <= {200, 201, 503}
        acknowledged = {n: event_id for n, (answer, event_id) in answers.items() if answer != 503}
        assert len(acknowledged) >= 200
        with Client(url) as client:
            kept = set(client.column("select id::text from orchestrator.event"))
            assert {event_id for event_id in acknowledged.values() if event_id not in kept} == set()
            for n in answers:
                answer, event_id = await submit(n)
                assert answer == 200 if n in acknowledged else answer in (200, 201)
                assert event_id == acknowledged.get(n, event_id)
            assert client.value("select count(*) from orchestrator.event") == len(answers)


async def ready(http: httpx.AsyncClient) -> bool:
    return await status(http, "/ready") == 200


async def test_a_cancel_that_races_the_dispatcher_is_answered_as_the_event_ends(
    spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    port = free_port()
    process = spawn("run", SERVER_PORT=str(port), SCHEDULER_LOOKAHEAD_MS="0")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
        await until(lambda: ready(http), 20)
        await dispatchers_listen(client, 1)
        due = soon(1.0)
        ids = submitted(client, *spread(120, due, 0.001, receiver.url()))
        answers: dict[str, int] = {}

        async def cancel(event_id: str, at: float) -> None:
            await asyncio.sleep(at - time.time())  # from well before the event is due to well after
            answers[event_id] = (await http.delete(f"/api/v1/events/{event_id}")).status_code

        async with asyncio.TaskGroup() as tasks:
            for n, event_id in enumerate(ids):
                tasks.create_task(cancel(event_id, due.timestamp() + (n - 60) / 300))
    assert set(answers.values()) == {200, 409}
    cancelled = [event_id for event_id in ids if answers[event_id] == 200]
    too_late = [event_id for event_id in ids if answers[event_id] == 409]
    await finished(client, ids)
    assert arrivals(receiver.requests) == dict.fromkeys(too_late, 1)
    assert statuses(client, cancelled) == {"cancelled": len(cancelled)}
    assert statuses(client, too_late) == {"delivered": len(too_late)}
    assert_laws(client, receiver.requests, ids)
    assert await process.stop() == 0
