"""The outbox published to a real broker: nothing is lost, and what is told of one event stays in order."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator import outbox as module
from orchestrator.metrics import Metrics
from orchestrator.outbox import publish
from orchestrator.settings import Settings
from tests.conftest import MakeSettings, Spawn
from tests.support.brokers import Kafka, KafkaBroker
from tests.support.dispatching import dispatching, finished, soon
from tests.support.sql_client import Client
from tests.support.topics import arrived, headers, records
from tests.support.waiting import eventually

KINDS = ("scheduled", "timestamp", "dlq", "answers")
NOWHERE = "127.0.0.1:9"
LISTENER = "query = 'listen orchestrator_outbox'"


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as client:
        yield client


@asynccontextmanager
async def publishing(settings: Settings) -> AsyncIterator[Metrics]:
    metrics, stop = Metrics(settings), asyncio.Event()
    task = asyncio.create_task(publish(settings, metrics, stop))
    try:
        yield metrics
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await task


async def topics(kafka: Kafka, partitions: int = 3) -> dict[str, str]:
    """Settings with topics of this test's own, which exist."""
    names = {f"KAFKA_TOPIC_{kind.upper()}": kafka.unique(kind) for kind in KINDS}
    for name in names.values():
        await kafka.create_topic(name, partitions)
    return {**kafka.environ, **names, "OUTBOX_PUBLISH_INTERVAL": "300"}


async def at_rest(client: Client) -> None:
    """Returns when a publisher listens, and has had nothing to do for a second."""
    await eventually(
        lambda: client.value(
            f"""
            select count(*) filter (where {LISTENER}) = 1
              and bool_and(state_change < clock_timestamp() - interval '1 s')
            from pg_stat_activity
            where datname = current_database() and application_name in ('orchestrator listen', 'orchestrator outbox')"""
        )
    )


def write(client: Client, kind: str, count: int, keys: int = 20) -> None:
    """Puts messages into the outbox whose values are their numbers, each key's in rising order."""
    client.rows(
        """
        insert into orchestrator.outbox (created_at, kind, headers, key, value)
        select clock_timestamp(), %s, '{"orchestrator-kind": "test"}', convert_to('key-' || g %% %s, 'UTF8')
        , convert_to(g::text, 'UTF8')
        from generate_series(1, %s) g order by g""",
        kind,
        keys,
        count,
    )
    client.rows("select orchestrator.tell_outbox()")


def write_one(client: Client, kind: str, value: bytes) -> None:
    client.rows(
        "insert into orchestrator.outbox (created_at, kind, key, value) values (clock_timestamp(), %s, '1', %s)",
        kind,
        value,
    )


async def drained(client: Client, timeout_s: float = 20.0) -> None:
    await eventually(lambda: client.value("select orchestrator.outbox_pending()") == 0, timeout_s)


def retried_in_vain(client: Client) -> int:
    """Messages that wait or are set aside; these are tried again."""
    client.rows("select orchestrator.retry_outbox_failures()")
    count: int = client.value("select orchestrator.outbox_pending()")
    return count


def numbers(found: list[Any]) -> dict[bytes, list[int]]:
    """The numbers that each key's records carry, in order of arrival and each where it first came."""
    told: dict[bytes, list[int]] = defaultdict(list)
    for record in found:
        if int(record.value) not in told[record.key]:
            told[record.key].append(int(record.value))
    return told


def assert_all_in_order(found: list[Any], count: int) -> None:
    told = numbers(found)
    assert sorted(n for each in told.values() for n in each) == list(range(1, count + 1))
    assert all(each == sorted(each) for each in told.values())
    where = {(record.key, record.partition) for record in found}
    assert len(where) == len(told)  # each key in one partition


async def test_a_dead_event_is_told_with_its_reason(settings: MakeSettings, client: Client, kafka: Kafka) -> None:
    ours = settings(**await topics(kafka))
    async with publishing(ours), dispatching(ours):
        await eventually(lambda: client.column("select kind from orchestrator.outbox_kind") == ["dlq"])
        event_id = client.schedule(
            scheduled_at=soon(0), destination="http://10.1.2.3/", external_job_id="job-1", payload={"n": 7}
        )
        await finished(client, [event_id])
        (record,) = await arrived(kafka.servers, ours.topic_dlq, 1)
    told = json.loads(record.value)
    assert (told["id"], told["payload"], told["external_job_id"]) == (event_id, {"n": 7}, "job-1")
    assert record.key == b"job-1"
    assert headers(record) == {"orchestrator-kind": "dead", "orchestrator-reason": told["reason"]}
    assert told["reason"].startswith("address refused")


