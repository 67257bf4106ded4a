"""Ingesters, databases and brokers that are killed, paused and cut off. Afterwards every record is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import LiteralString

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import KafkaError

from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.ingest import consumers
from orchestrator.metrics import Metrics
from tests.conftest import MakeSettings, Spawn
from tests.support.brokers import KafkaBroker
from tests.support.cutting_proxy import CuttingProxy
from tests.support.ingesting import (
    Ingesting,
    LastCutProxy,
    Topic,
    admin,
    assert_exact,
    feed,
    feed_unreadable,
    ingesting,
    jobs,
    positions,
    producing,
    read_to,
    submission,
    value,
    waits_for_lock,
)
from tests.support.sql_client import Client
from tests.support.waiting import eventually


@pytest.fixture
def other(database_url: str) -> Iterator[Client]:
    """One more, to hold locks with."""
    with Client(database_url) as client:
        yield client


@asynccontextmanager
async def flowing(topic: Topic, first: int = 0) -> AsyncIterator[list[tuple[int, int]]]:
    """Submissions flow, some hundreds a second, numbered from `first`, until the block ends; their places."""
    places: list[tuple[int, int]] = []
    enough = asyncio.Event()

    async def flow() -> None:
        async with producing(topic) as producer:
            while not enough.is_set():
                numbers = range(first + len(places), first + len(places) + 20)
                sent = [await producer.send(topic.name, submission(n), partition=n % 4) for n in numbers]
                places.extend((each.partition, each.offset) for each in await asyncio.gather(*sent))
                await asyncio.sleep(0.03)

    task = asyncio.create_task(flow())
    try:
        yield places
    finally:
        enough.set()
        await task


async def all_read(client: Client, topic: Topic, places: list[tuple[int, int]], timeout_s: float = 30.0) -> None:
    """Waits until everything is read; each record is there, once."""
    await read_to(client, topic.name, places, timeout_s)
    assert_exact(client, accepted=len(places))
    assert jobs(client) == {f"job-{n}" for n in range(len(places))}


async def test_an_ingester_killed_between_copy_and_commit_keeps_no_event_and_the_next_keeps_all(
    spawn: Spawn, client: Client, other: Client, topic: Topic
) -> None:
    places = await feed(topic, [submission(n) for n in range(1000)])
    with other.transaction():
        other.rows("lock table orchestrator.timer in share mode")  # holds submit_staged() up, after the COPY
        process = spawn("ingest", **topic.environ)
        await waits_for_lock(client)
        await process.kill()
    assert client.value("select count(*) from orchestrator.ingest_offset") == 0
    assert_exact(client, accepted=0)
    spawn("ingest", **topic.environ)
    await all_read(client, topic, places)


async def test_an_ingester_killed_between_commit_and_mirror_keeps_all_events_and_the_next_repeats_none(
    spawn: Spawn, client: Client, topic: Topic, database_url: str
) -> None:
    async with LastCutProxy(database_url) as proxy:
        process = spawn("ingest", DATABASE_URL=proxy.url, **topic.environ)
        await process.wait_for_log(f" of {topic.name}")
        proxy.cut_after("COMMIT")
        places = await feed(topic, [submission(n) for n in range(100)], partition=0)
        await eventually(lambda: proxy.cuts == 1)
        await process.kill()
    assert positions(client, topic.name)[0] > 0
    assert await topic.committed() == {}
    process = spawn("ingest", **topic.environ)
    await process.wait_for_log(f" of {topic.name}")
    await all_read(client, topic, places + await feed(topic, [submission(n) for n in range(100, 200)], partition=0))
    assert await process.stop() == 0


async def test_a_commit_whose_reply_is_lost_is_not_repeated(
    settings: MakeSettings, client: Client, topic: Topic, database_url: str
) -> None:
    async with CuttingProxy(database_url) as proxy:
        settings_through_proxy = settings(DATABASE_URL=proxy.url, **topic.environ)
        async with ingesting(settings_through_proxy) as running, flowing(topic) as places:
            for _ in range(5):
                await read_to(client, topic.name, list(places))
                cuts = proxy.cuts
                proxy.cut_after("COMMIT")
                await eventually(lambda: proxy.cuts > cuts)  # noqa: B023
        async with ingesting(settings_through_proxy):
            await all_read(client, topic, places)
        assert running.value("database_reconnects_total") >= 5
        assert running.value("ingest_conflicts_total") == 0


async def test_an_ingester_that_slept_through_its_session_does_no_harm(
    spawn: Spawn, client: Client, topic: Topic
) -> None:
    sleeper = spawn("ingest", **topic.environ)
    async with flowing(topic) as places:
        await eventually(lambda: len(jobs(client)) > 100, 20)
        sleeper.pause()
        stood_at = len(places)
        other = spawn("ingest", **topic.environ)
        await eventually(lambda: len(places) > stood_at + 200, 20)
        await read_to(client, topic.name, places[: stood_at + 200])
        sleeper.resume()
        woke_at = len(places)
        await eventually(lambda: len(places) > woke_at + 400, 20)
    await all_read(client, topic, places)
    assert await sleeper.stop() == 0
    assert await other.stop() == 0
    await all_read(client, topic, places)


async def test_an_ingester_paused_within_its_transaction_loses_the_partitions_and_keeps_nothing_twice(
    spawn: Spawn, client: Client, other: Client, topic: Topic
) -> None:
    places = await feed(topic, [submission(n) for n in range(500)])
    with other.transaction():
        other.rows("lock table orchestrator.timer in share mode")
        sleeper = spawn("ingest", **topic.environ)
        await waits_for_lock(client)
        sleeper.pause()
        awake = spawn("ingest", **topic.environ)
        await awake.wait_for_log(f" of {topic.name}", 20)
    await all_read(client, topic, places)
    sleeper.resume()
    more = await feed(topic, [submission(n) for n in range(500, 1000)])
    await all_read(client, topic, places + more)
    assert await sleeper.stop() == 0
    assert await awake.stop() == 0


async def test_an_ingester_suspended_within_a_copy_gives_way_to_its_successor(
    spawn: Spawn, database_url: str, client: Client, topic: Topic
) -> None:
    """Its session is not idle: PostgreSQL awaits the rows."""
    copying: LiteralString = """
    select pid from pg_stat_activity
    where datname = current_database() and wait_event = 'ClientRead' and state = 'active' and query ilike 'copy%'
    """
    async with CuttingProxy(database_url) as proxy:
        sleeper = spawn("ingest", **topic.environ, DATABASE_URL=proxy.url)
        await sleeper.wait_for_log(f" of {topic.name}", 20)
        proxy.hang_at("the-last-row")
        last = submission(100, external_job_id="the-last-row")
        places = await feed(topic, [*(submission(n) for n in range(100)), last])
        await eventually(lambda: client.rows(copying), 20)
        sleeper.pause()
        awake = spawn("ingest", **topic.environ)
        await read_to(client, topic.name, places, 45)
        await awake.wait_for_log("ended sessions of ingesters")
        assert await awake.stop() == 0
        await sleeper.kill()
    assert len(jobs(client)) == 101


async def test_a_database_that_is_killed_again_and_again_loses_nothing(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, topic: Topic
) -> None:
    url = postgres_server.url("orchestrator")
    async with ingesting(settings(DATABASE_URL=url, **topic.environ)) as running:
        async with flowing(topic) as places:
            for _ in range(3):
                kept, back = running.value("events_received_total"), running.value("database_reconnects_total")
                await eventually(lambda: running.value("events_received_total") > kept + 100, 30)  # noqa: B023
                await asyncio.to_thread(postgres_server.kill)
                await asyncio.to_thread(postgres_server.start)
                await eventually(lambda: running.value("database_reconnects_total") > back, 20)  # noqa: B023
        with Client(url) as client:
            await all_read(client, topic, places)


async def test_a_broker_that_is_killed_loses_nothing(
    settings: MakeSettings, client: Client, kafka_broker: KafkaBroker
) -> None:
    if not kafka_broker.keeps_data:
        pytest.skip("this broker forgets everything when it ends")
    topic = await Topic.new(kafka_broker)
    async with ingesting(settings(**topic.environ)) as running:
        async with flowing(topic) as places:
            await eventually(lambda: len(jobs(client)) > 100, 20)
        await asyncio.to_thread(kafka_broker.kill)
        await asyncio.to_thread(kafka_broker.start)
        more = await feed(topic, [submission(n) for n in range(len(places), len(places) + 500)])
        await all_read(client, topic, places + more, 60)
        assert running.value("ingest_halted_partitions") == 0


async def test_ingesters_that_come_and_go_share_the_partitions_and_read_everything_once(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    # Never more consumers than the four partitions, or one of them has nothing to do.
    ours, twice = settings(**topic.environ), settings(KAFKA_CONSUMER_CONCURRENCY="2", **topic.environ)
    async with flowing(topic) as places, ingesting(twice) as first:
        await eventually(lambda: len(jobs(client)) > 100, 20)
        async with ingesting(ours) as second:
            await eventually(lambda: second.value("events_received_total") > 100, 20)
            async with ingesting(ours) as third:
                await eventually(lambda: third.value("events_received_total") > 50, 20)
            reached = first.value("events_received_total")
            await eventually(lambda: first.value("events_received_total") > reached + 100, 20)
        async with ingesting(ours) as fourth:
            await eventually(lambda: fourth.value("events_received_total") > 100, 20)
    async with ingesting(twice):
        await all_read(client, topic, places)


async def halted(running: Ingesting, client: Client, caplog: pytest.LogCaptureFixture, count: int, text: str) -> None:
    """Waits until so many partitions are halted, and the log says why and what to do; nothing else is read there."""
    await eventually(lambda: running.value("ingest_halted_partitions") == count, 20)
    told = [record.getMessage() for record in caplog.records if "is halted at offset" in record.getMessage()]
    assert len(told) == count, told
    assert all(text in each and "select orchestrator.set_ingest_offset('" in each for each in told), told


async def test_a_recreated_topic_with_lower_offsets_halts_until_the_operator_sets_the_offset(
    settings: MakeSettings, client: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    if topic.kafka.makes_topics:
        pytest.skip("this broker makes a topic anew as soon as it is asked for")
    ours = settings(**topic.environ)
    async with ingesting(ours):
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(400)]))
    await topic.delete()
    await topic.create()
    await feed(topic, [submission(n) for n in range(400, 440)])
    async with ingesting(ours) as running:
        await halted(running, client, caplog, 4, "the log ends at offset 10")
        assert positions(client, topic.name) == dict.fromkeys(range(4), 100)
        client.rows("select orchestrator.set_ingest_offset(%s, 2, 0)", topic.name)
        await eventually(lambda: running.value("ingest_halted_partitions") == 3, 20)
        await read_to(client, topic.name, [(2, 9)])
        more = await feed(topic, [submission(n) for n in range(440, 460)], partition=2)  # the others go on
        await read_to(client, topic.name, more)
        for partition in (0, 1, 3):
            client.rows("select orchestrator.set_ingest_offset(%s, %s, 5)", topic.name, partition)
        await eventually(lambda: running.value("ingest_halted_partitions") == 0, 20)
        await eventually(lambda: positions(client, topic.name) == {0: 10, 1: 10, 2: 30, 3: 10})
    assert_exact(client, accepted=400 + 10 + 20 + 15)


async def test_a_topic_recreated_while_it_is_read_halts(
    settings: MakeSettings, client: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    if topic.kafka.makes_topics:
        pytest.skip("this broker makes a topic anew as soon as it is asked for")
    async with ingesting(settings(**topic.environ)) as running:
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(400)]))
        await topic.delete()
        await topic.create()
        await feed(topic, [submission(n) for n in range(400, 440)])
        await halted(running, client, caplog, 4, "the topic was recreated or truncated")
    assert_exact(client, accepted=400)


async def test_a_topic_recreated_and_filled_beyond_the_old_offsets_halts_by_its_anchor(
    settings: MakeSettings, client: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    if topic.kafka.makes_topics:
        pytest.skip("this broker makes a topic anew as soon as it is asked for")
    ours = settings(**topic.environ)
    async with ingesting(ours):
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(400)]))
    await topic.delete()
    await topic.create()
    await feed(topic, [submission(n) for n in range(400, 1400)])
    async with ingesting(ours) as running:
        await halted(running, client, caplog, 4, "the record at offset 99 is not the one that was read")
        assert_exact(client, accepted=400)
        for partition in range(4):
            client.rows("select orchestrator.set_ingest_offset(%s, %s, 0)", topic.name, partition)
        await eventually(lambda: positions(client, topic.name) == dict.fromkeys(range(4), 250), 20)
        await eventually(lambda: running.value("ingest_halted_partitions") == 0)
    assert_exact(client, accepted=1400)


async def test_a_topic_recreated_and_filled_while_no_ingester_ran_halts_by_its_anchor(
    spawn: Spawn, client: Client, topic: Topic
) -> None:
    if topic.kafka.makes_topics:
        pytest.skip("this broker makes a topic anew as soon as it is asked for")
    process = spawn("ingest", **topic.environ | {"KAFKA_SESSION_TIMEOUT_MS": "60000"})
    await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(400)]))
    process.pause()
    paused_s = time.monotonic()
    await topic.delete()
    await topic.create()
    await feed(topic, [submission(n) for n in range(400, 1400)])
    await eventually(lambda: time.monotonic() > paused_s + 6.0)  # five seconds are a long time to see no answer
    process.resume()
    await eventually(lambda: process.log().count("the record at offset 99 is not the one that was read") == 4, 20)
    assert_exact(client, accepted=400)
    assert positions(client, topic.name) == dict.fromkeys(range(4), 100)


async def test_records_that_no_consumer_can_read_halt_their_partition_behind_all_that_can_be_read(
    settings: MakeSettings, client: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    before = await feed(topic, [submission(n) for n in range(30)], partition=0)
    unreadable = await feed_unreadable(topic, 0)
    after = await feed(topic, [submission(n) for n in range(30, 60)], partition=0)
    others = await feed(topic, [submission(n) for n in range(60, 90)], partition=1)
    async with ingesting(settings(**topic.environ)) as running:
        await halted(running, client, caplog, 1, f"is halted at offset {unreadable}: its records cannot be read")
        await read_to(client, topic.name, before + others)
        client.rows("select orchestrator.set_ingest_offset(%s, 0, %s)", topic.name, unreadable + 1)
        await read_to(client, topic.name, after)
    assert_exact(client, accepted=90)


async def test_records_deleted_before_they_were_read_halt_their_partition(
    settings: MakeSettings, client: Client, topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    ours = settings(**topic.environ)
    async with ingesting(ours):
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(400)]))
    rest = await feed(topic, [submission(n) for n in range(400, 800)])
    async with admin(topic.kafka) as operator:
        try:
            await operator.delete_records({TopicPartition(topic.name, 1): RecordsToDelete(before_offset=150)})
        except KafkaError:
            pytest.skip("this broker cannot delete records")
    async with ingesting(ours) as running:
        await halted(running, client, caplog, 1, "records were deleted before they were read")
        await read_to(client, topic.name, [place for place in rest if place[0] != 1])
        assert positions(client, topic.name)[1] == 100
        client.rows("select orchestrator.set_ingest_offset(%s, 1, 150)", topic.name)
        await read_to(client, topic.name, rest)
    assert_exact(client, accepted=800 - 50)


async def test_a_consumer_that_stalls_silently_is_rebuilt(settings: MakeSettings, client: Client, topic: Topic) -> None:
    ours = settings(**topic.environ)
    metrics = Metrics(ours)
    [submissions, _] = consumers(ours, metrics, stall_s=1.0)
    running = asyncio.create_task(submissions.run())
    try:
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(100)]))
        [fetching] = [task for task in asyncio.all_tasks() if "_fetch_requests_routine" in repr(task.get_coro())]
        fetching.cancel()  # as when it dies of an error that nobody sees
        # What was being fetched then may still arrive.
        await feed(topic, [submission(n) for n in range(100, 200)])
        await eventually(lambda: value(metrics, "ingest_rebuilds_total") == 1, 20)
        await read_to(client, topic.name, await feed(topic, [submission(n) for n in range(200, 300)]))
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert_exact(client, accepted=300)


async def test_an_ingester_stops_in_time_while_database_and_broker_are_away(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, kafka_broker: KafkaBroker
) -> None:
    url = postgres_server.url("orchestrator")
    topic = await Topic.new(kafka_broker)
    ours = settings(DATABASE_URL=url, **topic.environ)
    async with ingesting(ours):
        with Client(url) as client:
            await read_to(client, topic.name, await feed(topic, [submission(1)]))
        await asyncio.to_thread(postgres_server.kill)
        await feed(topic, [submission(2)])
        await asyncio.to_thread(kafka_broker.kill)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 15
