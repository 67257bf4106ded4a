"""`orchestrator topics`, and what doctor says about Kafka."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import psycopg
import pytest
from aiokafka.cluster import ClusterMetadata

from orchestrator.doctor import diagnose
from orchestrator.doctor.finding import Finding
from orchestrator.errors import KafkaUnavailable, OrchestratorError
from orchestrator.kafka.client import started_producer
from orchestrator.kafka.topics import create_topics, partition_counts, topic_names
from tests.conftest import MakeSettings, Spawn
from tests.support.brokers import Kafka
from tests.support.processes import Spawned

NOWHERE = "127.0.0.1:1"


@pytest.fixture
def deployment(kafka: Kafka) -> dict[str, str]:
    """Settings of a customer of this test's own, whose topics do not exist."""
    return {**kafka.environ, "CUSTOMER_NAME": kafka.unique("customer"), "KAFKA_PARTITIONS": "3"}


async def document(process: Spawned, expected_exit: int = 0) -> Any:
    assert await process.wait() == expected_exit, process.log()
    return json.loads(process.log())


async def test_topics_create_makes_each_topic_once(
    spawn: Spawn, deployment: dict[str, str], settings: MakeSettings
) -> None:
    names = topic_names(settings(**deployment))
    assert len(names) == 7
    listed = await document(spawn("topics", "list", "--json", **deployment), expected_exit=1)
    assert listed == [{"name": name, "partitions": 0} for name in names]
    for outcome in ("created", "exists"):
        made = await document(spawn("topics", "create", "--json", **deployment))
        assert made == [{"name": name, "outcome": outcome, "partitions": 3} for name in names]
    listed = await document(spawn("topics", "list", "--json", **deployment))
    assert listed == [{"name": name, "partitions": 3} for name in names]


async def test_a_topic_that_exists_keeps_its_partitions_and_the_command_says_so(
    spawn: Spawn, deployment: dict[str, str]
) -> None:
    await document(spawn("topics", "create", "--json", **deployment))
    again = spawn("topics", "create", **{**deployment, "KAFKA_PARTITIONS": "5"})
    assert await again.wait() == 0
    assert again.log().count("exists, though KAFKA_PARTITIONS is 5") == 7


async def test_topics_create_makes_only_the_named_topics(deployment: dict[str, str], settings: MakeSettings) -> None:
    ours = settings(**deployment)
    made = await create_topics(ours, [ours.topic_dlq])
    assert made == [(ours.topic_dlq, "created", 3)]
    counts = await partition_counts(ours)
    assert counts == {name: 3 if name == ours.topic_dlq else 0 for name in topic_names(ours)}