async def test_the_times_of_an_event_are_told_when_switched_on(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka), OUTBOX_TOPICS="scheduled,timestamp", KAFKA_TOPIC_READY=kafka.unique("ready"))
    await kafka.create_topic(ours.topic_ready, 1)
    async with publishing(ours), dispatching(ours):
        await eventually(lambda: client.value("select count(*) from orchestrator.outbox_kind") == 2)
        event_id = client.schedule(scheduled_at=soon(0.2), delivery_type="KAFKA", destination=None)
        await finished(client, [event_id])
        (scheduled,) = await arrived(kafka.servers, ours.topic_scheduled, 1)
        (record,) = await arrived(kafka.servers, ours.topic_timestamp, 1)
    assert json.loads(scheduled.value)["id"] == event_id
    told = json.loads(record.value)
    assert (told["id"], told["result"]) == (event_id, "delivered")
    assert told["claimed_at"] <= told["started_at"] <= told["finished_at"]
    assert told["due_at"] <= told["started_at"]


async def test_messages_are_published_once_and_in_order(settings: MakeSettings, client: Client, kafka: Kafka) -> None:
    ours = settings(**await topics(kafka, 6))
    async with publishing(ours) as metrics:
        for _ in range(3):
            write(client, "scheduled", 4000, keys=50)
        await drained(client)
        await eventually(lambda: metrics.outbox_published_total._value.get() == 12_000)
    found = await records(kafka.servers, ours.topic_scheduled)
    assert len(found) == 12_000
    per_key = defaultdict(list)
    for record in found:
        per_key[record.key].append(int(record.value))
        assert headers(record) == {"orchestrator-kind": "test"}
    expected = [n for n in range(1, 4001) if n % 50 == 7]
    assert per_key[b"key-7"] == expected * 3


async def test_the_gauge_tells_how_many_messages_wait(settings: MakeSettings, client: Client) -> None:
    ours = settings(KAFKA_BOOTSTRAP_SERVERS=NOWHERE, OUTBOX_PUBLISH_INTERVAL="100")
    write(client, "dlq", 17)
    async with publishing(ours) as metrics:
        line = (
            f'outbox_event_pending_total{{customer="{ours.customer}",deployment="{ours.deployment}",'
            f'environment="{ours.environment}"}} 17.0'
        )
        await eventually(lambda: line in metrics.exposition()[0].decode().splitlines())
    assert client.value("select orchestrator.outbox_pending()") == 17


async def test_a_notification_wakes_the_publisher_long_before_its_poll(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka) | {"OUTBOX_PUBLISH_INTERVAL": "60000"})
    async with publishing(ours):
        await at_rest(client)
        write(client, "dlq", 10)
        await drained(client, 5.0)
    assert len(await arrived(kafka.servers, ours.topic_dlq, 10)) == 10


async def test_without_a_notification_the_poll_finds_the_messages(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka) | {"OUTBOX_PUBLISH_INTERVAL": "3000"})
    async with publishing(ours):
        await at_rest(client)
        write_one(client, "dlq", b"unannounced")
        await drained(client, 5.0)
    assert [record.value for record in await arrived(kafka.servers, ours.topic_dlq, 1)] == [b"unannounced"]


async def test_a_publisher_that_listens_again_looks_at_once(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka) | {"OUTBOX_PUBLISH_INTERVAL": "60000"})
    async with publishing(ours):
        await at_rest(client)
        listeners = f"from pg_stat_activity where datname = current_database() and {LISTENER}"
        assert client.value(f"select pg_terminate_backend(pid, 5000) {listeners}")
        write(client, "dlq", 10)
        assert client.value(f"select count(*) {listeners}") == 0  # so nobody has heard of them
        await drained(client, 15.0)
    assert len(await arrived(kafka.servers, ours.topic_dlq, 10)) == 10


async def test_two_publishers_share_the_work_without_repeating_any(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka))
    async with publishing(ours), publishing(ours):
        for _ in range(10):
            write(client, "timestamp", 300)
        await drained(client)
    found = await records(kafka.servers, ours.topic_timestamp)
    assert Counter(int(record.value) for record in found) == dict.fromkeys(range(1, 301), 10)


async def test_a_second_publisher_takes_over_from_one_that_is_killed(
    spawn: Spawn, client: Client, kafka: Kafka
) -> None:
    environ = await topics(kafka)
    first, second = spawn("dispatch", **environ), spawn("dispatch", **environ)
    await eventually(lambda: client.value("select count(*) from orchestrator.worker where worker > 0") == 2, 20)
    write(client, "dlq", 20_000)
    await eventually(lambda: client.value("select count(*) from orchestrator.outbox") < 20_000, 20)
    await first.kill()
    await drained(client)
    assert_all_in_order(await records(kafka.servers, environ["KAFKA_TOPIC_DLQ"]), 20_000)
    assert await second.stop() == 0


