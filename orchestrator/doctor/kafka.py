"""Checks of Kafka: its brokers, its topics, and whether records flow from it and to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import psycopg

from orchestrator.database.connection import BlockingConnection, connect_blocking
from orchestrator.doctor.finding import Finding, counted, ok, problem, warning
from orchestrator.errors import OrchestratorError, UnusableDatabase, first_line
from orchestrator.settings import Settings

_STALLED_S = 60.0


def kafka_findings(settings: Settings) -> Iterator[Finding]:
    """Findings about brokers, topics and offsets. If no broker can be reached, that is the only finding."""
    if settings.kafka_servers is None:
        yield ok("kafka", "not used: KAFKA_BOOTSTRAP_SERVERS is not set")
        return
    from orchestrator.kafka.topics import partition_counts

    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the error that is raised says the same
    try:
        partitions = asyncio.run(partition_counts(settings))
    except OrchestratorError as error:
        yield problem("kafka", str(error), "start the brokers, or correct the setting that is named")
        return
    yield ok("kafka", f"brokers answer at {settings.kafka_servers}")
    yield from _topics(settings, partitions)
    try:
        url = settings.database_url
        with connect_blocking(url, "doctor", statement_timeout="15s", lock_timeout="2s") as connection:
            yield from _ingestion(connection, settings, partitions)
            yield from _outbox(connection)
    except UnusableDatabase:
        return  # the findings about the database say so
    except OrchestratorError as error:
        yield problem("ingestion", str(error), "see the log of the brokers")
    except psycopg.OperationalError:
        return  # the findings about the database say so
    except psycopg.Error as error:
        yield warning("ingestion", f"cannot check: {first_line(error)}", "run: orchestrator migrate")


def _topics(settings: Settings, partitions: dict[str, int]) -> Iterator[Finding]:
    optional = {
        settings.topic_scheduled: "scheduled",
        settings.topic_timestamp: "timestamp",
        settings.topic_dlq: "dlq",
    }
    needed = [name for name in partitions if name not in optional or optional[name] in settings.outbox_topics]
    missing = [name for name in needed if partitions[name] == 0]
    if missing:
        yield problem("topics", f"there is no topic {', '.join(missing)}", "run: orchestrator topics create")
    others = [name for name in needed if partitions[name] not in (0, settings.kafka_partitions)]
    if others:
        shown = ", ".join(f"{name} ({partitions[name]})" for name in others)
        yield warning(
            "topics",
            f"KAFKA_PARTITIONS is {settings.kafka_partitions}, but these topics differ: {shown}",
            "set KAFKA_PARTITIONS to that number; partitions added to a topic break the order of its keys",
        )
    if not missing and not others:
        yield ok(
            "topics", f"{counted(len(needed), 'topic')} with {counted(settings.kafka_partitions, 'partition')} each"
        )


def _ingestion(connection: BlockingConnection, settings: Settings, partitions: dict[str, int]) -> Iterator[Finding]:
    from orchestrator.kafka.topics import log_bounds

    well = True
    for topic in (settings.topic_submission, settings.topic_processing):
        if partitions[topic] == 0:
            continue
        rows = connection.execute(
            "select partition, next_offset, extract(epoch from clock_timestamp() - moved_at)::float8"
            " from orchestrator.ingest_offset where topic = %s",
            (topic,),
        ).fetchall()
        positions = {int(number): int(offset) for number, offset, _ in rows}
        bounds = asyncio.run(log_bounds(settings, topic, partitions[topic]))
        halted = [number for number, offset in positions.items() if not _is_within(offset, bounds.get(number))]
        for number in halted:
            well = False
            yield _halt(topic, number, positions[number], bounds.get(number))
        waiting = sum(
            end - positions.get(number, begin) for number, (begin, end) in bounds.items() if number not in halted
        )
        quiet_s = min((float(seconds) for _, _, seconds in rows), default=None)
        if waiting and (quiet_s is None or quiet_s > _STALLED_S):
            well = False
            since = "yet" if quiet_s is None else f"for {quiet_s:.0f} s"
            yield warning(
                "ingestion",
                f"{counted(waiting, 'record')} of {topic} unread, and none has been read {since}",
                "start an ingester: orchestrator run, or orchestrator ingest",
            )
    if well:
        yield ok("ingestion", "no partition is halted, and records are being read")


def _is_within(offset: int, bounds: tuple[int, int] | None) -> bool:
    return bounds is not None and bounds[0] <= offset <= bounds[1]


def _halt(topic: str, number: int, offset: int, bounds: tuple[int, int] | None) -> Finding:
    if bounds is None:
        return problem(
            "ingestion",
            f"partition {number} of {topic} was read up to offset {offset}, and no longer exists",
            "the topic was recreated with fewer partitions: recreate it with as many as before",
        )
    begin, end = bounds
    why = "the topic was recreated or truncated" if offset > end else "records were deleted before they were read"
    return problem(
        "ingestion",
        f"partition {number} of {topic} is halted at offset {offset}, but its offsets go from {begin} to {end}: {why}",
        f"once you know what was lost: select orchestrator.set_ingest_offset('{topic}', {number}, {begin})",
    )


def _outbox(connection: BlockingConnection) -> Iterator[Finding]:
    row = connection.execute(
        "select extract(epoch from clock_timestamp() - created_at)::float8 from orchestrator.outbox"
        " order by written_by, message limit 1"
    ).fetchone()
    if row is None or row[0] < _STALLED_S:
        yield ok("outbox", f"no message has waited longer than {_STALLED_S:.0f} s to be published")
        return
    yield warning(
        "outbox",
        f"the oldest message has waited {row[0]:.0f} s to be published",
        "start orchestrator run or orchestrator dispatch, which publish messages, or see in their log what stops them",
    )