async def test_topics_create_waits_for_brokers_that_have_no_controller_yet(
    deployment: dict[str, str], settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, update = 0, ClusterMetadata.update_metadata

    def without_controller(self: Any, metadata: Any) -> None:
        nonlocal heard
        update(self, metadata)
        heard += 1
        if heard <= 3:
            self.controller = None

    monkeypatch.setattr(ClusterMetadata, "update_metadata", without_controller)
    ours = settings(**deployment)
    assert await create_topics(ours, [ours.topic_dlq]) == [(ours.topic_dlq, "created", 3)]
    assert heard > 3


async def test_a_replication_that_is_not_possible_is_named(
    kafka: Kafka, deployment: dict[str, str], settings: MakeSettings
) -> None:
    if kafka.makes_topics:
        pytest.skip(f"{kafka.name} takes any number of replicas")
    with pytest.raises(OrchestratorError, match="choose a KAFKA_REPLICATION"):
        await create_topics(settings(**deployment, KAFKA_REPLICATION="99"))


async def test_brokers_that_are_away_are_named(settings: MakeSettings) -> None:
    with pytest.raises(KafkaUnavailable, match=f"KAFKA_BOOTSTRAP_SERVERS: .*{NOWHERE}"):
        await create_topics(settings(DATABASE_URL="postgresql://x/y", KAFKA_BOOTSTRAP_SERVERS=NOWHERE))


# doctor


def looked(environ: dict[str, str]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {"kafka": [], "topics": [], "ingestion": [], "outbox": []}
    for finding in diagnose(environ):
        found.setdefault(finding.check, []).append(finding)
    return found


def levels(found: dict[str, list[Finding]]) -> dict[str, set[str]]:
    return {check: {each.level for each in found[check]} for check in ("kafka", "topics", "ingestion", "outbox")}


@pytest.fixture
def diagnosed(deployment: dict[str, str], database_url: str) -> dict[str, str]:
    return {**deployment, "DATABASE_URL": database_url}


def test_doctor_finds_no_fault_without_kafka(database_url: str) -> None:
    found = looked({"DATABASE_URL": database_url})
    assert [each.level for each in found["kafka"]] == ["ok"]
    assert not found["topics"]


def test_doctor_names_brokers_that_are_away(database_url: str) -> None:
    (finding,) = looked({"DATABASE_URL": database_url, "KAFKA_BOOTSTRAP_SERVERS": NOWHERE})["kafka"]
    assert (finding.level, NOWHERE in finding.what) == ("problem", True)


async def in_thread(environ: dict[str, str]) -> dict[str, list[Finding]]:
    return await asyncio.to_thread(looked, environ)


async def test_doctor_asks_for_the_topics_that_are_needed(diagnosed: dict[str, str], settings: MakeSettings) -> None:
    found = await in_thread(diagnosed)
    (finding,) = found["topics"]
    assert (finding.level, finding.mend) == ("problem", "run: orchestrator topics create")
    ours = settings(**diagnosed)
    assert ours.topic_dlq in finding.what
    assert ours.topic_scheduled not in finding.what  # OUTBOX_TOPICS does not have it
    await create_topics(ours)
    content = {check: {"ok"} for check in ("kafka", "topics", "ingestion", "outbox")}
    assert levels(await in_thread(diagnosed)) == content
    found = await in_thread({**diagnosed, "KAFKA_PARTITIONS": "5"})
    assert levels(found) == content | {"topics": {"warning"}}


async def test_doctor_sees_records_that_no_ingester_reads_and_partitions_that_are_halted(
    diagnosed: dict[str, str], settings: MakeSettings
) -> None:
    ours = settings(**diagnosed)
    topic = ours.topic_submission
    await create_topics(ours)
    async with started_producer(ours, "test") as producer:
        await producer.send_and_wait(topic, b"one", partition=0)
    (finding,) = (await in_thread(diagnosed))["ingestion"]
    assert finding.level == "warning"
    assert f"1 record of {topic} unread, and none has been read yet" in finding.what
    with psycopg.connect(ours.database_url, autocommit=True) as connection:
        connection.execute("select orchestrator.set_ingest_offset(%s, 0, 7)", (topic,))
        (finding,) = (await in_thread(diagnosed))["ingestion"]
        assert finding.level == "problem"
        assert f"partition 0 of {topic} is halted at offset 7" in finding.what
        assert "recreated or truncated" in finding.what
        connection.execute(finding.mend.partition(": ")[2])
        connection.execute("update orchestrator.ingest_offset set moved_at = now() - interval '5 minutes'")
        (finding,) = (await in_thread(diagnosed))["ingestion"]
        assert (finding.level, "none has been read for 30" in finding.what) == ("warning", True)
        connection.execute("select orchestrator.set_ingest_offset(%s, 0, 1)", (topic,))
        assert levels(await in_thread(diagnosed))["ingestion"] == {"ok"}


async def test_doctor_sees_an_outbox_that_no_process_publishes(
    diagnosed: dict[str, str], settings: MakeSettings
) -> None:
    await create_topics(settings(**diagnosed))
    with psycopg.connect(diagnosed["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "insert into orchestrator.outbox (created_at, kind, value)"
            " values (now() - interval '2 minutes', 'dlq', 'x')"
        )
    (finding,) = (await in_thread(diagnosed))["outbox"]
    waited = re.search(r"waited (\d+) s", finding.what)
    assert waited is not None
    assert (finding.level, int(waited[1]) >= 120) == ("warning", True)


async def test_doctor_sees_a_partition_that_is_gone(diagnosed: dict[str, str], settings: MakeSettings) -> None:
    ours = settings(**diagnosed)
    await create_topics(ours)
    with psycopg.connect(ours.database_url, autocommit=True) as connection:
        connection.execute("select orchestrator.set_ingest_offset(%s, 3, 5)", (ours.topic_submission,))
    (finding,) = (await in_thread(diagnosed))["ingestion"]
    assert (finding.level, "partition 3" in finding.what) == ("problem", True)
