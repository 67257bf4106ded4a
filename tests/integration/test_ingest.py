"""What becomes of the records of the submission topic, whatever is in them. Afterwards every record is counted."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.dev.kafka import MavenBroker
from orchestrator.errors import OrchestratorError
from orchestrator.events.submission import random_event_id
from tests.conftest import MakeSettings, Spawn
from tests.support.brokers import Kafka, KafkaBroker
from tests.support.databases import scratch_directory
from tests.support.ingesting import (
    DUE,
    Topic,
    assert_exact,
    feed,
    ingesting,
    jobs,
    positions,
    producing,
    read_to,
    submission,
)
from tests.support.sql_client import Client
from tests.support.waiting import eventually


def rejected(client: Client) -> dict[tuple[int, int], tuple[bytes | None, str, str]]:
    """Partition and offset → value, field and reason of each reject."""
    rows = client.rows('select partition, "offset", value, field, reason from orchestrator.reject')
    return {(partition, offset): (value, field, reason) for partition, offset, value, field, reason in rows}


async def test_every_submission_becomes_an_event_and_the_brokers_are_told(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    places = await feed(topic, [submission(n) for n in range(2000)], compression_type="lz4")

    async def told() -> Any:
        return await topic.committed() == dict.fromkeys(range(4), 500)

    async with ingesting(settings(**topic.environ)) as running:
        await read_to(client, topic.name, places)
        assert_exact(client, accepted=2000)
        assert jobs(client) == {f"job-{n}" for n in range(2000)}
        assert positions(client, topic.name) == dict.fromkeys(range(4), 500)
        await eventually(lambda: running.value("ingest_lag", topic=topic.name) == 0)
        await eventually(told, 20)
        assert running.value("events_received_total") == 2000
        assert running.value("ingest_batch_seconds_count") < 200


async def test_an_ingested_event_has_every_field_that_was_submitted(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    full = submission(
        1,
        payload={"text": "tab\t, newline\n, backslash \\, ünïcode 𝄞"},
        headers={"x-one": "1"},
        max_retries=7,
        retry_policy="default",
        delivery_type="KAFKA",
        destination="orders",
        ordering_key="customer 1",
        priority=-9,
        spread_seconds=0.00001,
    )
    async with ingesting(settings(**topic.environ)):
        await read_to(client, topic.name, await feed(topic, [full]))
    [row] = client.rows(
        """select source, external_job_id, scheduled_at, delivery_type, destination, payload, headers, max_retries
        , retry_policy, ordering_key, priority, spread from orchestrator.event"""
    )
    assert row == (
        "tests",
        "job-1",
        DUE,
        "KAFKA",
        "orders",
        {"text": "tab\t, newline\n, backslash \\, ünïcode 𝄞"},
        {"x-one": "1"},
        7,
        "default",
        "customer 1",
        -9,
        timedelta(microseconds=10),
    )


async def test_a_record_that_cannot_be_an_event_is_kept_with_its_bytes_and_the_reason(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    bad: list[tuple[bytes | None, str, str]] = [
        (None, "body", "without a value"),
        (b"", "body", "JSON"),
        (b"{", "body", "JSON"),
        (b"[1]", "body", "object"),
        (submission(1).replace(b"tests", b"t\xffsts"), "body", "UTF-8"),
        (submission(2).replace(b"tests", b"t\x00sts"), "body", "JSON"),
        (submission(3).replace(b"tests", rb"t\u0000sts"), "source", "NUL"),
        (submission(4, payload="half").replace(b"half", rb"\ud800"), "payload", "surrogate"),
        (submission(5, payload="x" * 2000), "payload", "at most 1000 bytes"),
        (submission(6, source=...), "source", "required"),
        (submission(7, unknown=1), "unknown", "unknown"),
        (submission(8, scheduled_at="soon"), "scheduled_at", "RFC 3339"),
        (submission(9, priority=12), "priority", "expected -9 to 9, got 12"),
        (submission(10, spread_seconds=0), "spread_seconds", "expected more than 0 and at most 604800 seconds, got 0"),
        # Only the database knows what is wrong with these.
        (submission(11, scheduled_at=(DUE + timedelta(days=500)).isoformat()), "scheduled_at", "400 days ahead"),
        (submission(12, retry_policy="nobody-made-it"), "retry_policy", "nobody-made-it"),
    ]
    values = [value for value, _, _ in bad]
    mixed = [value for n, each in enumerate(values) for value in (each, submission(100 + n))]
    places = await feed(topic, mixed)
    async with ingesting(settings(MAX_PAYLOAD_BYTES="1000", **topic.environ)) as running:
        await read_to(client, topic.name, places)
        await eventually(lambda: running.value("events_rejected_total") == len(bad))
    assert_exact(client, accepted=len(bad), rejected=len(bad))
    kept = rejected(client)
    for place, (value, field, reason) in zip(places[::2], bad, strict=True):
        assert kept[place][:2] == (value, field)
        assert reason in kept[place][2]
    assert set(client.column("select key from orchestrator.reject")) == {b"key"}
    assert client.value("select count(*) from orchestrator.outbox where kind = 'dlq'") in (0, len(bad))


async def test_duplicate_records_change_nothing_at_any_offset(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    values = [submission(n % 300) for n in range(900)]
    async with ingesting(settings(**topic.environ)) as running:
        await read_to(client, topic.name, await feed(topic, values))
        await read_to(client, topic.name, await feed(topic, values[:300]))
        assert_exact(client, accepted=300, duplicates=900)
        await eventually(lambda: running.value("events_duplicate_total") == 900)


async def test_a_value_that_only_the_database_refuses_is_found_and_rejected_alone(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    client.rows("""create function refuse() returns trigger language plpgsql as $$ begin
      if new.payload::text like '%poison%' then
        raise exception 'this payload is refused' using errcode = 'invalid_parameter_value'; end if;
      return new; end $$""")
    client.rows("create trigger refuse before insert on orchestrator.event for each row execute function refuse()")
    poisoned = {17, 18, 333, 999}
    values = [submission(n, payload="poison" if n in poisoned else n) for n in range(1000)]
    places = await feed(topic, values)
    async with ingesting(settings(**topic.environ)):
        await read_to(client, topic.name, places)
    assert_exact(client, accepted=996, rejected=4)
    kept = rejected(client)
    assert set(kept) == {places[n] for n in poisoned}
    assert {reason for _, _, reason in kept.values()} == {"this payload is refused"}


async def test_the_id_that_a_producer_has_given_is_kept_if_the_event_can_have_it(
    settings: MakeSettings, client: Client, topic: Topic
) -> None:
    given = random_event_id(DUE)
    name = "orchestrator-event-id"
    nameless = submission(1, external_job_id=...)
    places = [
        *await feed(topic, [nameless], headers=[("traceparent", b"x"), (name, given.encode())]),
        *await feed(topic, [nameless], headers=[(name, given.encode())]),  # sent twice by a producer that had to
        *await feed(topic, [nameless], headers=[(name, str(uuid.uuid4()).encode())]),
        *await feed(topic, [submission(2)], headers=[(name, given.encode())]),
        *await feed(topic, [nameless], headers=[(name, b"\xff")]),
    ]
    async with ingesting(settings(**topic.environ)):
        await read_to(client, topic.name, places)
    assert client.column("select id::text from orchestrator.event") == [given]
    assert_exact(client, accepted=1, duplicates=1, rejected=3)
    assert {field for _, field, _ in rejected(client).values()} == {name}


async def test_records_of_aborted_transactions_are_not_events_and_open_ones_wait(
    settings: MakeSettings, client: Client, topic: Topic, kafka: Kafka
) -> None:
    if not kafka.transactions:
        pytest.skip("this broker has no transactions")
    async with (
        ingesting(settings(**topic.environ)) as running,
        producing(topic, transactional_id=topic.name) as producer,
    ):
        for n in range(20):
            await producer.begin_transaction()
            for each in range(10):
                await producer.send(topic.name, submission(10 * n + each), partition=0)
            if n % 2:
                await producer.abort_transaction()
            else:
                await producer.commit_transaction()
        await producer.begin_transaction()
        last = await producer.send_and_wait(topic.name, submission(1000), partition=0)
        committed = {f"job-{n}" for n in range(200) if n // 10 % 2 == 0}
        # 200 records and a marker for each transaction, the last of them included.
        await eventually(lambda: positions(client, topic.name).get(0) == 220 == last.offset, 20)
        assert jobs(client) == committed
        await eventually(lambda: running.value("ingest_lag", topic=topic.name) == 1)
        await producer.commit_transaction()
        await read_to(client, topic.name, [(0, last.offset)])
    assert jobs(client) == committed | {"job-1000"}
    assert_exact(client, accepted=101)


async def test_a_compacted_topic_is_read_across_its_gaps(settings: MakeSettings, client: Client) -> None:
    try:
        broker = MavenBroker(parent=scratch_directory(), properties={"log.cleaner.backoff.ms": "50"})
    except OrchestratorError as error:
        pytest.skip(str(error))
    with broker:
        config = {"cleanup.policy": "compact", "segment.ms": "50", "min.cleanable.dirty.ratio": "0.01"}
        topic = await Topic.new(KafkaBroker.of(broker), 1, **config)
        first = [submission(n) for n in range(100)]
        async with producing(topic) as producer:
            for n, value in enumerate(first):
                await producer.send(topic.name, value, key=b"key %d" % (n % 90), partition=0)
        async with ingesting(settings(**topic.environ)):
            await read_to(client, topic.name, [(0, 99)])
        # All of these have one key, and only the last stays: the anchor, at offset 99, goes as well.
        async with producing(topic) as producer:
            for n in range(100, 200):
                await producer.send_and_wait(topic.name, submission(n), key=b"key 9", partition=0)

            async def compacted() -> Any:
                filler = await producer.send_and_wait(topic.name, submission(999), key=b"filler", partition=0)
                log = next((broker.directory / "data").glob(f"{topic.name}-0/00000000000000000000.log"))
                return filler.offset > 200 and all(gone not in log.read_bytes() for gone in (b'"job-150"', b'"job-99"'))

            await eventually(compacted, 30, pause_s=0.1)
            end = await producer.send_and_wait(topic.name, submission(1000), key=b"end", partition=0)
        async with ingesting(settings(**topic.environ)) as running:
            await read_to(client, topic.name, [(0, end.offset)])
            assert running.value("ingest_halted_partitions") == 0
    assert {"job-99", "job-999", "job-1000"} <= jobs(client)
    assert "job-150" not in jobs(client)


async def test_a_record_larger_than_a_fetch_is_read(settings: MakeSettings, client: Client, kafka: Kafka) -> None:
    large = await Topic.new(kafka, 2, **{"max.message.bytes": "6000000"})
    values = [submission(n, payload="x" * 4_000_000) for n in range(6)]
    places = await feed(large, [*values, submission(100)], max_request_size=6_000_000)
    async with ingesting(settings(MAX_PAYLOAD_BYTES="5000000", **large.environ)):
        await read_to(client, large.name, places)
    assert_exact(client, accepted=7)


async def test_many_consumers_in_a_process_share_the_partitions_and_its_memory(
    spawn: Spawn, client: Client, kafka: Kafka
) -> None:
    wide = await Topic.new(kafka, 24)
    values = [submission(n, payload="x" * 4000) for n in range(20_000)]
    places = await feed(wide, values)
    process = spawn("ingest", KAFKA_CONSUMER_CONCURRENCY="20", **wide.environ)
    await read_to(client, wide.name, places, 60)
    assert peak_mib(process.pid) < 200
    assert await process.stop() == 0
    assert_exact(client, accepted=20_000)


def peak_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