async def test_a_publisher_that_is_lost_between_acknowledgement_and_commit_repeats_itself(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka), SHUTDOWN_TIMEOUT_SECONDS="1")
    write(client, "dlq", 100)
    with client.transaction():
        client.rows("lock table orchestrator.outbox in share mode")  # it can read, but not delete
        async with publishing(ours):
            await arrived(kafka.servers, ours.topic_dlq, 100)
            pid = await eventually(
                lambda: client.value(
                    "select pid from pg_stat_activity where application_name = 'orchestrator outbox'"
                    " and datname = current_database() and wait_event_type = 'Lock'"
                )
            )
            client.rows("select pg_terminate_backend(%s)", pid)
            await arrived(kafka.servers, ours.topic_dlq, 200)
    async with publishing(ours):
        await drained(client)
    assert_all_in_order(await records(kafka.servers, ours.topic_dlq), 100)


async def test_a_broker_killed_during_publishing_loses_and_reorders_no_message(
    settings: MakeSettings, client: Client, kafka_broker: KafkaBroker
) -> None:
    if not kafka_broker.keeps_data:
        pytest.skip("this broker forgets everything when it is killed")
    ours = settings(**await topics(kafka_broker))
    async with publishing(ours) as metrics:
        write(client, "dlq", 40_000, keys=100)
        await eventually(lambda: metrics.outbox_published_total._value.get() > 0)
        await asyncio.to_thread(kafka_broker.kill)
        await asyncio.to_thread(kafka_broker.start)
        await drained(client, 60)
    assert_all_in_order(await records(kafka_broker.servers, ours.topic_dlq), 40_000)


async def test_a_message_that_no_broker_takes_is_set_aside_with_the_reason_and_holds_up_no_others(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka, 1))
    noise = random.Random(1).randbytes(1_500_000)
    write(client, "dlq", 50)
    write_one(client, "dlq", noise)
    write(client, "dlq", 50)
    async with publishing(ours) as metrics:
        await drained(client)
        if not metrics.outbox_failed_total._value.get():
            pytest.skip("this broker takes records of any size")
    assert len(await records(kafka.servers, ours.topic_dlq)) == 100
    ((reason, value),) = client.rows("select reason, value from orchestrator.outbox_failure")
    assert "is larger than max.message.bytes allows" in reason
    assert value == noise


async def test_a_topic_that_does_not_exist_is_waited_for_a_while_and_then_set_aside(
    settings: MakeSettings, client: Client, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kafka.makes_topics:
        pytest.skip("this broker makes any topic that is asked for")
    late, never = kafka.unique("late"), kafka.unique("never")
    ours = settings(**await topics(kafka) | {"KAFKA_TOPIC_ANSWERS": late, "KAFKA_TOPIC_SCHEDULED": never})
    write(client, "answer", 10)
    write(client, "dlq", 10)
    async with publishing(ours) as metrics:
        await arrived(kafka.servers, ours.topic_dlq, 10)
        await eventually(lambda: client.value("select orchestrator.outbox_pending()") == 10)
        await kafka.create_topic(late, 1)
        await drained(client)
        assert len(await records(kafka.servers, late)) == 10
        monkeypatch.setattr(module, "_PATIENCE_S", 0.5)
        write(client, "scheduled", 10)
        await eventually(lambda: metrics.outbox_failed_total._value.get() == 10, 20)
        write(client, "dlq", 10)
        await drained(client)
        assert len(await arrived(kafka.servers, ours.topic_dlq, 20)) == 20
        await kafka.create_topic(never, 1)
        await eventually(lambda: retried_in_vain(client) == 0, pause_s=0.3)
    assert_all_in_order(await records(kafka.servers, never), 10)


async def test_a_publisher_waits_for_a_database_that_is_away(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    ours = settings(**await topics(kafka))
    async with publishing(ours):
        for n in range(3):
            write_one(client, "dlq", b"%d" % n)
            await drained(client)
            client.rows(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name in ('orchestrator outbox', 'orchestrator listen')"
                " and datname = current_database()"
            )
    assert [record.value for record in await records(kafka.servers, ours.topic_dlq)] == [b"0", b"1", b"2"]


async def test_a_publisher_stops_in_time_while_no_broker_answers(
    settings: MakeSettings, client: Client, kafka_broker: KafkaBroker
) -> None:
    ours = settings(**await topics(kafka_broker), SHUTDOWN_TIMEOUT_SECONDS="1")
    async with publishing(ours):
        write(client, "dlq", 10)
        await drained(client)
        kafka_broker.pause()
        write(client, "dlq", 10)
        await eventually(lambda: client.value("select count(*) from pg_stat_activity where state ~ 'in transaction'"))
        began_s = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began_s < 12
    assert client.value("select orchestrator.outbox_pending()") == 10
