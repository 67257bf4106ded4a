"""Processes at work while somebody has left a transaction open."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from orchestrator.api.intake import gather
from orchestrator.database import Database
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, running_api, submission
from tests.integration.cli_support import Call
from tests.support.dispatching import dispatching, finished, soon, statuses
from tests.support.ingesting import DUE, Topic, feed, ingesting, jobs, read_to
from tests.support.ingesting import submission as record
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client, event, wait_for
from tests.support.waiting import eventually

_CANCEL_WAITS = """
select count(*) > 0 from pg_stat_activity
where datname = current_database() and application_name = 'orchestrator api' and wait_event_type = 'Lock'"""


@pytest.fixture
def holder(database_url: str) -> Iterator[Client]:
    """A session in a transaction that stays open."""
    with Client(database_url) as holder:
        holder.rows("set application_name = 'left open'")
        holder.rows("begin")
        yield holder


async def named(caplog: pytest.LogCaptureFixture, holder: Client) -> None:
    """Waits until the log names the session."""
    name = f"pid {holder.pid} (left open, "
    await eventually(lambda: any(name in str(vars(each)) for each in caplog.records))


async def test_a_cancel_left_open_holds_up_the_result_of_its_event_alone(
    settings: MakeSettings, receiver: Receiver, client: Client, holder: Client, caplog: pytest.LogCaptureFixture
) -> None:
    held = client.schedule(destination=receiver.script("/held", Answer(delay_s=0.4)), scheduled_at=soon(0))
    async with dispatching(settings()) as running:
        await receiver.wait_for(1, "/held")
        assert holder.cancel(held)[0].result == "in_flight"
        for _ in range(3):
            others = client.schedule_many(20, destination=receiver.url("/other"), scheduled_at=soon(0))
            await finished(client, others, timeout_s=5)
        await eventually(lambda: running.value("results_set_aside") == 1)
        assert client.status(held) == "in_flight"
        await named(caplog, holder)
        holder.rows("commit")
        await finished(client, [held], timeout_s=5)
        assert running.value("results_set_aside") == 0
        assert running.value("events_stale_total") == 0
    assert statuses(client, [held]) == {"delivered": 1}
    assert len(receiver.received("/held")) == 1


@pytest.mark.parametrize("statement", ["pause_destination", "configure_destination", "delete_destination"])
async def test_an_operator_who_leaves_a_transaction_open_holds_up_no_result(
    settings: MakeSettings, receiver: Receiver, client: Client, holder: Client, statement: str
) -> None:
    name = f"127.0.0.1:{receiver.port}"
    client.rows("select orchestrator.configure_destination(%s, p_max_parallel => 50)", name)
    async with dispatching(settings()) as running:
        failing = receiver.script("/fails", Answer(500, delay_s=0.4))
        ids = client.schedule_many(3, destination=failing, scheduled_at=soon(0), max_retries=0)
        await receiver.wait_for(3, "/fails")
        holder.connection.execute(f"select orchestrator.{statement}('{name}')".encode())
        await finished(client, ids, timeout_s=5)
        await eventually(lambda: running.value("events_dead_total") == 3)


async def test_a_locked_ordering_key_is_not_asked_for_again_and_again(
    settings: MakeSettings, receiver: Receiver, client: Client, holder: Client, caplog: pytest.LogCaptureFixture
) -> None:
    ids = client.schedule_many(2, destination=receiver.url("/"), scheduled_at=soon(1), ordering_key="k")
    holder.rows(
        """select pg_advisory_xact_lock(hashtext('orchestrator.ordering')
        , orchestrator.ordering_lock_number(t.ordering))
        from orchestrator.timer t where t.event_id = %s""",
        ids[0],
    )
    async with dispatching(settings()) as running:
        await eventually(lambda: client.value("select orchestrator.next_due_at() < now() - interval '2 s'"), 10)
        assert running.value("claim_seconds_count") < 30
        await named(caplog, holder)
        holder.rows("rollback")
        await finished(client, ids, timeout_s=8)


async def test_a_submission_left_open_holds_up_its_repetition_alone(
    settings: MakeSettings,
    client: Client,
    holder: Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "BLOCKED_S", 1.0)
    fields = submission(external_job_id="held")
    holder.submit(event(**fields))
    chosen = settings()
    async with Database(chosen, role="api") as database, running_api(chosen, database) as api:

        async def post(**changes: str) -> httpx.Response:
            return await api.post("/api/v1/events", json={**fields, **changes})

        posts = [asyncio.create_task(post(external_job_id="held" if n == 5 else f"job-{n}")) for n in range(53)]
        await eventually(lambda: client.value("select count(*) from orchestrator.event") == 52, 5)
        repeated = await posts.pop(5)
        assert_problem(repeated, 503, "unavailable")
        assert repeated.headers["retry-after"] == "5"
        assert "Nothing was kept" in repeated.json()["detail"]
        assert Counter(each.status_code for each in await asyncio.gather(*posts)) == {201: 52}
        await named(caplog, holder)
        # A batch, too; and who asks when the other session has ended gets the answer.
        batch = {"events": [fields, submission(external_job_id="in a batch")]}
        answer = await api.post("/api/v1/events/batch", json=batch)
        assert_problem(answer, 503, "unavailable")
        assert "1 of 2 were kept" in answer.json()["detail"]
        waiting = asyncio.create_task(post())
        metrics = api.get("/metrics")
        assert "orchestrator_lock_holders{" in (await metrics).text
        holder.rows("commit")
        assert (await waiting).status_code == 200
        assert (await waiting).json()["duplicate"] is True


async def test_a_blocked_operation_answers_503_in_time_and_logs_the_holder(
    settings: MakeSettings, client: Client, holder: Client, caplog: pytest.LogCaptureFixture
) -> None:
    event_id = client.schedule(scheduled_at=soon(3600))
    holder.cancel(event_id)
    chosen = settings(DB_POOL_MAX_SIZE="4", DB_POOL_MIN_IDLE="1")
    async with Database(chosen, role="api") as database, running_api(chosen, database) as api:
        cancels = [asyncio.create_task(api.delete(f"/api/v1/events/{event_id}")) for _ in range(4)]
        await eventually(lambda: client.value(_CANCEL_WAITS), 5)
        # However many they are, others get their connection.
        assert (await api.post("/api/v1/events", json=submission(), timeout=2)).status_code == 201
        assert (await api.get("/ready", timeout=2)).status_code == 200
        assert (await api.post("/api/v1/pause", timeout=2)).status_code == 200
        for answer in await asyncio.gather(*cancels):
            assert_problem(answer, 503, "unavailable")
    await named(caplog, holder)


@pytest.mark.parametrize("command", [["pause"], ["resume"], ["destinations", "pause", "held.example"]])
def test_pause_and_resume_wait_for_no_session(call: Call, holder: Client, command: list[str]) -> None:
    holder.schedule(priority=7)
    holder.rows("select orchestrator.configure_destination('held.example', p_rate_per_second => 5)")
    holder.rows("select orchestrator.pause_all()")
    holder.rows("set statement_timeout = '20 s'")
    result = call(*command)
    assert result.exit_code == 0, result.output


async def test_a_record_whose_id_is_uncommitted_elsewhere_does_not_stop_its_partition(
    settings: MakeSettings, client: Client, holder: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    fields = event(external_job_id="job-3", scheduled_at=DUE)
    [answer] = holder.submit(fields)
    async with ingesting(settings(**topic.environ)) as running:
        places = await feed(topic, [record(n) for n in range(20)])
        await read_to(client, topic.name, places)
        assert jobs(client) == {f"job-{n}" for n in range(20)} - {"job-3"}
        assert client.rows("select id::text from orchestrator.submission_aside") == [(answer.id,)]
        await eventually(lambda: running.value("submissions_set_aside_total") == 1)
        await named(caplog, holder)
        holder.rows("rollback")
        await eventually(lambda: "job-3" in jobs(client))
        assert client.value("select count(*) from orchestrator.submission_aside") == 0
    assert client.totals()["accepted"] == 20


def test_a_line_of_a_file_whose_id_is_locked_is_named_and_the_others_are_kept(
    call: Call, client: Client, holder: Client
) -> None:
    fields = submission(external_job_id="held")
    holder.submit(event(**fields))
    lines = "\n".join(json.dumps({**fields, "external_job_id": name}) for name in ("before", "held", "after"))
    result = call("submit", "-", typed=lines)
    assert (result.exit_code, result.stdout) == (1, "accepted 2, duplicates 0, rejected 1\n")
    assert "line 2: id: another session holds it" in result.stderr
    assert "it may be submitted again" in result.stderr
    holder.rows("rollback")
    again = call("submit", "-", typed=lines)
    assert (again.exit_code, again.stdout) == (0, "accepted 1, duplicates 2, rejected 0\n")
    assert client.value("select count(*) from orchestrator.event") == 3


async def test_doctor_names_the_session_that_left_a_transaction_open(
    call: Call, client: Client, holder: Client
) -> None:
    holder.cancel(client.schedule(scheduled_at=soon(3600)))
    await eventually(lambda: client.rows("select * from orchestrator.lock_holders()"))
    found = call("doctor", "--json").output
    assert f"pid {holder.pid} (left open, user " in found
    assert f"select pg_terminate_backend({holder.pid})" in found


def test_doctor_and_a_cancel_name_a_transaction_that_was_prepared(call: Call, client: Client, holder: Client) -> None:
    if client.value("show max_prepared_transactions") == "0":
        pytest.skip("the server allows no prepared transactions")
    event_id = client.schedule(scheduled_at=soon(3600))
    holder.cancel(event_id)
    holder.rows("prepare transaction 'left behind'")
    try:
        wait_for(lambda: client.rows("select * from orchestrator.lock_holders()") != [])
        assert "end it there, or: rollback prepared 'left behind'" in call("doctor", "--json").output
        assert "prepared transaction 'left behind' (user " in call("cancel", event_id).output
    finally:
        client.rows("rollback prepared 'left behind'")


async def test_a_command_for_a_locked_event_is_answered_and_other_commands_are_carried_out(
    settings: MakeSettings, client: Client, holder: Client, topic: Topic
) -> None:
    held, other = client.schedule_many(2, scheduled_at=soon(3600))
    holder.cancel(held)
    commands = [json.dumps({"command": "cancel", "event_id": each}).encode() for each in (held, other)]
    async with ingesting(settings(**topic.environ)):
        places = await feed(Topic(topic.kafka, topic.commands, ""), commands, partition=0)
        await read_to(client, topic.commands, places)
    answers = client.column("select value from orchestrator.outbox where kind = 'answer' order by message")
    done, refused = (json.loads(answer) for answer in answers)
    assert done["results"] == [{"event_id": other, "result": "cancelled", "status": "cancelled"}]
    assert refused["event_id"] == held
    assert "another session holds the event" in refused["problem"]["reason"]
